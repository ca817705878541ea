"""A pipeline's denoiser as a plain callable: conditioning and guidance are captured from one step of the pipeline itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewstep.errors import FewstepError

TOLERANCE = 1e-3
"""Of the combined output, relative to its largest value: what half precision leaves of a guided sum."""


def denoiser_of(pipe: Any) -> nn.Module:
    """The network that a pipeline calls at every step.

    Raises:
        FewstepError: neither ``unet`` nor ``transformer`` is one.
    """
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise FewstepError(
        f"{type(pipe).__name__} has neither a unet nor a transformer; learning needs the network it calls"
    )


@dataclass
class _Step:
    """One sample's only step, as it passed the denoiser and the scheduler."""

    sample: Tensor
    """(1, ...) what the scheduler was given."""
    timestep: float
    combined: Tensor
    """(1, ...) the output that the scheduler was given."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    raw: Tensor
    """(k, ...) the denoiser's output: k = 2 with classifier-free guidance."""


@contextmanager
def _watching(pipe: Any) -> Iterator[list[_Step]]:
    """Collects what one-step runs of ``pipe`` do while open."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    steps: list[_Step] = []

    def seen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, _tensor(output).detach()))

    scheduler = pipe.scheduler
    step = scheduler.step

    def stepped(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(calls) != 1:
            raise FewstepError(
                f"{type(pipe).__name__} calls its denoiser {len(calls)} times a step; learning captures pipelines that "
                "call it once, with guidance as one batch"
            )
        given, named, raw = calls.pop()
        steps.append(_Step(sample[:1], float(timestep), model_output[:1], given, named, raw))
        return step(model_output, timestep, sample, *args, **kwargs)

    handle = denoiser_of(pipe).register_forward_hook(seen, with_kwargs=True)
    scheduler.__dict__["step"] = stepped
    try:
        yield steps
    finally:
        handle.remove()
        scheduler.__dict__.pop("step", None)


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if not isinstance(found, Tensor):
        raise FewstepError(f"the denoiser returned a {type(found).__name__}; a tensor is needed")
    return found


class GuidedDenoiser:
    """``denoiser(x, t, which)`` is what a pipeline's scheduler would have been given for those samples at that time.

    Differentiable in x and t; the weights are left out of the graph. Immutable.

    Attributes:
        initial: (n, ...) float32, what the pipeline's first step started from.
    """

    def __init__(self, denoiser: nn.Module, steps: Sequence[_Step], guidance: Tensor) -> None:
        self._denoiser = denoiser
        first = steps[0]
        if len({len(s.raw) for s in steps}) > 1:
            raise FewstepError(
                f"some of the guidance scales {sorted(set(guidance.tolist()))} are drawn with classifier-free guidance and "
                "some without (at most 1); learn a plan for each of the two"
            )
        self.initial = torch.cat([s.sample for s in steps]).float()
        self._copies = len(first.raw)
        self._channels = first.combined.shape[1]
        self._guidance = guidance.to(self.initial)
        self._flip = self._order(steps)
        leaves, self._structure = pytree.tree_flatten((first.args, first.kwargs))
        others = [pytree.tree_flatten((s.args, s.kwargs)) for s in steps]
        if any(structure != self._structure for _, structure in others):
            raise FewstepError("the denoiser is called in different ways for different prompts; learn them one by one")
        self._leaves = [self._leaf([o[k] for o, _ in others]) for k in range(len(leaves))]
        self._sample_at = self._find(leaves, first, "sample")
        self._time_at = self._find(leaves, first, "time")
        time = float(torch.as_tensor(leaves[self._time_at]).reshape(-1)[0])
        self._time_scale = time / first.timestep if first.timestep else 1.0
        like = leaves[self._time_at]
        self._time_dtype = like.dtype if isinstance(like, Tensor) and like.is_floating_point() else torch.float32

    def __call__(self, x: Tensor, t: Any, which: Tensor) -> Tensor:
        k, batch = self._copies, len(x)
        leaves = [leaf.rows(which) if isinstance(leaf, _Own) else leaf for leaf in self._leaves]
        like = self._leaves[self._sample_at]
        assert isinstance(like, _Own)
        leaves[self._sample_at] = x.repeat(k, *[1] * (x.ndim - 1)).to(like.values)
        tau = torch.as_tensor(t) * self._time_scale
        leaves[self._time_at] = tau.to(device=x.device, dtype=self._time_dtype).expand(k * batch)
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        with _weights_left_out(self._denoiser):
            output = self._denoiser(*args, **kwargs)
        raw = _tensor(output)[:, : self._channels].to(x.dtype)
        if k == 1:
            return raw
        away, towards = raw.chunk(2)[:: -1 if self._flip else 1]
        g = self._guidance[which].reshape(-1, *[1] * (x.ndim - 1))
        return away + g * (towards - away)

    def _leaf(self, values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor) and first.ndim and len(first) == self._copies:
            if any(v.shape != first.shape for v in values):
                shapes = sorted({tuple(v.shape) for v in values})
                raise FewstepError(
                    f"prompts give conditionings of different shapes {shapes}; learn from prompts of one"
                )
            return _Own(torch.stack([v.detach() for v in values]))
        same = all(torch.equal(v, first) if isinstance(first, Tensor) else v == first for v in values)
        if not same:
            raise FewstepError(
                f"an argument of the denoiser differs between samples but has no batch dimension: {first!r}"
            )
        return first.detach() if isinstance(first, Tensor) else first

    def _order(self, steps: Sequence[_Step]) -> bool:
        """Whether the conditional half comes first; raises where guidance is not a weighted sum of two halves."""
        if self._copies == 1:
            candidates = {False: [s.raw[:, : self._channels] for s in steps]}
        else:
            halves = [(s.raw[:1, : self._channels], s.raw[1:, : self._channels]) for s in steps]
            weights = self._guidance.tolist()
            candidates = {
                False: [a + g * (b - a) for (a, b), g in zip(halves, weights, strict=True)],
                True: [b + g * (a - b) for (a, b), g in zip(halves, weights, strict=True)],
            }
        for flip, made in candidates.items():
            if all(
                bool((m - s.combined).abs().max() <= TOLERANCE * s.combined.abs().max())
                for m, s in zip(made, steps, strict=True)
            ):
                return flip
        raise FewstepError(
            "this pipeline combines its denoiser's outputs in another way than negative + guidance (prompted - negative); "
            "give learning the model as a plain callable (fewstep.samplers.learn.solve)"
        )

    def _find(self, leaves: Sequence[Any], step: _Step, what: str) -> int:
        k = self._copies
        for at, leaf in enumerate(leaves):
            if what == "sample":
                shape = (k, *step.sample.shape[1:])
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and tuple(leaf.shape) == shape:
                    return at
            else:
                number = isinstance(leaf, (int, float)) and not isinstance(leaf, bool)
                if not number and not (isinstance(leaf, Tensor) and leaf.numel() in (1, k) and leaf.ndim < 2):
                    continue
                value = float(torch.as_tensor(leaf).reshape(-1)[0])
                if any(abs(value * scale - step.timestep) <= 1e-2 * abs(step.timestep) for scale in (1, 1000)):
                    return at
        raise FewstepError(
            f"found no {what} among what the denoiser is called with; give the model as a plain callable"
        )


class _Own:
    """An argument with rows of every sample's own."""

    def __init__(self, values: Tensor) -> None:
        self.values = values  # (n, k, ...)

    def rows(self, which: Tensor) -> Tensor:
        mine = self.values[which]
        return mine.transpose(0, 1).reshape(-1, *mine.shape[2:])


