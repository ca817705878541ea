"""Sweeps from TOML, before they run (cost), while they run (state), and after (compare, best)."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.eval import CallCounter, ClipScore, Fid, Results, Sweep
from fewstep.eval.sweeps.differences import compare_sweeps
from fewstep.eval.sweeps.lock import only_writer
from fewstep.eval.sweeps.results import Row
from fewstep.eval.sweeps.selection import best, parse_condition
from fewstep.eval.sweeps.state import status
from tests.eval_fixtures import random_images, tiny_clip, tiny_features, tiny_pipeline, tiny_sweep

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sweep.md"
TOML = re.compile(r"^```toml\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


# -- TOML --------------------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def test_the_example_of_the_page_is_a_sweep(tmp_path):
    (example,) = TOML.findall(PAGE.read_text())
    (tmp_path / "prompts.txt").write_text("a dress\n\na bag\n")
    sweep = Sweep.from_file(written(tmp_path, example))
    assert sweep.prompts == ["a dress", "a bag"]
    axes = sweep.axes
    every = math.prod(len(values) for values in axes.values())
    assert 0 < len(sweep.cells) < every  # something is excluded
    assert not [cell for cell in sweep.cells if cell.grid != "default" and cell.scheduler.startswith("diffusers")]


def test_a_file_says_the_same_as_the_call(tmp_path):
    text = """
        schedulers = ["DDIM", "UniPC(solver_order=3)"]
        steps = [2, 3]
        guidance = 2
        samples = 6
        call = { guidance_rescale = 0.5 }
        [[exclude]]
        scheduler = "DDIM"
        steps = [2]
    """
    same = Sweep(
        "fashion-sd", ["DDIM", "UniPC(solver_order=3)"], [2, 3], guidance=2, samples=6,
        call={"guidance_rescale": 0.5}, exclude=[{"scheduler": "DDIM", "steps": [2]}],
    )  # fmt: skip
    assert Sweep.from_file(written(tmp_path, text)) == same


GOOD = 'schedulers = ["DDIM"]\nsteps = [2]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps = [2]", "schedulers is missing; give a list of texts"),
        ('schedulers = ["DDIM"]', "steps is missing; give a list of whole numbers"),
        (GOOD + "stepz = 3", "unknown key 'stepz'; did you mean 'steps'?"),
        ('schedulers = "DDIM"\nsteps = [2]', "schedulers is 'DDIM'; give a list of texts"),
        ('schedulers = ["DDIM"]\nsteps = [2.5]', "steps is [2.5]; give a list of whole numbers"),
        ('schedulers = ["DDIM"]\nsteps = 5', "steps is 5; give a list of whole numbers"),
        (GOOD + "samples = true", "samples is True; give a whole number"),
        (GOOD + "samples = 1", "samples is 1; give a whole number of at least 2"),
        (GOOD + 'guidance = "high"', "guidance is 'high'; give a number or a list of numbers"),
        (GOOD + "guidance = nan", "guidance is nan"),
        (GOOD + "prompts_file = 'none.txt'", "prompts_file"),
        (GOOD + "prompts_file = 'a'\nprompts = ['a']", "prompts and prompts_file are both given"),
        (GOOD + "exclude = [3]", "exclude is [3]; give tables, [[exclude]]"),
        (GOOD + "[[exclude]]\nstep = 2", "unknown axis in exclude 'step'; did you mean 'steps'?"),
        (GOOD + "[[exclude]]\nsteps = 3", "unknown steps in exclude 3; known: 2"),
        (GOOD + "model = 'fashion-xl'", "unknown model 'fashion-xl'"),
        (GOOD + "caches = ['DeepCash(interval=3)']", "unknown cache 'DeepCash'"),
        (GOOD + "grids = ['karras'", "is no TOML"),
        ('schedulers = ["DPMSolvr"]\nsteps = [2]', "DPMSolvr"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_file_key_and_value(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        Sweep.from_file(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_prompts_without_a_prompt_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"prompts_file '.*blank.txt' holds no prompt; give one a line"):
        Sweep.from_file(written(tmp_path, GOOD + "prompts_file = 'blank.txt'"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Sweep.from_file(tmp_path / "none.toml")


# -- before ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_foretells_the_calls_and_writes_nothing(tmp_path, pipe):
    out = tmp_path / "out"
    rule = {"scheduler": "diffusers:HeunDiscreteScheduler", "steps": 2000}
    sweep = tiny_sweep(model=pipe, steps=(2, 3, 2000), metrics=(), guidance=(1.0, 3.0), samples=5, exclude=[rule])
    told = sweep.estimate(out)
    assert not list(tmp_path.iterdir())
    assert [bool(one.error) for one in told.cells].count(True) == 2  # 2000 steps of 1000
    assert all("2000" in one.error for one in told.cells if one.error)
    assert told.seconds > 0
    with CallCounter(pipe) as counter:
        results = sweep.run(out, progress=False)
    # More than foretold: the first cell's rehearsal of 2 calls, and that of the first cell with guidance, which is another
    # network as far as MACs go.
    assert told.calls == counter.calls - 2 - 2
    expected = {(one.cell, one.nfe_per_image) for one in told.cells if not one.error}
    assert {(row.cell, row.nfe_per_image) for row in results.rows if row.status == "ok"} == expected

    with CallCounter(pipe) as counter:  # now there are images, and cells to learn from
        again = tiny_sweep(model=pipe, steps=(2, 4), metrics=(), guidance=3.0, samples=5).estimate(out)
    assert counter.calls == 0
    assert list(again.basis.values()) == ["earlier cells of it"]
    assert [one.images for one in again.cells] == [0, 5, 0, 5]
    assert [one.seconds > 0 for one in again.cells] == [False, True, False, True]


# -- while -------------------------------------------------------------------------------------------------------------


def test_the_state_of_a_finished_sweep(tmp_path, pipe):
    tiny_sweep(model=pipe, steps=(2, 2000), schedulers=("diffusers:DDIMScheduler",), metrics=()).run(
        tmp_path, progress=False
    )
    found = status(tmp_path)
    assert (found.planned, len(found.rows), len(found.failed)) == (2, 2, 1)
    assert not found.running
    assert found.current is None
    assert found.seconds_left == 0
    with only_writer(tmp_path):
        assert status(tmp_path).running


def test_the_state_of_an_interrupted_sweep(tmp_path):
    """Two cells are done, and two of the three batches of the third are there."""
    sweep = tiny_sweep(metrics=())
    # DDIM: 2 calls of a rehearsal; then in each cell 3 batches, of 2 and 3 calls. Then Heun's 2 batches of 3 calls.
    calls = itertools.count(1)
    last = 2 + 3 * 2 + 3 * 3 + 2 * 3

    def interrupt(*_):
        if next(calls) > last:
            raise KeyboardInterrupt

    sweep.model.unet.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(tmp_path, progress=False)
    assert status(tmp_path).sessions[-1]["status"] == "interrupted"
    found = status(tmp_path)
    assert (found.planned, len(found.rows), found.failed) == (4, 2, ())
    assert not found.running
    assert (found.current.scheduler, found.current.steps) == ("diffusers:HeunDiscreteScheduler", 2)
    assert (found.current_samples, found.samples) == (4, 6)
    paces = [row.seconds_per_image / (2 * row.steps) for row in found.rows]
    left = 2 * 2 * 2 + 2 * 3 * 6  # evaluations as foreseen: 2 images of 2 steps, 6 of 3 steps, guided
    assert min(paces) * left * (1 - 1e-9) <= found.seconds_left <= max(paces) * left * (1 + 1e-9)


def test_the_state_of_a_folder_without_a_sweep(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json"):
        status(tmp_path)


# -- after: compare ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory, pipe) -> tuple[Path, Path, Path]:
    """The same cells at guidance 3 and 1, and once more at 3 with other weights in the model's place."""
    metrics = (Fid(random_images(20), tiny_features()), ClipScore(tiny_clip()))
    request = {"model": pipe, "schedulers": ("DDIM", "DPMSolver"), "steps": (2,), "metrics": metrics, "samples": 8}
    folders = tuple(tmp_path_factory.mktemp(name) for name in ("three", "one", "blocks"))
    tiny_sweep(**request, guidance=3.0).run(folders[0], progress=False)
    tiny_sweep(**request, guidance=1.0).run(folders[1], progress=False)
    tiny_sweep(**request | {"model": tiny_pipeline(1), "blocks": 2, "samples": 4}).run(folders[2], progress=False)
    return folders


