"""TaylorSeer and HiCache: features are forecast from their last few computed values instead of held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.caching.families import Family
from fewstep.caching.method import Method, check_interval, steps_table
from fewstep.caching.methods.interval import all_branches, every
from fewstep.caching.methods.online import whole_stack
from fewstep.caching.plan import Actions
from fewstep.caching.predictors import Extrapolate, Hermite, Predictor, Taylor
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class TaylorSeer(Method):
    """All attention and feed-forward outputs, computed every ``interval`` steps and extrapolated in between.

    It keeps ``order + 1`` values of every site. Orders of 2 and more amplify what does not extrapolate: at an interval n the
    weights of a degree k are of size n^k. From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv
    2503.06923.

    Attributes:
        interval: steps from one computed in full to the next; the authors' FLUX runs use 6.
        order: degree of the forecast, 0 holds.
        first_enhance: steps computed at the start.
        lite: whether the whole stack is one site, whose residual is forecast: a tenth of the memory or less.
        exact: whether the polynomial through the kept values is taken, not the published sum with backward differences for
            derivatives. The two are equal for orders 0 and 1.
    """

    knob: ClassVar[str | None] = "interval"
    interval: int = 4
    order: int = 1
    first_enhance: int = 3
    lite: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        check_interval(self.interval)
        check_interval(self.first_enhance, "first_enhance")
        assert self.predictor is not None  # an order that there is not is refused here

    @property
    def predictor(self) -> Predictor:
        return Extrapolate(self.order) if self.exact else Taylor(self.order)

    def sites(self, family: Family) -> list[str]:
        name = type(self).__name__
        return [whole_stack(family, name)] if self.lite else all_branches(family, name)

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        return steps_table(every(steps, self.interval, self.first_enhance), len(sites))


@dataclass(frozen=True)
class HiCache(TaylorSeer):
    """:class:`TaylorSeer` with Hermite polynomials in the forecast, see :class:`~fewstep.caching.Hermite`.

    HiCache: A Plug-in Scaled-Hermite Upgrade for Taylor-Style Cache-then-Forecast Diffusion Acceleration, arXiv 2508.16984.

    Attributes:
        sigma: scale of the polynomials' argument and of the differences.
    """

    order: int = 2
    sigma: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exact:
            raise FewstepError("HiCache has its own forecast; exact=True is TaylorSeer's")

    @property
    def predictor(self) -> Predictor:
        return Hermite(self.order, self.sigma)