@contextmanager
def _weights_left_out(module: nn.Module) -> Iterator[None]:
    """Without gradients to the weights, which nobody asks for and which would cost as much as those that are."""
    learning = [p for p in module.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def capture(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: Sequence[float],
    call: dict[str, Any] | None = None,
) -> GuidedDenoiser:
    """The pipeline's denoiser with the conditioning of every (prompt, seed, guidance), from a one-step run of each.

    Args:
        pipe: a diffusers pipeline that calls its ``unet`` or ``transformer`` once a step.
        prompts, seeds, guidance: one of each a sample.
        call: further arguments of the pipeline.

    Raises:
        FewstepError: a pipeline that works in another way; the message says in which.
    """
    from fewstep.eval.drawing.batch import borrowed
    from fewstep.eval.drawing.calling import ask
    from fewstep.samplers.schedulers import DPMSolverScheduler

    with borrowed(pipe):
        pipe.scheduler = DPMSolverScheduler.from_config(pipe.scheduler.config)
        with _watching(pipe) as steps:
            for prompt, seed, scale in zip(prompts, seeds, guidance, strict=True):
                generator = [torch.Generator("cpu").manual_seed(seed)]
                ask(pipe, [prompt], generator, steps=1, guidance=scale, call=call)
    return GuidedDenoiser(denoiser_of(pipe), steps, torch.tensor(list(guidance)))