def test_what_changed_and_what_moved(two):
    first, second = compare_sweeps(two[0], two[1])
    assert (first.title, second.title) == ("scheduler DDIM", "scheduler DPMSolver")
    assert first.changed == {"guidance": (3.0, 1.0)}
    assert first.costs["nfe_per_image"] == (4.0, 2.0)
    fid, clip = first.metrics
    assert (fid.metric, fid.comparison) == ("fid", None)
    assert "one block of seeds" in str(fid)
    assert clip.comparison.verdict in ("better", "worse", "not distinguishable")
    assert clip.comparison.difference == pytest.approx(clip.after - clip.before)
    rows = Results.load(two[0]).rows, Results.load(two[1]).rows
    assert (clip.before, clip.after) == (rows[0][0].value("clip_score"), rows[1][0].value("clip_score"))


def test_the_same_sweep_is_not_distinguishable_from_itself(two):
    for pair in compare_sweeps(two[0], two[0]):
        assert pair.changed == {}
        assert [metric.before == metric.after for metric in pair.metrics] == [True, True]
        assert pair.metrics[1].comparison.verdict == "not distinguishable"


def test_two_cells_are_compared_by_their_folders(two):
    one, other = (two[0] / row.folder for row in Results.load(two[0]).rows)
    (pair,) = compare_sweeps(one, other)
    assert pair.title == "the only cell"
    assert pair.changed["scheduler.class"][0].endswith("DDIMScheduler")
    assert pair.changed["scheduler.class"][1].endswith("DPMSolverScheduler")
    assert "model" not in pair.changed


