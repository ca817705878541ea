"""What one image executes, counted once for all cells that execute alike, and remembered in the sweep's folder.

Counting runs the network with Python told of every operator; on a small sweep it would cost as much as the images do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep import artifact
from fewstep.errors import ArtifactError
from fewstep.eval import fingerprint
from fewstep.eval.costs.mac_count import MacCounter
from fewstep.eval.sweeps.cell import Cell, Setting
from fewstep.eval.sweeps.results import CHECKSUM, checked
from fewstep.eval.sweeps.transforms import NONE

FOLDER = "macs"
KIND = "mac count"
_ALIKE = ("pipeline", "model", "call", "device", "versions", "quant")


@dataclass(frozen=True)
class MacCount:
    """What was counted, for one image.

    Attributes:
        macs: multiply-accumulates that the denoiser executed.
        evaluations: network evaluations.
        effective: the same, each weighted with its share of a full pass.
    """

    macs: float
    evaluations: float
    effective: float

    @classmethod
    def of(cls, counter: MacCounter, images: int) -> MacCount:
        evaluations = sum(call.batch for call in counter.calls)
        return cls(counter.executed / images, evaluations / images, counter.effective_nfe_per_image(images))

    def record(self, evaluations: float) -> dict[str, float]:
        """For a record of images that took so many evaluations each, all of them like those that were counted."""
        share = evaluations / self.evaluations
        return {"macs": self.macs * share, "effective_evaluations": self.effective * share}


class MacMemory:
    """The counts of a sweep's folder, one file each; a damaged one is as good as none.

    Args:
        setting: what the cells share.
        networks: how many denoisers the pipeline has.
    """

    def __init__(self, setting: Setting, networks: int) -> None:
        self._setting, self._networks = setting, networks

    def fetch(self, cell: Cell) -> MacCount | None:
        try:
            body = artifact.read_json(self._path(cell), KIND, ("macs", "evaluations", "effective", CHECKSUM))
            return MacCount(**body) if checked(body) else None
        except (ArtifactError, TypeError):
            return None

    def keep(self, cell: Cell, count: MacCount) -> None:
        body = asdict(count)
        artifact.write_json(self._path(cell), KIND, {**body, CHECKSUM: fingerprint.of_json(body)})

    def _path(self, cell: Cell) -> Path:
        return self._setting.out / FOLDER / f"{fingerprint.of_json(self._key(cell))[: fingerprint.SHORT]}.json"

    def _key(self, cell: Cell) -> dict[str, Any]:
        """What decides what an evaluation executes: without a cache, and with one network, none depends on its time."""
        identity = self._setting.identity(cell)
        if cell.cache != NONE or self._networks > 1:
            return {**identity, "seed": cell.seed}
        return {key: identity.get(key) for key in _ALIKE} | {"guided": cell.guidance > 1}
