"""Chunk files: damage of any kind is found, set aside and told; nothing foreign is taken."""

import random

import pytest
import torch

from fewstep.errors import ArtifactError
from fewstep.eval import fingerprint
from fewstep.eval.sweeps.lock import only_writer, remove_leftovers
from fewstep.eval.sweeps.store import CellStore, Chunk, opened, read_samples, stored_seeds
from tests.eval_fixtures import random_images

IDENTITY = {"scheduler": {"class": "some"}, "steps": 3}


@pytest.fixture
def store(tmp_path) -> CellStore:
    made = CellStore(tmp_path / f"cell-{fingerprint.of_json(IDENTITY)[: fingerprint.SHORT]}", IDENTITY)
    made.describe()
    made.write(Chunk(0, random_images(3), {"seconds": 0.25, "calls": 3}))
    return made


def only_file(store: CellStore):
    (path,) = store.folder.glob("0*.safetensors")
    return path


def test_a_chunk_comes_back(store):
    chunk = store.fetch(0, 2)
    assert torch.equal(chunk.images, random_images(3))
    assert chunk.record == {"seconds": 0.25, "calls": 3}
    assert (chunk.first, chunk.last) == (0, 2)
    assert store.fetch(3, 5) is None
    assert store.redone() == []
    assert stored_seeds(store.folder) == [(0, 2)]


def test_truncation_at_any_length_is_found(store):
    path = only_file(store)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert store.peek(0, 2) is None
        assert store.fetch(0, 2) is None
        assert not path.exists()
    assert store.redone() == ["seeds 0 to 2: the file could not be read; made again"] * 6


def test_no_flipped_bit_gets_through(store):
    """Wherever the flip is, what is returned is what was written, or nothing; only a flip in the padding is harmless."""
    path = only_file(store)
    whole, chunk = path.read_bytes(), store.fetch(0, 2)
    chooser = random.Random(0)
    found = 0
    for _ in range(300):
        position, bit = chooser.randrange(len(whole)), chooser.randrange(8)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
        got = store.peek(0, 2)
        found += got is None
        assert got is None or (torch.equal(got.images, chunk.images) and got.record == chunk.record)
    assert found > 290


def test_a_chunk_of_another_cell_is_foreign(store, tmp_path):
    other = CellStore(tmp_path / "other", IDENTITY | {"steps": 4})
    other.write(Chunk(0, random_images(3, seed=9), {}))
    only_file(other).replace(only_file(store))
    assert store.fetch(0, 2) is None
    assert store.redone() == ["seeds 0 to 2: the file belongs to another configuration; made again"]


def test_a_renamed_chunk_is_foreign(store):
    only_file(store).rename(store.folder / "00000003-00000007.safetensors")
    assert store.fetch(3, 7) is None
    assert "another configuration" in store.redone()[0]


def test_scores_are_kept_for_their_images_and_metrics_only(store):
    scores, seeds, samples = {"metrics": {"fid": {"value": 1.5}}}, range(3), [{"seed": seed} for seed in range(3)]
    store.write_scores(seeds, "key", scores, samples)
    assert store.fetch_scores(seeds, "key") == scores
    assert store.fetch_scores(seeds, "other") is None
    assert store.fetch_scores(range(3, 6), "key") is None
    assert read_samples(store.samples_path(seeds)) == samples
    path = store.folder / "scores-00000000-00000002.json"
    path.write_text(path.read_text().replace("1.5", "1.4"))
    assert store.fetch_scores(seeds, "key") is None
    path.write_text("{")
    assert store.fetch_scores(seeds, "key") is None
    store.write_scores(seeds, "key", scores, samples)
    records = store.samples_path(seeds)
    records.write_text(records.read_text().replace("1", "7"))
    assert store.fetch_scores(seeds, "key") is None
    assert store.fetch_scores(seeds, "key") is None  # and now they are missing
    assert store.redone() == [
        "samples-00000000-00000002.jsonl: its checksum did not match; made again",
        "scores-00000000-00000002.json: its checksum did not match; made again",
        "scores-00000000-00000002.json: the file could not be read; made again",
    ]
    records.write_text("{")
    with pytest.raises(ValueError, match="holds no records of samples"):
        read_samples(records)


def test_a_damaged_description_is_written_anew(store):
    path = store.folder / "cell.json"
    whole = path.read_text()
    for damaged in ("", "[]", whole.replace("some", "none")):
        path.write_text(damaged)
        store.describe()
        assert path.read_text() == whole
    assert len(store.redone()) == 3
    assert opened(store.folder).key == store.key


def test_another_cell_s_description_is_refused(store):
    path = store.folder / "cell.json"
    path.write_text(path.read_text().replace("some", "soma"))
    with pytest.raises(ArtifactError, match="it describes another cell"):
        opened(store.folder)


def test_one_writer_at_a_time(tmp_path):
    with only_writer(tmp_path), pytest.raises(BlockingIOError, match="another sweep is writing"), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / ".00000000-00000001.safetensors.x1y2").write_bytes(b"half")
    with only_writer(tmp_path):
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]
