"""What a plan costs in quality: against the uncached output of the same seeds, on samples that nothing was fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import applied
from fewstep.caching.plan import CachePlan
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Quality:
    """Held-out errors of a plan.

    Attributes:
        errors: RMS difference of the latents, one a sample.
        macs_share: MACs as a share of computing everything.
        images: pictures with and without the plan, drawn only where a bound asks for them.
    """

    errors: np.ndarray[Any, np.dtype[np.float64]]
    macs_share: float
    images: tuple[Tensor, Tensor] | None = None

    @property
    def latent_rms(self) -> float:
        """Mean of the errors; infinite where one is not finite."""
        return worst(float(self.errors.mean()))

    def values(self, name: str) -> dict[str, float]:
        """The measured value of a bound, by its name."""
        if name == "macs":
            return {"macs": self.macs_share}
        if name == "latent_rms":
            return {"latent_rms": self.latent_rms}
        return {name: picture_quality(name, self.images)}

    def summary(self) -> dict[str, Any]:
        """As provenance keeps it."""
        return {
            "macs_share": round(self.macs_share, 6),
            "latent_rms": round(self.latent_rms, 6),
            "latent_rms_worst": round(float(self.errors.max()), 6),
            **self._interval(),
        }

    def _interval(self) -> dict[str, list[float]]:
        from fewstep.eval import mean_interval

        if len(self.errors) < 2 or not np.isfinite(self.errors).all():
            return {}
        interval = mean_interval(self.errors)
        return {"latent_rms_interval": [round(interval.low, 6), round(interval.high, 6)]}


def worst(error: float) -> float:
    """An error that is no number is the worst one."""
    return error if np.isfinite(error) else float("inf")


def measure(plan: CachePlan, test: Runs, uncached: Tensor, macs_share: float, bound: str = "latent_rms") -> Quality:
    """The quality of a plan on the held-out samples."""
    from fewstep.eval.pairs.latents import latent_rmse

    with applied(test.pipe, plan):
        latents = test.latents()
        drawn = test.images() if bound in ("psnr", "lpips") else None
    try:
        errors = latent_rmse(latents, uncached)
    except FewstepError:  # not finite
        errors = np.full(len(uncached), np.inf)
    return Quality(errors, macs_share, None if drawn is None else (drawn, test.images()))


def picture_quality(name: str, images: tuple[Tensor, Tensor] | None) -> float:
    """PSNR or LPIPS of pictures to those without the plan, on average."""
    from fewstep.eval.pairs import perceptual, pixels

    if images is None:
        raise FewstepError(f"{name} needs pictures, which were not drawn")
    made, reference = images
    if name == "psnr":
        return float(np.mean(pixels.psnr(made, reference)))
    return float(np.mean(perceptual.Lpips()(made, reference)))
