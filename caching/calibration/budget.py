"""Budgets: what a calibrated cache may cost, in work or in quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Budget:
    """Exactly one bound.

    Attributes:
        macs: at most this share of the MACs of computing everything.
        latent_rms: at most this RMS difference of the latents to the uncached ones of the same seeds, on average.
        psnr: at least this many decibels of the images to the uncached ones.
        lpips: at most this LPIPS to them (needs the ``lpips`` package).
    """

    macs: float | None = None
    latent_rms: float | None = None
    psnr: float | None = None
    lpips: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if len(given) != 1:
            raise FewstepError(
                f"a budget has one bound, {', '.join(given) or 'none'} given; one of macs, latent_rms, psnr, lpips"
            )
        name, value = next(iter(given.items()))
        if not value > 0 or (name == "macs" and value > 1):
            raise FewstepError(
                f"budget {name} is {value}; give a {'share above 0, at most 1' if name == 'macs' else 'positive number'}"
            )

    @property
    def name(self) -> str:
        """Which bound it is."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def value(self) -> float:
        """The bound."""
        return float(getattr(self, self.name))

    def met(self, quality: Mapping[str, float]) -> bool:
        """Whether measured numbers keep the bound."""
        measured = quality[self.name]
        return measured >= self.value if self.name == "psnr" else measured <= self.value


def as_budget(budget: Budget | float | None, default: float | None = None) -> Budget:
    """A budget from what users give: one as it is, or a share of the MACs.

    Raises:
        FewstepError: where neither the call nor the method has one.
    """
    if isinstance(budget, Budget):
        return budget
    share = default if budget is None else budget
    if share is None:
        raise FewstepError("give a budget: a share of the MACs such as 0.5, or Budget(latent_rms=...)")
    return Budget(macs=float(share))
