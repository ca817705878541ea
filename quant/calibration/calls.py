"""Calibration data: calls of a network, in any of the forms in which they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.eval.costs.calls import batch_of

if TYPE_CHECKING:
    from fewstep.caching.calibration.runs import Runs


@dataclass(frozen=True)
class Call:
    """The arguments of one forward call of a network.

    Attributes:
        args, kwargs: as the network takes them.
        samples: which sample of the recording each row of the batch belongs to, where that is known; the halves of guidance
            belong to the same.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = ()  # type: ignore[assignment]
    samples: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kwargs", dict(self.kwargs))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Tensor arguments with their names; positional ones are called ``argument 0`` and so on."""
        named = [(f"argument {i}", value) for i, value in enumerate(self.args)]
        return [(n, v) for n, v in (*named, *self.kwargs.items()) if isinstance(v, Tensor)]

    @property
    def batch(self) -> int:
        return batch_of(self.args, dict(self.kwargs))

    @property
    def timestep(self) -> float:
        """The time that the network is told, of the first sample; NaN where it is told none."""
        value = self.kwargs.get("timestep", self.args[1] if len(self.args) > 1 else None)
        return float(torch.as_tensor(value).reshape(-1)[0]) if isinstance(value, Tensor | int | float) else float("nan")

    def select(self, rows: Sequence[int]) -> Call:
        """The same call of some samples of its batch."""
        batch, index = self.batch, torch.as_tensor(list(rows))

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch:
                return value[index.to(value.device)]
            return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value

        samples = None if self.samples is None else tuple(self.samples[row] for row in rows)
        return Call(tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()}, samples)

    def to(self, device: torch.device | str) -> Call:
        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().to(device)
            return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

        kwargs = {name: move(value) for name, value in self.kwargs.items()}
        return Call(tuple(map(move, self.args)), kwargs, self.samples)

    def run(self, network: nn.Module) -> Tensor:
        """The network's output, of a dataclass or a tuple the first tensor."""
        return first_tensor(network(*self.args, **self.kwargs))


class Recording(list[Call]):
    """The calls of a sampler in their order, and what it takes to run it once more.

    Attributes:
        runs: the pipeline with its prompts, seeds and steps.
    """

    def __init__(self, calls: Iterable[Call], runs: Runs) -> None:
        super().__init__(calls)
        self.runs = runs


def first_tensor(output: Any) -> Tensor:
    """A network's output as a tensor: itself, its ``sample``, or its first element."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "sample", None)
    found = output[0] if found is None else found
    assert isinstance(found, Tensor)
    return found


def as_calls(calibration: Any, *, what: str = "calibration") -> list[Call]:
    """Calibration data in any of its forms as calls: :class:`Call`, keyword arguments, positional ones, or one tensor each.

    Raises:
        FewstepError: for something else, no calls, NaN or infinity, or an input that is constant: all scales would follow
            from it.
    """
    if calibration is None:
        return []
    if isinstance(calibration, Call | Tensor | Mapping) or not isinstance(calibration, Iterable):
        raise FewstepError(f"{what} is a {type(calibration).__name__}; give a list of calls, see quant.record")
    calls = [_as_call(entry, what) for entry in calibration]
    if not calls:
        raise FewstepError(f"{what} has no calls; give at least one")
    for i, call in enumerate(calls):
        _check(call, f"{what}, call {i}")
    return Recording(calls, calibration.runs) if isinstance(calibration, Recording) else calls


def _as_call(entry: Any, what: str) -> Call:
    if isinstance(entry, Call):
        return entry
    if isinstance(entry, Mapping):
        return Call((), entry)
    if isinstance(entry, Tensor):
        return Call((entry,))
    if isinstance(entry, tuple):
        return Call(entry)
    raise FewstepError(f"{what} holds a {type(entry).__name__}; a call is a dict of keywords, a tuple, or one tensor")


def _check(call: Call, where: str) -> None:
    floats = [(name, value) for name, value in call.tensors() if value.is_floating_point()]
    for name, value in floats:
        if not bool(torch.isfinite(value).all()):
            raise FewstepError(f"{where}: {name} has NaN or infinity")
    if floats:
        name, largest = max(floats, key=lambda entry: entry[1].numel())
        if largest.numel() > 1 and bool((largest == largest.reshape(-1)[0]).all()):
            raise FewstepError(
                f"{where}: {name} is constant ({float(largest.reshape(-1)[0]):g}); give what the sampler gives the network"
            )
