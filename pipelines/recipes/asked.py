"""What a search is asked for, checked before minutes are spent on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fewstep.errors import FewstepError
from fewstep.pipelines.recipes.applying import RECORD, denoiser
from fewstep.quant import QuantPlan
from fewstep.quant.methods.base import Method


def check(
    pipe: Any,
    *,
    quality: float | None,
    budget: float | None,
    guidance: float | None,
    calls: Sequence[int],
    caches: Sequence[float],
    quants: Sequence[Any] | None,
    minutes: float,
    trajectories: int,
    held_out: int,
) -> None:
    """Raises FewstepError for arguments of :func:`~fewstep.pipelines.tune` that cannot be."""
    if (quality is None) == (budget is None):
        raise FewstepError(f"give quality= or budget=, one of the two; got quality={quality}, budget={budget}")
    bound = quality if quality is not None else budget
    assert bound is not None
    if not 0 < bound < math.inf:
        raise FewstepError(f"{'quality' if quality is not None else 'budget'} is {bound}; give a positive number")
    if guidance is not None and not (isinstance(guidance, int | float) and math.isfinite(guidance)):
        raise FewstepError(f"guidance is {guidance!r}; give one number, or None for the pipeline's own")
    if isinstance(calls, str) or not calls or any(not isinstance(n, int) or n < 1 for n in calls):
        raise FewstepError(f"calls is {calls!r}; give whole numbers of network calls, each at least 1")
    for share in caches:
        if not 0 < share < 1:
            raise FewstepError(f"caches has {share!r}; give shares of the MACs between 0 and 1")
    for config in () if quants is None else quants:
        _check_format(config)
    if not minutes > 0:
        raise FewstepError(f"minutes is {minutes}; give a positive number")
    if trajectories < 3 or held_out < 1:
        raise FewstepError(f"trajectories is {trajectories} and held_out {held_out}; give at least 3 and 1")
    if RECORD in vars(pipe):
        raise FewstepError("the pipeline has a recipe; pipelines.remove_(pipe) before tuning")
    denoiser(pipe)


def _check_format(config: Any) -> None:
    if not isinstance(config, Method | QuantPlan):
        raise FewstepError(f"quants has {config!r:.60}; give configs such as quant.Int8(), or plans")
    needs = ("inputs", "static", "error")
    if any(getattr(config, name, None) for name in needs) and isinstance(config, Method):
        raise FewstepError(
            f"{type(config).__name__} needs calibration data, which a recipe does not keep; quantize_ the network with "
            "it and quant.save it, then tune the rest"
        )
