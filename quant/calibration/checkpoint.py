"""Finished layers on disk while calibration runs, so that a stopped run goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fewstep.artifact import read_json, read_tensors, write_json, write_tensors
from fewstep.errors import ArtifactError
from fewstep.eval import fingerprint
from fewstep.quant.calibration.calls import Call
from fewstep.quant.plan import QuantPlan

INDEX = "calibration.json"


class Checkpoint:
    """A folder with one file a finished layer; bound to one plan and one set of calls."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    @classmethod
    def open(cls, folder: str | Path, plan: QuantPlan, calls: Sequence[Call]) -> Checkpoint:
        """Start or go on.

        Raises:
            ArtifactError: where the folder belongs to another plan or other calls.
        """
        folder = Path(folder)
        tensors = [(f"{i}.{name}", value) for i, call in enumerate(calls) for name, value in call.tensors()]
        identity = fingerprint.of_json([plan.to_json(), fingerprint.of_tensors(tensors)])
        if (folder / INDEX).exists():
            found = read_json(folder / INDEX, "QuantCalibration", required=("identity",))["identity"]
            if found != identity:
                raise ArtifactError(
                    f"{folder} holds a calibration with another plan or other calls; give another folder"
                )
        else:
            write_json(folder / INDEX, "QuantCalibration", {"identity": identity})
        return cls(folder, identity)

    def _record(self, name: str) -> Path:
        return self.folder / f"{fingerprint.of_json(name)[:16]}.json"

    def has(self, name: str) -> bool:
        return self._record(name).exists()

    def write(self, name: str, arrays: Mapping[str, Tensor]) -> None:
        path = self._record(name)
        digest = write_tensors(path.with_suffix(".safetensors"), arrays)
        write_json(path, "QuantLayerArrays", {"layer": name, "sha256": digest, "arrays": sorted(arrays)})

    def read(self, name: str) -> dict[str, Tensor]:
        path = self._record(name)
        body = read_json(path, "QuantLayerArrays", required=("layer", "sha256", "arrays"))
        return read_tensors(path.with_suffix(".safetensors"), body["sha256"], body["arrays"])