def test_blocks_of_seeds_are_what_a_metric_of_sets_is_judged_by(two, tmp_path, pipe):
    request = {"schedulers": ("DDIM", "DPMSolver"), "steps": (2,), "samples": 4, "blocks": 2}
    metrics = (Fid(random_images(20), tiny_features()), ClipScore(tiny_clip()))
    tiny_sweep(model=pipe, metrics=metrics, **request).run(tmp_path, progress=False)
    pair = compare_sweeps(tmp_path, two[2])[0]
    assert {"model"} <= pair.changed.keys() <= {"model", "pipeline"}
    assert pair.metrics[0].comparison is not None
    assert "2 paired blocks" in pair.metrics[0].comparison.interval.method


def test_other_recipes_are_not_compared(two):
    pair = compare_sweeps(two[0], two[2])[0]  # N = 8 and N = 4
    assert "seeds" in pair.changed
    assert pair.metrics[0].comparison is None


def test_sweeps_without_a_common_cell_say_so(two, tmp_path, pipe):
    tiny_sweep(model=pipe, schedulers=("UniPC",), steps=(2, 3), metrics=(), samples=2).run(tmp_path, progress=False)
    with pytest.raises(ValueError, match="they differ in scheduler, steps; give two cells"):
        compare_sweeps(two[0], tmp_path)
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        compare_sweeps(two[0], tmp_path / "none")
    with pytest.raises(ValueError, match="has no finished cell"):
        compare_sweeps(two[0] / "cells" / "none", two[1])


# -- after: best -------------------------------------------------------------------------------------------------------


