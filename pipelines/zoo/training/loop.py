"""The one training loop: resumable, with an average of the weights, within a budget of steps or of minutes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.errors import FewstepError

from .state import State, initial_state
from .task import Settings, Task

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


@dataclass(frozen=True)
class Budget:
    """When to stop: after ``steps``, after ``minutes`` of training time, or whichever comes first.

    The learning rate follows the same clock, so that it reaches zero when the budget is spent. A run with ``minutes``
    alone depends on the machine; one with ``steps`` alone is reproducible bit for bit on one machine.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if not any(limit is not None and limit > 0 for limit in (self.steps, self.minutes)):
            raise FewstepError(
                f"budget has steps={self.steps} and minutes={self.minutes}; give one of them, above zero"
            )

    def progress(self, step: int, seconds: float) -> float:
        """The fraction spent, in [0, 1]."""
        fractions = [step / self.steps if self.steps else 0.0, seconds / (60 * self.minutes) if self.minutes else 0.0]
        return min(1.0, max(fractions))


def train(
    task: Task,
    folder: Path,
    budget: Budget,
    *,
    checkpoint_seconds: float = 120.0,
    log_every: int = 20,
    restart: bool = False,
    on_step: Callable[[State, float], None] | None = None,
) -> State:
    """Trains ``task`` in ``folder``, continuing what is there, until ``budget`` is spent.

    A run that was killed at any moment loses at most ``checkpoint_seconds`` of work. ``on_step`` is called after each
    step with the state and the last loss (the command line draws its progress bar with it).
    """
    settings = task.settings
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / CHECKPOINT, folder / LOG
    state = initial_state(task)
    if restart:
        log.unlink(missing_ok=True)
    elif checkpoint.exists():
        state.restore(checkpoint, settings)
    _truncate_log(log, state.step)
    generator = torch.Generator()
    saved_at = begun = time.monotonic()
    offset = state.seconds
    while (progress := budget.progress(state.step, state.seconds)) < 1:
        # A fresh seed for each step: the randomness of a step depends on its number alone, so nothing need be saved.
        generator.manual_seed(settings.seed * 1_000_003 + state.step)
        loss = _update(task, state, settings, progress, generator)
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {task.name} became {loss} at step {state.step}; lower the learning rate")
        state.step += 1
        now = time.monotonic()
        state.seconds = offset + now - begun
        state.loss_sum += loss
        state.loss_count += 1
        if state.loss_count == log_every:
            _append_log(log, state, settings.learning_rate * _schedule(settings, state.step, progress))
            state.loss_sum, state.loss_count = 0.0, 0
        if on_step is not None:
            on_step(state, loss)
        if now - saved_at >= checkpoint_seconds:
            state.save(checkpoint, settings)
            saved_at = now
    state.save(checkpoint, settings)
    return state


def batch_indices(length: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Which examples step ``step`` sees: each epoch is a fresh permutation, its ragged end is dropped."""
    epoch, position = divmod(step, length // batch_size)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed * 7_919 + epoch))
    return order[position * batch_size : (position + 1) * batch_size]


def _update(task: Task, state: State, settings: Settings, progress: float, generator: torch.Generator) -> float:
    for group in state.optimizer.param_groups:
        group["lr"] = settings.learning_rate * _schedule(settings, state.step, progress)
    state.module.train()
    loss = task.loss(state.module, state.step, generator)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(state.module.parameters(), settings.clip_norm)
    state.optimizer.step()
    # The average starts young, or it would remember the initialisation for thousands of steps.
    decay = min(settings.ema_decay, (1 + state.step) / (10 + state.step))
    _average(state.average, state.module, 1 - decay)
    return float(loss.detach())


@torch.no_grad()
def _average(average: nn.Module, module: nn.Module, weight: float) -> None:
    """Moves ``average`` towards ``module``; buffers that count are copied."""
    for a, b in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, weight)
        else:
            a.copy_(b)


def _schedule(settings: Settings, step: int, progress: float) -> float:
    """Linear warm-up, then a half cosine to zero."""
    return min(1.0, (step + 1) / max(1, settings.warmup_steps)) * 0.5 * (1 + math.cos(math.pi * progress))


def _append_log(path: Path, state: State, learning_rate: float) -> None:
    line: dict[str, Any] = {
        "step": state.step,
        "seconds": round(state.seconds, 1),
        "loss": state.loss_sum / state.loss_count,
        "learning_rate": learning_rate,
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _truncate_log(path: Path, step: int) -> None:
    """Drops what a killed run logged after its last checkpoint, a half-written line included."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if entry["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
