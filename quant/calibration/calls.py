"""Calibration data: calls of the network as its own sampler makes them, spread evenly over the time steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.eval.costs.calls import batch_of, denoisers


@dataclass(frozen=True)
class Call:
    """The arguments of one forward call of a network."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = ()  # type: ignore[assignment]

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

        return Call(tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()})

    def to(self, device: torch.device | str) -> Call:
        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.detach().to(device)
            return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

        return Call(tuple(map(move, self.args)), {name: move(value) for name, value in self.kwargs.items()})

    def run(self, network: nn.Module) -> Tensor:
        """The network's output, of a dataclass or a tuple the first tensor."""
        return first_tensor(network(*self.args, **self.kwargs))


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
    return calls


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


def record(
    pipe: Any,
    prompts: Sequence[str] = ("",),
    *,
    num_inference_steps: int = 20,
    samples: int = 8,
    guidance: float = 4.0,
    seed: int = 0,
    keep: int | None = None,
    component: nn.Module | None = None,
) -> list[Call]:
    """What a pipeline's network is called with while it draws: every step alike, as Q-Diffusion samples.

    Args:
        pipe: a diffusers pipeline; its scheduler and its own weights make the trajectory.
        prompts: cycled; names of classes for a model that draws classes, nothing for an unconditional one.
        num_inference_steps: of the trajectory. Statistics belong to the sampler they were taken with.
        samples: images drawn, in one batch.
        guidance: scale; the halves of a guided batch both count.
        seed: of the first image.
        keep: samples kept of every call, drawn from its batch; all where left out.
        component: which network, where the pipeline has two.

    Returns:
        One call a network call, in order, on the CPU.

    Raises:
        FewstepError: for fewer than one image or step.

    Source: Q-Diffusion, 2302.04304, algorithm 1.
    """
    from fewstep.eval.checks import at_least
    from fewstep.eval.drawing.batch import borrowed, draw

    for what, value in (("num_inference_steps", num_inference_steps), ("samples", samples)):
        at_least(what, value, 1)
    calls: list[Call] = []
    generator = torch.Generator().manual_seed(seed)

    def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs)
        if keep is not None and keep < call.batch:
            call = call.select(sorted(torch.randperm(call.batch, generator=generator)[:keep].tolist()))
        calls.append(call.to("cpu"))

    network = component or denoisers(pipe)[0]
    handle = network.register_forward_pre_hook(keep_call, with_kwargs=True)
    try:
        with borrowed(pipe):
            wanted = [prompts[i % len(prompts)] for i in range(samples)]
            draw(pipe, wanted, range(seed, seed + samples), steps=num_inference_steps, guidance=guidance)
    finally:
        handle.remove()
    return calls
