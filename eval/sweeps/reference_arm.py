"""The reference arm of a sweep: the unaccelerated cell that each one's images are held against, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fewstep.errors import FewstepError, unknown
from fewstep.eval.checks import at_least
from fewstep.eval.drawing.scheduling import DEFAULT_GRID, canonical
from fewstep.eval.pairs.perceptual import FeatureDistance, Lpips
from fewstep.eval.pairs.same_seed import FidelityStream
from fewstep.eval.sweeps.cell import Cell
from fewstep.eval.sweeps.transforms import NONE

SAME = "same"
KEYS = ("reference", "lpips", "features")


@dataclass(frozen=True)
class ReferenceArm:
    """Which cell is the reference of which, and what is measured between the two.

    Attributes:
        reference: as it was asked for; it stands in recipes.
        scheduler: of the reference, on the spec's own grid; None for each cell's own scheduler and grid.
        steps: of the reference; None for each cell's own.
        lpips: as in :func:`fewstep.eval.fidelity`.
        features: as there.
    """

    reference: str = SAME
    scheduler: str | None = None
    steps: int | None = None
    lpips: Any = None
    features: Any = None

    def of(self, cell: Cell) -> Cell:
        """The reference of a cell: same model, guidance and seeds, neither cache nor quantisation. Of itself, itself."""
        changes: dict[str, Any] = {"cache": NONE, "quant": NONE}
        if self.scheduler is not None:
            changes |= {"scheduler": self.scheduler, "grid": DEFAULT_GRID}
        if self.steps is not None:
            changes["steps"] = self.steps
        return replace(cell, **changes)

    @cached_property
    def _networks(self) -> tuple[Lpips | None, FeatureDistance | None]:
        features = self.features
        if features is not None and not isinstance(features, FeatureDistance):
            features = FeatureDistance(features)
        lpips = self.lpips
        return (lpips if lpips is None or isinstance(lpips, Lpips) else Lpips(lpips)), features

    def stream(self) -> FidelityStream:
        """What a cell's images and references are fed to.

        Raises:
            FewstepError: for an unknown network, or weights that are not installed.
        """
        return FidelityStream(*self._networks)

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        titles = [None if net is None else net.title for net in self._networks]
        return dict(zip(KEYS, [self.reference, *titles], strict=True))


def make_arm(given: Any) -> ReferenceArm | None:
    """The reference arm as a sweep was given it.

    Args:
        given: ``"same"``: each cell's own scheduler, grid and steps, without its cache and quantisation. ``"same@100"``: the
            same at 100 steps. ``"DDIM@100"``: that scheduler at 100 steps, ``"DDIM"`` at each cell's own. Or a table with
            this text under ``reference``, and ``lpips`` or ``features`` as in :func:`fewstep.eval.fidelity`. None for none.

    Raises:
        FewstepError: for anything else, or an unknown scheduler.
    """
    if given is None:
        return None
    table = {"reference": given} if isinstance(given, str) else given
    if not isinstance(table, Mapping):
        raise FewstepError(f"fidelity is {given!r}; give 'same', a scheduler such as 'DDIM@100', or a table")
    for key in table:
        if key not in KEYS:
            raise FewstepError(unknown("key in fidelity", key, KEYS))
    text = table.get("reference", SAME)
    if not isinstance(text, str):
        raise FewstepError(f"the reference of fidelity is {text!r}; give 'same' or a scheduler such as 'DDIM@100'")
    spec, steps = _split(text)
    scheduler = None if spec == SAME else canonical(spec)
    said = (scheduler or SAME) + ("" if steps is None else f"@{steps}")
    return ReferenceArm(said, scheduler, steps, table.get("lpips"), table.get("features"))


def _split(text: str) -> tuple[str, int | None]:
    """``"DDIM@100"`` to its scheduler and steps; an option of the scheduler may hold an @ as well."""
    spec, at, count = text.rpartition("@")
    if not at or ")" in count:
        return text.strip(), None
    if not (count.strip().isascii() and count.strip().isdigit() and len(count) < 10):
        raise FewstepError(f"the reference of fidelity is {text!r}; behind the @ give a number of steps")
    at_least("steps of the reference", int(count), 1)
    return spec.strip(), int(count)
