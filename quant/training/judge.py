"""How far a network in training is from the float one, on samples that it is not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewstep.caching.calibration.runs import Runs
from fewstep.eval.costs.calls import denoisers
from fewstep.eval.drawing.batch import borrowed
from fewstep.quant.calibration.calls import Call, Recording
from fewstep.quant.sites import canonical, quantized_layers
from fewstep.quant.state import swap, unwrapped
from fewstep.quant.training.data import samples_apart, split


class Judge:
    """Errors on the samples set apart: of single calls, and of what the sampler ends with.

    Single calls say little about images: training for them makes what is left of the error agree from step to step, and a
    sampler adds it up. So the sampler itself is run where the calls come from a pipeline that this network is part of.

    Args:
        model: quantised; the same object may have its layers replaced by ones in training later.
        original: the float network.
        calls: a recording, or any calls.
    """

    def __init__(self, model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> None:
        self.model = model
        device = next(original.parameters()).device
        _, apart = split(calls)
        self.calls = [calls[i].select(rows).to(device) for i, rows in apart]
        with torch.no_grad():
            self.wanted = [call.run(original).float() for call in self.calls]
        self.runs = _runs(model, calls)
        self.latents = None if self.runs is None else float_latents(model, original, self.runs)

    def noise(self) -> float:
        """Noise to signal of single calls."""
        with torch.no_grad():
            error = sum(
                float((call.run(self.model).float() - want).double().square().sum())
                for call, want in zip(self.calls, self.wanted, strict=True)
            )
        return error / max(sum(float(want.double().square().sum()) for want in self.wanted), 1e-300)

    def drifts(self) -> Tensor | None:
        """(samples,) RMS error of each sample's final latents, in standard deviations of the float network's.

        None where the sampler is not at hand.
        """
        if self.runs is None or self.latents is None:
            return None
        error = (_drawn(self.runs) - self.latents).double().flatten(1).square().mean(1).sqrt()
        return (error / self.latents.double().std().clamp(min=1e-30)).nan_to_num(nan=math.inf)


def float_latents(model: nn.Module, original: nn.Module, runs: Runs) -> Tensor:
    """What the pipeline of ``model`` ends with while its float layers hang in it; (samples, ...) float32 on the CPU."""
    paths = {canonical(path): path for path, _ in original.named_modules()}
    layers = swap(model, {name: original.get_submodule(paths[name]) for name in quantized_layers(model)})
    try:
        return _drawn(runs)
    finally:
        swap(model, layers)


def fell(before: Tensor, after: Tensor) -> bool:
    """Whether errors of the same samples fell by more than the standard error of their mean difference."""
    change = (before - after).double()
    if not bool(torch.isfinite(change).all()):
        return False
    error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else 0.0
    return float(change.mean()) > error


def _drawn(runs: Runs) -> Tensor:
    with borrowed(runs.pipe):
        return runs.latents()


def _runs(model: nn.Module, calls: Sequence[Call]) -> Runs | None:
    """The sampler with the seeds set apart, where it draws with ``model``."""
    apart = sorted(samples_apart(calls))
    if not isinstance(calls, Recording) or not apart:
        return None
    if all(model is not unwrapped(found) for found in denoisers(calls.runs.pipe)):
        return None
    runs = calls.runs
    return replace(runs, prompts=tuple(runs.prompts[i] for i in apart), seeds=tuple(runs.seeds[i] for i in apart))
