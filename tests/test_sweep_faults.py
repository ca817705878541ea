"""Sweeps on bad disks: whatever file is damaged and whenever the disk is full, nothing wrong is told and nothing is lost."""

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.errors import ArtifactError
from fewstep.eval import Fid, Results, Sweep
from fewstep.eval.sweeps import manifest
from fewstep.eval.sweeps.state import status
from fewstep.eval.sweeps.store import opened, stored_seeds
from tests.eval_fixtures import random_images, tiny_features, tiny_unconditional


@pytest.fixture(scope="module")
def sweep():
    """One cell, 5 images in three batches."""
    metric = Fid(random_images(20), tiny_features())
    return Sweep(tiny_unconditional(), ["diffusers:DDIMScheduler"], [1], samples=5, batch_size=2, metrics=[metric])


@pytest.fixture(scope="module")
def whole(sweep, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    sweep.run(out, progress=False)
    return out


def told(results: Results) -> list:
    """Everything in the rows but the clock, the memory, and what was repaired."""
    return [
        (row.cell, row.status, row.folder, row.samples, row.calls, row.nfe_per_image, row.metrics)
        for row in results.rows
    ]


def images(out: Path) -> dict[tuple[int, int], torch.Tensor]:
    """The chunks of the only cell that are whole."""
    (folder,) = (out / "cells").iterdir()
    store = opened(folder)
    chunks = {seeds: store.peek(*seeds) for seeds in stored_seeds(folder)}
    return {seeds: chunk.images for seeds, chunk in chunks.items() if chunk is not None}


def assert_same_images(a: Path, b: Path) -> None:
    first, second = images(a), images(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def truncated(data: bytes, chooser: random.Random) -> bytes:
    return data[: chooser.randrange(len(data))]


def flipped(data: bytes, chooser: random.Random) -> bytes:
    position = chooser.randrange(len(data))
    return data[:position] + bytes([data[position] ^ (1 << chooser.randrange(8))]) + data[position + 1 :]


FILES = {
    "chunk": "cells/*/00000002-*.safetensors",
    "description": "cells/*/cell.json",
    "scores": "cells/*/scores-*.json",
    "samples": "cells/*/samples-*.jsonl",
    "manifest": "manifest.json",
    "results": "results.json",
    "macs": "macs/*.json",
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("damage", [truncated, flipped])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_and_repaired(sweep, whole, tmp_path, file, damage, seed):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (victim,) = out.glob(FILES[file])
    before = victim.read_bytes()
    victim.write_bytes(damage(before, random.Random(seed)))

    # Before the repair a reader tells what was written, or that the file is damaged.
    try:
        assert told(Results.load(out)) == told(Results.load(whole))
    except ArtifactError:
        assert file == "results"
    assert manifest.load(out) in ({}, manifest.load(whole))
    try:
        found, expected = images(out), images(whole)
        assert all(torch.equal(found[key], expected[key]) for key in found)
        (folder,) = (out / "cells").iterdir()
        (reference,) = (whole / "cells").iterdir()
        assert opened(folder).samples(range(5)) == opened(reference).samples(range(5))
    except ArtifactError:
        assert file in ("description", "scores", "samples")

    again = sweep.run(out, progress=False)
    assert told(again) == told(Results.load(whole))
    assert_same_images(out, whole)
    assert (status(out).planned, len(status(out).rows)) == (1, 1)
    assert Results.load(out) == again
    sessions = manifest.load(out)["sessions"]
    if file != "manifest" or victim.with_name(manifest.DAMAGED).exists():
        assert sessions[-1]["status"] == "finished"
    if (
        file == "manifest" and len(sessions) == 1
    ):  # the account of the first run is not in the new one, but not thrown away
        assert victim.with_name(manifest.DAMAGED).exists()


def test_nan_in_a_manifest_is_damage_and_no_traceback(whole, tmp_path):
    """Python reads NaN in JSON, and nothing that has a checksum here holds one."""
    text = (whole / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"samples": 5', '"samples": NaN'))
    assert "NaN" in (tmp_path / "manifest.json").read_text()
    assert manifest.load(tmp_path) == {}
    with pytest.raises(ArtifactError, match="holds no manifest"):
        status(tmp_path)


class FullDisk:
    """``os.replace`` or ``os.fsync`` that fails at its k-th call, and from then on where ``stays`` is set."""

    def __init__(self, monkeypatch, name: str, k: int, stays: bool) -> None:
        self.calls, self.hit = 0, False
        real = getattr(os, name)

        def call(*arguments):
            self.calls += 1
            if self.calls == k or (stays and self.calls > k):
                self.hit = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(("name", "stays"), [("replace", True), ("replace", False), ("fsync", True)])
def test_a_full_disk_at_any_write_loses_nothing(sweep, whole, tmp_path, name, stays):
    expected = told(Results.load(whole))
    for k in range(1, 100):
        out = tmp_path / str(k)
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, name, k, stays)
            try:
                sweep.run(out, progress=False)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 - not every run raises: the last ones have no k-th write
        if not disk.hit:
            break
        assert not [path for path in out.rglob(".*") if path.name != ".lock"]  # nothing half-written takes up room
        done = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/0*.safetensors")}
        if (out / "results.json").exists():
            assert told(Results.load(out)) == expected
        again = sweep.run(out, progress=False)
        assert told(again) == expected
        assert_same_images(out, whole)
        assert all(path.stat().st_mtime_ns == changed for path, changed in done.items())  # nothing was made twice
    # The count of MACs, three chunks, description, samples, scores, two results, and the manifest at the start, with the
    # model, with the cell, after it and at the end. A sync of the file and one of its folder for each but the chunks,
    # which have one each and one for their folder together, before the scores are written.
    assert k - 1 == (14 if name == "replace" else 2 * (14 - 3) + 3 + 1)
