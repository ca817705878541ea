"""A sweep shared by several processes: the images and scores of one, and no silence where one of them dies."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch

from fewstep.errors import ArtifactError
from fewstep.eval import Moments, Results
from fewstep.eval.sweeps.processes import Processes, ProcessLost, _portable, joined
from fewstep.eval.sweeps.store import opened, stored_seeds
from tests.eval_fixtures import SCHEDULERS, killer, tiny_features, tiny_sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")


IMPORTED = [
    "tests.eval_fixtures", "fewstep.eval.sweeps.run", "fewstep.eval.metrics", "accelerate", "scipy.stats",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip.modeling_clip",
]  # fmt: skip


def small_sweep(**changes):
    """Two cells of 7 images in batches of 2: four batches, which neither 2 nor 3 processes share evenly with the last."""
    return tiny_sweep(**{"schedulers": SCHEDULERS[:1], "steps": (2, 3), "samples": 7} | changes)


@pytest.fixture(scope="module")
def start():
    """Start processes as a launcher does, by environment variables; forked from one that has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)

    def started(function, count, *arguments) -> list[int]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        processes = [
            context.Process(target=launched, args=(rank, count, port, function, *arguments)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        hanging = [process for process in processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        assert not hanging
        return [process.exitcode for process in processes]

    return started


def launched(rank, count, port, function, *arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    function(rank, *arguments)


def run_and_tell(rank, out):
    results = small_sweep().run(out, progress=False)
    (Path(out) / f"process-{rank}.json").write_text(json.dumps(told(results)))


def told(results: Results) -> list:
    """Everything in the rows but the clock and the memory."""
    return [
        [row.steps, row.status, row.folder, row.samples, row.calls, row.nfe_per_image, row.metrics]
        for row in results.rows
    ]


def images(out: Path) -> dict[tuple[str, int], torch.Tensor]:
    """The chunks by cell and first seed."""
    return {
        (folder.name, first): opened(folder).peek(first, last).images
        for folder in sorted((out / "cells").iterdir())
        for first, last in stored_seeds(folder)
    }


def moments(found: dict[tuple[str, int], torch.Tensor]) -> Moments:
    features = torch.cat([tiny_features()(chunk.float() / 255) for chunk in found.values()])
    return Moments.of(features)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the others: all must sum in the same order
    results = small_sweep().run(out, progress=False)
    torch.set_num_threads(threads)
    return out, results


@pytest.mark.parametrize("count", [2, 3])
def test_images_moments_and_scores_are_those_of_one_process(start, alone, tmp_path, count):
    whole, results = alone
    assert start(run_and_tell, count, tmp_path) == [0] * count
    expected, found = images(whole), images(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert moments(found).fingerprint == moments(expected).fingerprint
    assert told(Results.load(tmp_path)) == told(results)
    for rank in range(count):
        assert json.loads((tmp_path / f"process-{rank}.json").read_text()) == told(results)
    (session,) = json.loads((tmp_path / "manifest.json").read_text())["sessions"]
    assert session["status"] == "finished"


def die_while_drawing(rank, out, victim):
    sweep = small_sweep()
    if rank == victim:
        sweep.model.unet.register_forward_pre_hook(killer(5))  # 2 calls of a rehearsal, 2 a batch: in its second
    with pytest.raises(ProcessLost, match="another process of the sweep died"):
        sweep.run(out, progress=False)
    sys.exit(7)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_and_the_next_run_goes_on(start, alone, tmp_path, victim):
    whole, results = alone
    codes = start(die_while_drawing, 2, tmp_path, victim)
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [7]
    before = images(tmp_path)
    assert 0 < len(before) < len(images(whole))
    again = small_sweep().run(tmp_path, progress=False)
    assert told(again) == told(results)
    assert all(row.redone == [] for row in again.rows)


def break_in_one(rank, out):
    """A cell that fails in the second process alone is failed for both, and the next one is drawn."""
    sweep = small_sweep(metrics=())
    calls = iter(range(100))

    def out_of_memory(*_):
        if rank == 1 and next(calls) < 2:  # of the rehearsal, whose failure is not told, and of the batch
            raise RuntimeError("out of memory")

    sweep.model.unet.register_forward_pre_hook(out_of_memory)
    rows = sweep.run(out, progress=False).rows
    assert [(row.status, row.error) for row in rows] == [("failed", "RuntimeError: out of memory"), ("ok", "")]


def test_a_cell_that_fails_in_one_process_is_failed_in_all(start, tmp_path):
    assert start(break_in_one, 2, tmp_path) == [0, 0]


def refuse(rank, out):
    with pytest.raises(BlockingIOError if rank == 0 else OSError, match="another sweep is writing"):
        small_sweep().run(out, progress=False)


def test_what_the_main_process_refuses_is_refused_by_all(start, tmp_path):
    from fewstep.eval.sweeps.lock import only_writer

    with only_writer(tmp_path):
        assert start(refuse, 2, tmp_path) == [0, 0]


def test_one_process_alone_needs_no_launcher():
    with joined() as processes:
        assert (processes.rank, processes.count, processes.main) == (0, 1, True)
        assert processes.gathered("value") == ["value"]
        assert processes.from_main(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError), Processes().together():
        _ = 1 / 0


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def test_an_error_travels_as_itself_or_as_its_text():
    assert isinstance(_portable(ArtifactError("lost")), ArtifactError)
    assert _portable(OSError(28, "No space left on device")).errno == 28
    copy = _portable(Unpicklable("a", "b"))
    assert type(copy) is RuntimeError
    assert str(copy) == "Unpicklable: a and b"
