"""Methods that need no data, at a budget: what a calibrated plan is held against, and what it may turn out to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from fewstep.caching.calibration.budget import Budget
from fewstep.caching.calibration.knobs import Meter, turn
from fewstep.caching.calibration.quality import Quality
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.method import Method
from fewstep.caching.methods.interval import FORA, Interval
from fewstep.caching.methods.taylorseer import TaylorSeer
from fewstep.caching.methods.uncond import CFGCache, UncondReuse
from fewstep.caching.plan import CachePlan
from fewstep.caching.predictors import Extrapolate
from fewstep.errors import FewstepError


def of_site(site: str, depth: int) -> list[Method]:
    """Intervals of a site, held and extrapolated."""
    return [Interval(at=(site,)), *(Interval(at=(site,), predict=Extrapolate(order)) for order in range(1, depth))]


def of_all_sites(depth: int) -> list[Method]:
    """Published methods; those that a model has no sites for are left out when they are tried."""
    return [
        *(TaylorSeer(order=order, first_enhance=order + 1, lite=True) for order in range(1, max(depth, 2))),
        TaylorSeer(order=1, first_enhance=2),
        FORA(),
        UncondReuse(),
        CFGCache(),
    ]


def plain_plans(
    test: Runs,
    budget: Budget,
    uncached: Tensor,
    methods: Sequence[Method],
    tick: Callable[[str], None],
) -> Iterator[tuple[str, tuple[CachePlan, Quality]]]:
    """Each at the setting that makes the most of the budget, by name, with its quality on the samples held out."""
    from fewstep.eval.costs.calls import denoisers

    meter = Meter(denoisers(test.pipe)[0])
    for plain in methods:
        try:
            plan, quality = turn(plain, budget, test, tick, uncached, meter)
        except FewstepError:  # it has no sites here, no guidance to save on, or no setting that is cheap enough
            continue
        yield plan.method, (plan, quality)
