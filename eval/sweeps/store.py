"""The images of one cell on disk: one atomic, checksummed file a batch of seeds.

    DIR/cells/<name>-<key>/cell.json                             the cell's identity, for people
    DIR/cells/<name>-<key>/scores-00000000-00000499.json         scores of these seeds; made again when images or metrics change
    DIR/cells/<name>-<key>/samples-00000000-00000499.jsonl       one line a sample: seed, prompt, hash, its own scores
    DIR/cells/<name>-<key>/00000000-00000049.safetensors         images of seeds 0 to 49, and how they were made
    DIR/cells/<name>-<key>/quarantine/...                        damaged files, kept as evidence; they are made again

A file is whole or absent (see ``artifact``), its checksum covers images and record, and it names its cell. So a sweep
goes on from whatever is there, and nothing that another configuration made is taken for its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from fewstep import artifact
from fewstep.errors import ArtifactError
from fewstep.eval import fingerprint

SUFFIX = ".safetensors"
QUARANTINE = "quarantine"


class DamagedChunk(Exception):
    """A chunk file that is not what was written; ``str()`` is one word for why: unreadable, foreign or checksum."""


@dataclass(frozen=True)
class Chunk:
    """Images of the seeds ``first .. first + n - 1`` of a cell.

    Attributes:
        first: the first seed.
        images: uint8 (n, C, H, W) on the CPU.
        record: how they were made (seconds, calls, evaluations, the times visited); JSON values only.
        latents: float32 (n, ...) on the CPU, what they were decoded from; None where nobody asked for them.
    """

    first: int
    images: Tensor
    record: dict[str, Any]
    latents: Tensor | None = None

    @property
    def sha256(self) -> str:
        """Hash of the images, their record and their latents."""
        return _checksum(self.images, fingerprint.canonical_json(self.record), self.latents)

    @property
    def last(self) -> int:
        return self.first + len(self.images) - 1


class CellStore:
    """The chunks of one cell.

    Args:
        folder: the cell's folder; made when something is written.
        identity: what the images depend on; its hash is the cell's key.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = identity
        self.key = fingerprint.of_json(identity)

    def describe(self) -> None:
        """Write the identity beside the chunks; a description that does not fit is set aside first."""
        described = self._read_json("cell", "cell", ("identity",))
        if described is not None and fingerprint.of_json(described["identity"]) == self.key:
            return
        if described is not None:
            self._set_aside(self.folder / "cell.json", "foreign")
        artifact.write_json(self.folder / "cell.json", "cell", {"identity": self.identity})

    def write_scores(self, seeds: range, key: str, scores: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
        """Keep the scores, and those of the single samples, of the images and metrics whose hash is ``key``."""
        lines = "".join(f"{fingerprint.canonical_json(sample)}\n" for sample in samples).encode()
        artifact.write_bytes(self.samples_path(seeds), lines)
        body = {
            "key": key,
            "scores": scores,
            "sha256": fingerprint.of_json(scores),
            "samples_sha256": hashlib.sha256(lines).hexdigest(),
        }
        artifact.write_json(self.folder / f"{_scores(seeds)}.json", "scores", body)

    def fetch_scores(self, seeds: range, key: str) -> dict[str, Any] | None:
        """The scores kept under ``key``; None where there are none, or they are of other images or metrics."""
        name = _scores(seeds)
        kept = self._read_json(name, "scores", ("key", "scores", "sha256", "samples_sha256"))
        if kept is None or kept["key"] != key:
            return None
        scores: dict[str, Any] = kept["scores"]
        if kept["sha256"] != fingerprint.of_json(scores):
            self._set_aside(self.folder / f"{name}.json", "checksum")
            return None
        samples = self.samples_path(seeds)
        if not samples.exists():
            return None
        if hashlib.sha256(samples.read_bytes()).hexdigest() != kept["samples_sha256"]:
            self._set_aside(samples, "checksum")
            return None
        return scores

    def samples(self, seeds: range) -> list[dict[str, Any]]:
        """The records of the single samples of ``seeds``, as they were written with their scores.

        Raises:
            ArtifactError: where the file is missing or damaged.
        """
        path = self.samples_path(seeds)
        records = read_samples(path)
        kept = artifact.read_json(
            self.folder / f"{_scores(seeds)}.json", "scores", ("key", "scores", "sha256", "samples_sha256")
        )
        if hashlib.sha256(path.read_bytes()).hexdigest() != kept["samples_sha256"]:
            raise ArtifactError(f"{path} is damaged; run the sweep again to have it written anew")
        return records

    def samples_path(self, seeds: range) -> Path:
        """Where the records of the single samples of ``seeds`` are."""
        return self.folder / f"samples-{_span(seeds)}.jsonl"

    def _read_json(self, name: str, kind: str, keys: Sequence[str]) -> dict[str, Any] | None:
        """A JSON file of the cell; None where there is none. One that is damaged is set aside."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            return artifact.read_json(path, kind, keys)
        except ArtifactError:
            self._set_aside(path, "unreadable")
            return None

    def write(self, chunk: Chunk) -> None:
        """Write one chunk, atomically; it survives a power cut once :meth:`sync` was called."""
        record = fingerprint.canonical_json(chunk.record)
        metadata = {"key": self.key, "record": record, "sha256": chunk.sha256}
        path = self._path(chunk.first, chunk.last)
        tensors = {"images": chunk.images} | ({} if chunk.latents is None else {"latents": chunk.latents})
        packed = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
        artifact.write_bytes(path, packed, durable=False)  # its checksum tells what a power cut left of it

    def sync(self, batches: Iterable[range]) -> None:
        """Wait until the chunks of these seeds are on the disk; once a cell, since waiting costs more than drawing small ones."""
        for seeds in batches:
            artifact.sync(self._path(seeds[0], seeds[-1]))
        if os.name == "posix":
            artifact.sync(self.folder)

    def fetch(self, first: int, last: int) -> Chunk | None:
        """The chunk of these seeds; None where it must be made (again), a damaged file being set aside."""
        path = self._path(first, last)
        if not path.exists():
            return None
        try:
            return self._read(path, first, last)
        except DamagedChunk as damage:
            self._set_aside(path, str(damage))
            return None

    def peek(self, first: int, last: int) -> Chunk | None:
        """The chunk of these seeds for showing; None where it is missing or damaged, which is left as it is."""
        try:
            return self._read(self._path(first, last), first, last)
        except DamagedChunk:
            return None

    def redone(self) -> list[str]:
        """What was found damaged here and made again, one line each."""
        folder = self.folder / QUARANTINE
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return [_explain(path.name) for path in found]

    def sha256(self, seeds: range) -> str | None:
        """The hash that the chunk of these seeds says it has, without reading its images; None where there is none."""
        try:
            with safe_open(str(self._path(seeds[0], seeds[-1])), framework="pt") as file:
                return (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None

    def has(self, seeds: range) -> bool:
        """Whether there is a chunk file of these seeds; whole or not only :meth:`fetch` finds out."""
        return self._path(seeds[0], seeds[-1]).exists()

    def _path(self, first: int, last: int) -> Path:
        return self.folder / f"{_span(range(first, last + 1))}{SUFFIX}"

    def _read(self, path: Path, first: int, last: int) -> Chunk:
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                images = file.get_tensor("images")
                latents = file.get_tensor("latents") if "latents" in file.keys() else None  # noqa: SIM118 - no mapping
            record = metadata["record"]
            key, sha256 = metadata["key"], metadata["sha256"]
        except (OSError, SafetensorError, KeyError) as error:
            raise DamagedChunk("unreadable") from error
        if sha256 != _checksum(images, record, latents):
            raise DamagedChunk("checksum")
        if key != self.key or len(images) != last - first + 1:
            raise DamagedChunk("foreign")
        return Chunk(first, images, json.loads(record), latents)

    def _set_aside(self, path: Path, why: str) -> None:
        folder = self.folder / QUARANTINE
        folder.mkdir(parents=True, exist_ok=True)
        taken = len(list(folder.iterdir()))
        path.replace(folder / f"{path.stem}--{why}--{taken + 1}{path.suffix}")


def opened(folder: Path) -> CellStore:
    """The store of a cell's folder as its description says.

    Raises:
        ArtifactError: where the description is missing or damaged.
    """
    store = CellStore(folder, artifact.read_json(folder / "cell.json", "cell", ("identity",))["identity"])
    if not folder.resolve().name.endswith(store.key[: fingerprint.SHORT]):
        raise ArtifactError(f"{folder / 'cell.json'} is damaged: it describes another cell; run the sweep again")
    return store


def stored_seeds(folder: Path) -> list[tuple[int, int]]:
    """First and last seed of every chunk file in a cell's folder, in order, the longer first."""
    names = (path.stem.split("-") for path in folder.glob(f"[0-9]*-[0-9]*{SUFFIX}"))
    return sorted(((int(first), int(last)) for first, last in names), key=lambda seeds: (seeds[0], -seeds[1]))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The records of the single samples of a cell, in the order of their seeds.

    Raises:
        ArtifactError: where the file is missing or damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} holds no records of samples: {error}") from error


def _span(seeds: range) -> str:
    return f"{seeds[0]:08d}-{seeds[-1]:08d}"


def _scores(seeds: range) -> str:
    return f"scores-{_span(seeds)}"


def _checksum(images: Tensor, record: str, latents: Tensor | None) -> str:
    digest = hashlib.sha256(f"{tuple(images.shape)}|{images.dtype}|{record}|".encode())
    digest.update(fingerprint.tensor_bytes(images))
    if latents is not None:
        digest.update(f"{tuple(latents.shape)}|{latents.dtype}|".encode())
        digest.update(fingerprint.tensor_bytes(latents))
    return digest.hexdigest()


_REASONS = {
    "unreadable": "the file could not be read",
    "foreign": "the file belongs to another configuration",
    "checksum": "its checksum did not match",
}


def _explain(name: str) -> str:
    stem, why, _ = Path(name).stem.split("--")
    what = (
        "seeds " + " to ".join(str(int(seed)) for seed in stem.split("-")) if stem[0].isdigit() else _named(name, stem)
    )
    return f"{what}: {_REASONS.get(why, why)}; made again"


def _named(name: str, stem: str) -> str:
    return f"{stem}{Path(name).suffix}"
