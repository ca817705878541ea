"""What a picture costs: network calls counted by a hook, wall clock, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError

# Diffusers' names for the network that is called at every step. A pipeline with two of them (a high-noise and a
# low-noise expert) has both counted.
DENOISERS = ("unet", "transformer", "transformer_2")


def denoisers(pipe: Any) -> list[nn.Module]:
    """The networks that a pipeline calls at every step, or the module itself.

    Raises:
        FewstepError: where the object is no module and has none of the known components.
    """
    if isinstance(pipe, nn.Module):
        return [pipe]
    found = [getattr(pipe, name, None) for name in DENOISERS]
    modules = [module for module in found if isinstance(module, nn.Module)]
    if not modules:
        raise FewstepError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}; give the network itself")
    return modules


class CallCounter:
    """Counts the forward calls of a pipeline's denoiser while it is open.

    A step is not a call (Heun makes two), and a call is not an evaluation: with classifier-free guidance most pipelines
    pass the conditional and the unconditional half as one call of batch 2N, others make two calls of N. So both are
    counted, never computed from the number of steps.

    Attributes:
        calls: forward calls.
        samples: network evaluations, the sum of the calls' batch sizes. Equal for both ways of doing guidance.

    Example:
        >>> with CallCounter(pipe) as counter:
        ...     images = pipe(prompts, num_inference_steps=20).images
        >>> counter.nfe_per_image(len(images))  # 40.0: 20 calls, each with both halves of the guidance
    """

    def __init__(self, pipe: Any) -> None:
        self._modules = denoisers(pipe)
        self._handles: list[Any] = []
        self.calls = 0
        self.samples = 0

    def __enter__(self) -> CallCounter:
        self._handles = [module.register_forward_pre_hook(self._count, with_kwargs=True) for module in self._modules]
        return self

    def __exit__(self, *raised: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.samples += _batch(args, kwargs)

    def nfe_per_image(self, images: int) -> float:
        """Network evaluations (each of one sample) for one image: ``samples / images``.

        Raises:
            FewstepError: for fewer than one image.
        """
        if images < 1:
            raise FewstepError(f"NFE per image needs at least 1 image; got {images}")
        return self.samples / images


def _batch(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Batch size of a denoiser's call: that of its first tensor, or the length of a list of single samples."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim > 0:
            return int(value.shape[0])
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return len(value)
    raise FewstepError("a denoiser was called without a tensor that has a batch dimension: nothing to count")


def synchronize() -> None:
    """Wait until the accelerator has done what it was given; without it a clock times the giving. No-op on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


class Timer:
    """Wall clock of a ``with`` block, the device synchronised on both sides.

    Attributes:
        seconds: the time, set when the block ends; 0 before.
    """

    seconds: float = 0.0

    def __enter__(self) -> Timer:
        synchronize()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self._start


@dataclass(frozen=True)
class WallClock:
    """Repeated timings of one thing, seconds each; ``median`` and quartiles because timings have a long right tail."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.times))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.times, (0.25, 0.75))
        return float(low), float(high)


def wall_clock(function: Callable[[], object], warmup: int = 1, repeats: int = 5) -> WallClock:
    """Time ``function()`` ``repeats`` times after ``warmup`` untimed calls, which pay for compilation and allocation.

    Raises:
        FewstepError: for ``repeats`` < 1 or ``warmup`` < 0.
    """
    if repeats < 1 or warmup < 0:
        raise FewstepError(f"repeats is {repeats} and warmup {warmup}; give at least 1 and at least 0")
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        with Timer() as timer:
            function()
        times.append(timer.seconds)
    return WallClock(tuple(times))


def peak_memory() -> dict[str, int]:
    """Peak memory in bytes since the process began (resident) or since :func:`reset_peak_memory` (CUDA).

    The operating system keeps only a lifetime peak of resident memory, so on a CPU run the dearest thing first in a
    process of its own. Windows keeps none that Python reaches; there ``resident`` is left out.
    """
    peak: dict[str, int] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB elsewhere
        peak["resident"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak["cuda_allocated"] = torch.cuda.max_memory_allocated()
        peak["cuda_reserved"] = torch.cuda.max_memory_reserved()
    return peak


def reset_peak_memory() -> None:
    """Start CUDA's peaks anew. No-op on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Cost:
    """What one run of a pipeline costs.

    Attributes:
        images: images made in one run.
        calls: forward calls of the denoiser in one run.
        nfe_per_image: network evaluations for one image; guidance makes two of a step.
        clock: timings of whole runs, text encoder and decoder included.
        peak_memory: bytes by kind, see :func:`peak_memory`.
    """

    images: int
    calls: int
    nfe_per_image: float
    clock: WallClock
    peak_memory: dict[str, int]

    @property
    def seconds_per_image(self) -> float:
        return self.clock.median / self.images


def cost(pipe: Any, prompt: str | list[str], warmup: int = 1, repeats: int = 3, **call: Any) -> Cost:
    """Run ``pipe(prompt=prompt, **call)`` and say what it costs: calls by a hook, wall clock, peak memory.

    Args:
        pipe: a diffusers pipeline.
        prompt: one prompt or a batch of them; ``num_images_per_prompt`` in ``call`` is honoured.
        warmup: untimed runs first.
        repeats: timed runs.
        call: anything else for the pipeline (``num_inference_steps``, ``guidance_scale``, ...).

    Raises:
        FewstepError: where the pipeline has no known denoiser, or for ``repeats`` < 1.
    """
    images = (1 if isinstance(prompt, str) else len(prompt)) * int(call.get("num_images_per_prompt") or 1)

    def run() -> None:
        pipe(prompt=prompt, **call)

    with CallCounter(pipe) as counter:
        run()
    reset_peak_memory()
    clock = wall_clock(run, max(warmup - 1, 0), repeats)  # the counted run has warmed up once
    return Cost(images, counter.calls, counter.nfe_per_image(images), clock, peak_memory())
