"""The state of a run: saved whole or not at all, and restored bit for bit."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fewstep.errors import ArtifactError

from .task import Settings, Task


@dataclass
class State:
    """Everything that a resumed run continues from."""

    module: nn.Module
    average: nn.Module
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0

    def save(self, path: Path, settings: Settings) -> None:
        """Writes one safetensors file by a temporary name, so that a kill leaves either the old or the new one."""
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
        numbers = {k: getattr(self, k) for k in ("step", "seconds", "loss_sum", "loss_count")}
        metadata = {"state": json.dumps(numbers), "settings": json.dumps(asdict(settings))}
        temporary = path.with_suffix(".tmp")
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    def restore(self, path: Path, settings: Settings) -> None:
        """Continues from ``path``. Refuses a run made with other settings."""
        groups: dict[str, dict[str, torch.Tensor]] = {"module": {}, "average": {}, "optimizer": {}}
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                group, _, rest = key.partition(".")
                groups[group][rest] = file.get_tensor(key)
        saved, wanted = json.loads(metadata["settings"]), json.loads(json.dumps(asdict(settings)))
        if saved != wanted:
            changed = ", ".join(f"{k}: {saved.get(k)} -> {wanted[k]}" for k in wanted if saved.get(k) != wanted[k])
            raise ArtifactError(f"{path} was trained with other settings ({changed}); use --restart or another folder")
        self.module.load_state_dict(groups["module"])
        self.average.load_state_dict(groups["average"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in groups["optimizer"].items():
            index, slot = key.split(".")
            parameter = parameters[int(index)]
            if value.shape == parameter.shape:
                # The fused update walks through memory: the averages must lie in it as their parameter does.
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            state.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for name, value in json.loads(metadata["state"]).items():
            setattr(self, name, value)


def initial_state(task: Task) -> State:
    """The state of step zero: fixed by the task's seed."""
    settings = task.settings
    torch.manual_seed(settings.seed)
    module = task.build()
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return State(module, copy.deepcopy(module).requires_grad_(False).eval(), optimizer)