def row(scheduler: str, steps: int, fid: float, seconds: float, **more) -> Row:
    metrics = {
        "fid": {"value": fid, "recipe": more.pop("recipe", "fid[n, N=5]")},
        "accuracy": {"value": 90 + steps, "recipe": "a"},
    }
    return Row(
        scheduler, steps, 1.0, "ok", samples=5, calls=steps, nfe_per_image=2.0 * steps, seconds_per_image=seconds,
        metrics=metrics, **more,
    )  # fmt: skip


ROWS = (row("A", 5, 3.0, 0.10), row("B", 5, 1.9, 0.11), row("A", 10, 1.5, 0.2), row("B", 10, 1.6, 0.19))


@pytest.mark.parametrize(
    ("request_", "chosen", "met"),
    [
        ({"quality": ["fid<2"]}, ("B", 5), 3),
        ({"quality": ["fid<1.55"]}, ("A", 10), 1),
        ({"budget": ["nfe<=10"]}, ("B", 5), 2),
        ({"budget": ["seconds<0.195"]}, ("B", 10), 3),
        ({"budget": ["steps<=5"], "metric": "accuracy"}, ("A", 5), 2),
        ({"quality": ["fid<2", "accuracy>=100"], "budget": ["seconds<1"]}, ("B", 10), 2),
        ({}, ("A", 10), 4),
    ],
)
def test_the_best_cell(request_, chosen, met):
    failed = replace(ROWS[0], status="failed", metrics={}, seconds_per_image=0.0)
    found = best(Results(("fid", "accuracy"), 5, (*ROWS, failed)), **request_)
    assert (found.row.scheduler, found.row.steps) == chosen
    assert (found.met, found.of) == (met, 4)


def test_the_luck_of_a_block_does_not_win():
    blocks = (
        row("A", 5, 1.0, 0.1),
        row("A", 5, 3.0, 0.1, seed=5),
        row("B", 5, 1.8, 0.1),
        row("B", 5, 1.8, 0.1, seed=5),
    )
    found = best(Results(("fid",), 4, blocks))
    assert found.row.scheduler == "B"
    assert found.row.samples == 10
    assert found.of == 2


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"quality": ["fid<1"]}, "none of 4 cells meets fid<1; the lowest fid is 1.5"),
        ({"quality": ["fud<1"]}, "did you mean 'fid'"),
        ({"quality": ["fid=1"]}, "cannot read the condition 'fid=1'; write it as NAME<VALUE"),
        ({"quality": ["fid<low"]}, "the bound of the condition 'fid<low' is 'low'"),
        ({"quality": ["fid<nan"]}, "give a number"),
        ({"budget": ["fid<1"]}, "known: calls, nfe, seconds, steps"),
        ({"metric": "kid"}, "unknown metric 'kid'"),
    ],
)
def test_what_cannot_be_chosen_is_one_clear_error(request_, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        best(Results(("fid", "accuracy"), 4, ROWS), **request_)


def test_values_of_two_recipes_are_not_ranked():
    rows = (*ROWS, row("C", 5, 0.1, 0.1, recipe="fid[n, N=50000]"))
    with pytest.raises(ValueError, match=r"fid was measured in 2 ways, fid\[n, N=5\] and fid\[n, N=50000\]"):
        best(Results(("fid",), 5, rows), quality=["fid<2"])
    with pytest.raises(ValueError, match="no cell of this sweep is finished"):
        best(Results(("fid",), 5, ()), quality=["fid<2"])


def test_a_condition_reads_as_it_is_written():
    assert str(parse_condition(" kid:dinov2 >= 1.50", ("kid:dinov2",))) == "kid:dinov2>=1.5"


def test_results_of_an_older_version_are_read(tmp_path):
    """Rows of 0.1 had no model, grid, cache, quant and seed, and the file no checksum."""
    Results(("fid",), 4, ROWS).save(tmp_path)
    path = tmp_path / "results.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    for cell in body["cells"]:
        for key in ("model", "grid", "cache", "quant", "seed"):
            del cell[key]
    path.write_text(json.dumps(body))
    assert Results.load(tmp_path).rows == ROWS
