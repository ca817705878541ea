"""Choosing tile sizes by time, apart from the kernels: nothing is timed unless somebody asks for it."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fewstep.errors import FewstepError, unknown
from fewstep.quant.kernels.triton.launch import DEFAULTS, Config, chosen
from fewstep.quant.kernels.triton.support import Capability


def cuda_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of ``call`` on the current CUDA device, by events, after a warm-up that compiles."""
    call()
    torch.cuda.synchronize()
    event: Any = torch.cuda.Event
    times: list[float] = []
    for _ in range(repeats):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def tune(
    kernel: str,
    call: Callable[[], object],
    candidates: Iterable[Config],
    *,
    capability: Capability | None = None,
    clock: Callable[[Callable[[], object]], float] = cuda_seconds,
) -> Config:
    """Time ``call`` with each candidate and keep the fastest for ``kernel`` on this architecture, until the process ends.

    Args:
        kernel: which sizes to choose, a key of ``launch.DEFAULTS``.
        call: what to time, such as ``lambda: int8_linear(x, codes, scale)``.
        candidates: what to try beside the present choice. One that does not compile is passed over.
        capability: of the device; asked of torch if not given.
        clock: seconds that a call takes.

    Returns:
        The fastest.

    Raises:
        FewstepError: for an unknown kernel.
    """
    if kernel not in DEFAULTS:
        raise FewstepError(unknown("kernel to tune", kernel, DEFAULTS))
    if capability is None:
        capability = torch.cuda.get_device_capability()
    place = (kernel, capability)
    before = chosen.get(place, DEFAULTS[kernel])
    times: dict[Config, float] = {}
    try:
        for candidate in dict.fromkeys([before, *candidates]):
            chosen[place] = candidate
            try:
                times[candidate] = clock(call)
            except _out_of_resources():
                continue
    finally:
        chosen[place] = min(times, key=lambda tried: times[tried]) if times else before
    return chosen[place]


def _out_of_resources() -> Any:
    """Triton's error for a tile that needs more registers or shared memory than there are."""
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return ()
    return OutOfResources
