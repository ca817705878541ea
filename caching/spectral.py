"""Predictors in the frequency domain: a kept difference with its low and high frequencies weighted apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.caching.predictors import Predictor
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class FrequencyDelta(Predictor):
    """F^-1[(w_low 1_{|k| <= r} + w_high 1_{|k| > r}) F d]: the last value, band by band.

    k are whole frequencies of the last two axes, r = min(H, W) // 5. Of FasterCache, arXiv 2410.19355, eq. 6-8.

    Attributes:
        low, high: the weights, where they hold; 1 elsewhere.
        low_until: last step at which ``low`` holds.
        high_from: first step at which ``high`` holds.
    """

    low: float = 1.1
    high: float = 1.1
    low_until: int = 40
    high_from: int = 30
    kind: ClassVar[str] = "frequency"

    def bands(self, computed: int, step: int) -> tuple[float, float]:
        """The weights at ``step`` of a value computed at ``computed``."""
        return self.low if step <= self.low_until else 1.0, self.high if step >= self.high_from else 1.0

    def predict(self, cell: Cell, step: int) -> Any:
        value = cell.history[0]
        value.check(cell.site)
        low, high = self.bands(value.step, step)
        if low == high == 1.0:
            return value.tree()
        return value.tree([_weighted(x, low, high, cell.site) if isinstance(x, Tensor) else x for x in value.leaves])


@dataclass(frozen=True)
class FasterCacheDelta(FrequencyDelta):
    """:class:`FrequencyDelta` as published in code: every reuse multiplies what is kept, so weights compound.

    The exponent of a weight is the number of steps since the value was computed at which it held.
    """

    kind: ClassVar[str] = "faster_cache"

    def bands(self, computed: int, step: int) -> tuple[float, float]:
        since = range(computed + 1, step + 1)
        return (
            self.low ** sum(s <= self.low_until for s in since),
            self.high ** sum(s >= self.high_from for s in since),
        )


def _weighted(x: Tensor, low: float, high: float, site: str) -> Tensor:
    if x.ndim < 4:
        raise FewstepError(f"site {site!r} has values of shape {tuple(x.shape)}; frequencies need maps (..., H, W)")
    height, width = x.shape[-2:]
    radius = min(height, width) // 5
    rows = torch.fft.fftfreq(height, 1 / height, device=x.device)
    columns = torch.fft.rfftfreq(width, 1 / width, device=x.device)
    inside = rows[:, None] ** 2 + columns[None] ** 2 <= radius**2
    spectrum = torch.fft.rfft2(x.float())  # half precision has no transforms of every size
    weighted: Tensor = torch.fft.irfft2(spectrum * torch.where(inside, low, high), s=(height, width))
    return weighted.to(x.dtype)
