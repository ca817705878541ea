"""Sweeps: killed and resumed, damaged, extended, changed, failing; always the same images and an honest account."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.eval import CallCounter, Fid, Results, Sweep
from fewstep.eval.sweeps.lock import only_writer
from fewstep.eval.sweeps.store import opened, stored_seeds
from tests import eval_fixtures
from tests.eval_fixtures import PROMPTS, SCHEDULERS, random_images, tiny_features, tiny_pipeline, tiny_sweep


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The killed process and this one must sum in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Results]:
    """A sweep that was never disturbed; tests only read it."""
    out = tmp_path_factory.mktemp("finished")
    return out, tiny_sweep().run(out, progress=False)


def images(out: Path) -> dict[tuple[str, int, int], torch.Tensor]:
    """All images of all cells, by the cell's folder (whose name ends in the identity's hash) and seeds."""
    found = {}
    for folder in sorted((out / "cells").iterdir()):
        store = opened(folder)
        for first, last in stored_seeds(folder):
            found[folder.name, first, last] = store.peek(first, last).images
    return found


def assert_same_images(a: Path, b: Path) -> None:
    first, second = images(a), images(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def scores(results: Results) -> list:
    """Everything in the rows but the clock."""
    return [(row.scheduler, row.steps, row.status, row.folder, row.samples, row.calls, row.nfe_per_image, row.metrics)
            for row in results.rows]  # fmt: skip


def test_every_cell_is_drawn_measured_and_counted(finished):
    _, results = finished
    first = results.rows[0]
    assert [(row.scheduler, row.steps) for row in results.rows] == [(s, n) for s in SCHEDULERS for n in (2, 3)]
    for row in results.rows:
        assert row.status == "ok"
        assert row.samples == 6
        calls = row.steps if "DDIM" in row.scheduler else 2 * row.steps - 1  # Heun: two calls a step but the last
        assert (row.calls, row.nfe_per_image) == (calls, 2 * calls)  # guidance: both halves in one call
        assert row.seconds_per_image > 0
        assert row.effective_nfe_per_image == row.nfe_per_image  # nothing was skipped
        assert row.macs_per_image == row.nfe_per_image / first.nfe_per_image * first.macs_per_image > 0
        assert row.peak_bytes > 2**20
        assert row.metrics["fid"]["n"] == row.metrics["clip_score"]["n"] == 6
        assert row.metrics["fid"]["recipe"].startswith("fid[Sequential:")
    assert results.failed == ()


def test_results_are_written_for_tables_and_for_programs(finished):
    out, results = finished
    assert Results.load(out) == results
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scheduler"] for row in rows] == [row.scheduler for row in results.rows]
    assert [float(row["fid"]) for row in rows] == [row.value("fid") for row in results.rows]


def test_the_manifest_holds_what_was_run(finished):
    out, results = finished
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sweep"]["seeds"] == [0, 5]
    assert manifest["sweep"]["first_prompts"] == [*PROMPTS, PROMPTS[0]]
    (session,) = manifest["sessions"]
    assert session["status"] == "finished"
    assert session["started"] <= session["ended"]
    assert session["environment"]["libraries"]["torch"] == torch.__version__
    assert [cell["folder"] for cell in manifest["cells"]] == [row.folder for row in results.rows]
    heun = next(cell for cell in manifest["cells"] if "Heun" in cell["scheduler"] and cell["steps"] == 3)
    assert len(heun["timesteps"]) == 5
    assert len(heun["sigmas"]) == 6
    assert heun["timesteps"] == heun["identity"]["scheduler"]["timesteps"]
    assert heun["identity"]["scheduler"]["config"]["beta_schedule"] == "scaled_linear"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("what", "moment", "chunks", "leftovers"), [("call", 6, 1, 0), ("rename", 4, 3, 1)])
def test_killed_and_started_again_it_ends_the_same(finished, tmp_path, what, moment, chunks, leftovers):
    """Once in the middle of a batch, once when a chunk is written under its temporary name and not yet renamed."""
    whole, results = finished
    program = [sys.executable, eval_fixtures.__file__, str(tmp_path), what, str(moment)]
    assert subprocess.run(program).returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/0*.safetensors")}
    assert len(before) == chunks
    assert len(list(tmp_path.glob("cells/*/.*"))) == leftovers

    again = tiny_sweep().run(tmp_path, progress=False)
    assert scores(again) == scores(results)
    assert_same_images(tmp_path, whole)
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())  # nothing was made twice
    assert all(row.redone == [] for row in again.rows)
    assert list(tmp_path.glob("cells/*/.*")) == []
    sessions = json.loads((tmp_path / "manifest.json").read_text())["sessions"]
    assert [session["status"] for session in sessions] == ["running", "finished"]


def test_a_finished_sweep_draws_nothing_again(finished, tmp_path):
    sweep = tiny_sweep()
    first = sweep.run(tmp_path, progress=False)
    with CallCounter(sweep.model) as counter:
        second = sweep.run(tmp_path, progress=False)
    assert counter.calls == 0
    assert second == first


def test_a_damaged_chunk_is_made_again_and_told(finished, tmp_path):
    whole, results = finished
    tiny_sweep().run(tmp_path, progress=False)
    victim = sorted(tmp_path.glob("cells/*Heun*-3-*/00000002-*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[-5] ^= 16
    victim.write_bytes(data)
    again = tiny_sweep().run(tmp_path, progress=False)
    assert scores(again) == scores(results)
    assert_same_images(tmp_path, whole)
    assert [row.redone for row in again.rows] == [[], [], [], ["seeds 2 to 3: its checksum did not match; made again"]]
    # It stays on record in later runs and in the table.
    assert tiny_sweep().run(tmp_path, progress=False).rows[3].redone == again.rows[3].redone
    assert "seeds 2 to 3: its checksum did not match" in (tmp_path / "results.csv").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"guidance": 2.0},
        {"model": tiny_pipeline(seed=1)},
        {"prompts": PROMPTS[::-1]},
        {"batch_size": 3},
        {"call": {"guidance_rescale": 0.5}},
        {"schedulers": ("diffusers:DDIMScheduler(timestep_spacing='trailing')",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_configuration_reuses_nothing(tmp_path, change):
    same = {"schedulers": SCHEDULERS[:1], "steps": (2,), "metrics": ()}
    before = tiny_sweep(**same).run(tmp_path, progress=False).rows[0]
    after = tiny_sweep(**(same | change)).run(tmp_path, progress=False).rows[0]
    assert before.folder != after.folder
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_another_grid_of_the_same_scheduler_is_another_cell(tmp_path):
    specs = ("diffusers:EulerDiscreteScheduler", "diffusers:EulerDiscreteScheduler(use_karras_sigmas=True)")
    results = tiny_sweep(schedulers=specs, steps=(3,), metrics=()).run(tmp_path, progress=False)
    plain, karras = (opened(tmp_path / row.folder).identity["scheduler"]["sigmas"] for row in results.rows)
    assert len(plain) == len(karras) == 4
    assert plain[1:-1] != karras[1:-1]


def test_more_samples_keep_those_that_are_there(tmp_path):
    sweep = {"schedulers": SCHEDULERS[:1], "steps": (2,), "metrics": ()}
    tiny_sweep(**sweep, samples=4).run(tmp_path, progress=False)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/0*.safetensors")}
    (row,) = tiny_sweep(**sweep, samples=6).run(tmp_path, progress=False).rows
    assert row.samples == 6
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/0*.safetensors")}
    assert len(before) == 2
    assert len(after) == 3
    assert before.items() <= after.items()


def test_a_limit_is_fewer_samples_of_the_same_cell(finished, tmp_path):
    whole, _ = finished
    results = tiny_sweep(limit=4).run(tmp_path, progress=False)
    assert [row.samples for row in results.rows] == [4] * 4
    assert images(tmp_path).keys() < images(whole).keys()
    assert all(torch.equal(image, images(whole)[key]) for key, image in images(tmp_path).items())


def test_the_first_seed_shifts_the_images(finished, tmp_path):
    whole, _ = finished
    tiny_sweep(seed=2, samples=4, schedulers=SCHEDULERS[:1], steps=(2,)).run(tmp_path, progress=False)
    assert images(tmp_path).keys() < images(whole).keys()


def out_of_memory(module, args, output):
    raise RuntimeError("out of memory\nwith details")


def not_a_number(module, args, output):
    return (output[0] * float("nan"),)


def test_a_cell_that_cannot_be_set_up_does_not_stop_the_others(tmp_path):
    """The scheduler cannot make 2000 steps of 1000: that cell fails, the rest goes on, and it is tried again."""
    results = tiny_sweep(steps=(2000, 2), metrics=(), schedulers=("diffusers:DDIMScheduler",)).run(
        tmp_path, progress=False
    )
    assert [row.status for row in results.rows] == ["failed", "ok"]
    assert "2000" in results.failed[0].error
    assert "\n" not in results.failed[0].error
    assert Results.load(tmp_path) == results
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sessions"][-1]["status"] == "finished, 1 cells failed"


@pytest.mark.parametrize(
    ("fault", "error"), [(out_of_memory, "RuntimeError: out of memory"), (not_a_number, "BadImages: NaN")]
)
def test_a_cell_that_breaks_while_it_draws_is_recorded_and_tried_again(tmp_path, fault, error):
    sweep = tiny_sweep(schedulers=SCHEDULERS[:1], steps=(2, 3), metrics=(), samples=4)
    broken = sweep.model.unet.register_forward_hook(fault)
    failed = sweep.run(tmp_path, progress=False)
    assert [row.status for row in failed.rows] == ["failed", "failed"]
    assert all(row.error.startswith(error) and "\n" not in row.error for row in failed.rows)
    assert not list(tmp_path.glob("cells/*/0*.safetensors"))
    broken.remove()
    assert sweep.run(tmp_path, progress=False).failed == ()


def test_a_pipeline_comes_back_with_its_scheduler(tmp_path):
    pipe = tiny_pipeline()
    scheduler = pipe.scheduler
    tiny_sweep(model=pipe, schedulers=SCHEDULERS[1:], steps=(2,), metrics=()).run(tmp_path, progress=False)
    assert pipe.scheduler is scheduler


def test_other_metrics_are_measured_on_the_images_that_are_there(tmp_path):
    request = {"schedulers": SCHEDULERS[:1], "steps": (2,)}
    sweep = tiny_sweep(**request, metrics=())
    assert sweep.run(tmp_path, progress=False).rows[0].metrics == {}
    with CallCounter(sweep.model) as counter:
        more = Sweep(
            sweep.model, SCHEDULERS[:1], (2,), samples=6, guidance=3.0, batch_size=2, prompts=PROMPTS,
            metrics=(Fid(random_images(20, seed=5), tiny_features()),),
        ).run(tmp_path, progress=False)  # fmt: skip
    assert counter.calls == 0
    assert more.rows[0].value("fid") > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedulers": ()}, "schedulers is ()"),
        ({"schedulers": "DDIM"}, "schedulers is 'DDIM'"),
        ({"schedulers": ("diffusers:NoSuchScheduler",)}, "NoSuchScheduler"),
        ({"schedulers": SCHEDULERS[:1] * 2}, "twice"),
        ({"steps": (0,)}, "steps is 0"),
        ({"steps": (5, 5)}, "steps has 5 twice"),
        ({"steps": (2.5,)}, "steps is 2.5"),
        ({"samples": 1}, "samples is 1"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"model": "no-such-model"}, "no-such-model"),
        ({"prompts": None}, "needs prompts"),
        ({"prompts": "a dress"}, "list of at least one prompt"),
        ({"metrics": ("fud",)}, "unknown metric 'fud'; did you mean 'fid'?"),
        ({"metrics": (Fid(random_images(8), tiny_features()),) * 2}, "metric 'fid' is given twice"),
        ({"schedulers": ("diffusers:DDIMScheduler(no_such=1)",)}, "no_such"),
        ({"schedulers": ("DPMSolver", "DPMSolverScheduler")}, "schedulers has 'DPMSolver' twice"),
        ({"schedulers": ("diffusers:DPMSolverMultistepScheduler(algorithm_type='x')",)}, "algorithm_type='x'"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
    ],
)
def test_a_request_that_cannot_be_run_is_one_clear_error(tmp_path, change, message):
    out = tmp_path / "out"
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below, as text and as one line
        tiny_sweep(**change).run(out, progress=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_two_sweeps_do_not_write_to_one_folder(tmp_path):
    with only_writer(tmp_path), pytest.raises(BlockingIOError, match="another sweep is writing"):
        tiny_sweep().run(tmp_path, progress=False)
