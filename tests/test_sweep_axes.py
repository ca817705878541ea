"""All axes of a sweep: models of every family, grids, guidance, caches, quantisations, blocks of seeds, exclusions."""

import csv
import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fewstep import caching
from fewstep.eval import CallCounter, ClipScore, Fid, Results, Sweep, fingerprint
from fewstep.eval.drawing.scheduling import with_grid
from fewstep.eval.fingerprint import tensor_bytes
from fewstep.eval.reports.decisions import Decisions
from fewstep.eval.sweeps.cell import titles
from fewstep.eval.sweeps.store import opened, read_samples
from fewstep.eval.sweeps.transforms import Transform, make_transform
from fewstep.samplers import DPMSolver, Grid, NoiseSchedule
from tests.eval_fixtures import (
    PROMPTS,
    random_images,
    tiny_clip,
    tiny_dit,
    tiny_features,
    tiny_pipeline,
    tiny_sweep,
    tiny_unconditional,
)

ONE = {"schedulers": ("diffusers:DDIMScheduler",), "steps": (2,), "metrics": (), "samples": 2}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_titles_name_the_axes_that_tell_cells_apart():
    cells = tiny_sweep(steps=(2, 3), guidance=(1.0, 2.5), schedulers=("DDIM",), blocks=2, samples=4).cells
    assert {f"DDIM, {n} steps, guidance {g}, seeds from {s}" for n in (2, 3) for g in ("1", "2.5") for s in (0, 4)} == {
        *titles(cells).values()
    }
    assert [*titles(cells[:1]).values()] == [cells[0].title]
    models = [replace(cells[0], model=name) for name in ("mine", "yours")]
    assert [*titles(models).values()] == [f"mine: {cells[0].title}", f"yours: {cells[0].title}"]


def half_fid() -> Fid:
    return Fid(random_images(20)[:, :, ::2, ::2], tiny_features())


def scaled(name: str, factor: float, **changes) -> Transform:
    """Multiplies what the network says, by a hook."""

    @contextmanager
    def around(pipe):
        handle = pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * factor,))
        yield
        handle.remove()

    return Transform(name, around, {"factor": factor, **changes})


# -- models ------------------------------------------------------------------------------------------------------------


def test_models_of_all_families_in_one_sweep(tmp_path):
    """Each gets the metrics that mean something for it, and guidance only where it knows any."""
    models = {"dit": tiny_dit(), "pixel": tiny_unconditional()}
    sweep = Sweep(
        models, ("DDIM",), (2,), guidance=(1.0, 3.0), samples=4, batch_size=2, prompts=("dress", "bag"),
        metrics=(half_fid(), ClipScore(tiny_clip())),
    )  # fmt: skip
    results = sweep.run(tmp_path, progress=False)
    assert results.failed == ()
    assert [(row.model, row.guidance, row.nfe_per_image) for row in results.rows] == [
        ("dit", 1.0, 2.0), ("dit", 3.0, 4.0), ("pixel", 1.0, 2.0)
    ]  # fmt: skip
    assert [sorted(row.metrics) for row in results.rows] == [["clip_score", "fid"]] * 2 + [["fid"]]
    assert results.rows[2].notes[0] == "no clip_score: pixel draws without prompts"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [model["name"] for model in manifest["sweep"]["models"]] == ["dit", "pixel"]
    assert manifest["sweep"]["models"][1]["first_prompts"] == [""] * 4
    assert len(manifest["sweep"]["cells"]) == len(manifest["cells"]) == 3


def test_an_embedded_model_brings_prompts_and_metrics_and_a_saved_one_comes_from_its_folder(tmp_path, pipe):
    from fewstep.eval.sweeps.sources import make_sources

    pipe.save_pretrained(tmp_path / "mine")
    embedded, saved = make_sources(["fashion-sd", tmp_path / "mine"])
    assert embedded.metrics == ("fid", "clip_score", "accuracy")
    assert len(embedded.prompts(None)) == 10_000
    assert saved.metrics == ()
    assert saved.family == "text"
    sweep = Sweep(str(tmp_path / "mine"), ONE["schedulers"], (2,), samples=2, prompts=PROMPTS, device="cpu")
    (row,) = sweep.run(tmp_path / "out", progress=False).rows
    same = Sweep(pipe, ONE["schedulers"], (2,), samples=2, prompts=PROMPTS).run(tmp_path / "other", progress=False)
    images = [opened(out / one.folder).peek(0, 1).images
              for out, one in ((tmp_path / "out", row), (tmp_path / "other", same.rows[0]))]  # fmt: skip
    assert torch.equal(*images)


# -- grids and guidance ------------------------------------------------------------------------------------------------


def test_grids_are_options_of_ours_and_flags_of_theirs():
    assert with_grid("DPMSolver", "default") == "DPMSolver"
    assert with_grid("DPMSolver(solver_order=3)", "karras") == "DPMSolver(solver_order=3, grid='karras')"
    assert with_grid("DPMSolver", "karras(low=0.1)") == "DPMSolver(grid='karras(low=0.1)')"
    theirs = with_grid("diffusers:EulerDiscreteScheduler", "karras")
    assert theirs == "diffusers:EulerDiscreteScheduler(use_karras_sigmas=True)"
    for spec, grid, said in (
        ("DPMSolver(grid='ays')", "karras", "chooses grid itself"),
        ("diffusers:DDIMScheduler", "karras", "leave the pair out with an exclude rule"),
        ("diffusers:DDIMScheduler", "ays", "grid of diffusers schedulers 'ays'"),
        ("diffusers:EulerDiscreteScheduler", "karras(rho=5)", "grid of diffusers schedulers"),
        ("DPMSolver", "karras(roh=5)", "option of the grid karras 'roh'"),
    ):
        with pytest.raises(ValueError, match=said):
            with_grid(spec, grid)


def test_saved_plans_get_the_steps_that_they_are_of(tmp_path):
    schedule = NoiseSchedule.from_config(tiny_pipeline().scheduler.config)
    for n in (2, 4):
        DPMSolver(order=2).compile(schedule, Grid.uniform_t(schedule, n)).save(tmp_path / f"mine-{n}.json")
    spec = f"Plan(plan={str(tmp_path / 'mine-{nfe}.json')!r})"
    sweep = tiny_sweep(schedulers=("DDIM", spec), steps=(2, 3, 4))
    assert [(cell.scheduler[:4], cell.steps) for cell in sweep.cells] == [
        ("DDIM", 2), ("DDIM", 3), ("DDIM", 4), ("Plan", 2), ("Plan", 4),
    ]  # fmt: skip
    rows = tiny_sweep(schedulers=(spec,), steps=(2, 3), metrics=()).run(tmp_path / "out", progress=False).rows
    assert [(row.steps, row.nfe_per_image) for row in rows] == [(2, 4)]
    with pytest.raises(ValueError, match=r"has plans of 2, 4 steps, none of which is asked for: \[3\]"):
        tiny_sweep(schedulers=(spec,), steps=(3,))


def test_grids_and_guidance_make_cells_of_their_own(tmp_path, pipe):
    sweep = tiny_sweep(
        **ONE | {"schedulers": ("DPMSolver",)}, model=pipe, grids=("default", "karras"), guidance=(1, 3.0)
    )
    rows = sweep.run(tmp_path, progress=False).rows
    assert [(row.grid, row.guidance, row.nfe_per_image) for row in rows] == [
        ("default", 1.0, 2.0), ("default", 3.0, 4.0), ("karras", 1.0, 2.0), ("karras", 3.0, 4.0)
    ]  # fmt: skip
    identities = [opened(tmp_path / row.folder).identity for row in rows]
    assert identities[0]["scheduler"]["timesteps"] != identities[2]["scheduler"]["timesteps"]
    assert len({row.folder for row in rows}) == 4
    with open(tmp_path / "results.csv", newline="") as file:
        assert [row["grid"] for row in csv.DictReader(file)] == ["default", "default", "karras", "karras"]


# -- blocks of seeds ---------------------------------------------------------------------------------------------------


def test_blocks_share_a_folder_and_each_has_its_scores(tmp_path, pipe):
    request = ONE | {"metrics": (Fid(random_images(20), tiny_features()),), "samples": 4, "blocks": 2, "model": pipe}
    first, second = tiny_sweep(**request).run(tmp_path, progress=False).rows
    assert (first.seed, second.seed) == (0, 4)
    assert first.folder == second.folder
    assert first.value("fid") != second.value("fid")
    (alone,) = tiny_sweep(**request | {"blocks": 1, "seed": 4}).run(tmp_path, progress=False).rows
    assert alone.value("fid") == second.value("fid")
    with CallCounter(pipe) as counter:
        assert tiny_sweep(**request).run(tmp_path, progress=False).rows == (first, second)
    assert counter.calls == 0


# -- records of single samples -----------------------------------------------------------------------------------------


def test_every_sample_has_its_record(tmp_path, pipe):
    request = ONE | {"metrics": (ClipScore(tiny_clip()),), "samples": 5, "model": pipe}
    (row,) = tiny_sweep(**request).run(tmp_path, progress=False).rows
    store = opened(tmp_path / row.folder)
    path = store.samples_path(range(5))
    records = read_samples(path)
    assert [record["seed"] for record in records] == list(range(5))
    assert [record["prompt"] for record in records] == list(PROMPTS)
    images = [image for first, last in ((0, 1), (2, 3), (4, 4)) for image in store.peek(first, last).images]
    assert [record["sha256"] for record in records] == [hashlib.sha256(tensor_bytes(i)).hexdigest() for i in images]
    mean = sum(record["clip_score"] for record in records) / 5
    assert row.value("clip_score") == pytest.approx(max(mean, 0.0), abs=1e-9)  # 5 float64 additions of values below 100

    path.write_text("")  # a lost record is made again with the same scores, and told
    (again,) = tiny_sweep(**request).run(tmp_path, progress=False).rows
    assert again.metrics == row.metrics
    assert again.redone == ["samples-00000000-00000004.jsonl: its checksum did not match; made again"]
    assert read_samples(path) == records


# -- caches and quantisations ------------------------------------------------------------------------------------------


def test_a_transform_is_around_its_cells_only(tmp_path, pipe):
    sweep = tiny_sweep(**ONE, model=pipe, caches=("none", scaled("half", 0.5)), quants=("none", scaled("double", 2.0)))
    rows = {(row.cache, row.quant): row for row in sweep.run(tmp_path, progress=False).rows}
    assert list(rows) == [("none", "none"), ("none", "double"), ("half", "none"), ("half", "double")]
    assert all(row.status == "ok" for row in rows.values())
    made = {key: opened(tmp_path / row.folder).peek(0, 1).images for key, row in rows.items()}
    assert not torch.equal(made["none", "none"], made["half", "none"])
    assert not torch.equal(made["half", "none"], made["none", "double"])
    assert torch.equal(made["none", "none"], made["half", "double"])  # powers of two: exactly undone
    assert not pipe.unet._forward_hooks


def test_a_transform_of_other_settings_or_another_name_reuses_nothing(tmp_path, pipe):
    folders = set()
    for transform in (scaled("half", 0.5), scaled("half", 0.25), scaled("less", 0.5), scaled("half", 0.5, version=2)):
        (row,) = tiny_sweep(**ONE, model=pipe, caches=(transform,)).run(tmp_path, progress=False).rows
        folders.add(row.folder)
    assert len(folders) == 4


def fails_to_apply(pipe):
    raise RuntimeError("no kernel for this\nlayer")


def fails_to_remove(pipe):
    raise RuntimeError("screwed on")


def changes_a_weight(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)


def leaves_a_hook(pipe):
    pipe.unet.register_forward_hook(lambda module, args, output: None)


def leaves_a_patch(pipe):
    pipe.unet.forward = pipe.unet.forward


def nothing(pipe): ...


@pytest.mark.parametrize(
    ("apply", "remove", "error", "usable"),
    [
        (fails_to_apply, nothing, "TransformError: cache 'bad' could not be applied: no kernel for this", True),
        (nothing, fails_to_remove, "LeftBehind: cache 'bad' could not be removed: screwed on", False),
        (changes_a_weight, nothing, "LeftBehind: bad left the pipeline changed", False),
        (leaves_a_hook, nothing, "LeftBehind: bad left the pipeline changed", False),
        (leaves_a_patch, nothing, "LeftBehind: bad left the pipeline changed", False),
    ],
)
def test_a_transform_that_fails_is_a_failed_cell(tmp_path, apply, remove, error, usable):
    """Where the caller's pipeline is spoiled, what follows is refused: its images would be another model's."""
    sweep = tiny_sweep(**ONE, caches=(Transform.pair("bad", apply, remove), "none"))
    bad, plain = sweep.run(tmp_path, progress=False).rows
    assert bad.status == "failed"
    assert bad.error.startswith(error)
    assert "\n" not in bad.error
    assert (plain.status == "ok") is usable
    if not usable:
        assert plain.error.startswith("LeftBehind: not drawn: ")
    assert Results.load(tmp_path).failed


def test_a_model_that_a_transform_spoiled_is_loaded_anew(tmp_path, pipe):
    """Where it can be: the cell fails, the next one draws what it would have drawn."""
    pipe.save_pretrained(tmp_path / "mine")
    request = ONE | {"model": str(tmp_path / "mine"), "device": "cpu"}
    spoil = Transform.pair("spoil", changes_a_weight, nothing)
    bad, plain = tiny_sweep(**request, caches=(spoil, "none")).run(tmp_path / "a", progress=False).rows
    (alone,) = tiny_sweep(**request).run(tmp_path / "b", progress=False).rows
    assert (bad.status, plain.status) == ("failed", "ok")
    images = [opened(out / row.folder).peek(0, 1).images
              for out, row in ((tmp_path / "a", plain), (tmp_path / "b", alone))]  # fmt: skip
    assert torch.equal(*images)


def test_a_failing_cell_under_a_transform_gives_the_pipeline_back(tmp_path, pipe):
    overflow = scaled("overflow", 1e38)
    bad, plain = tiny_sweep(**ONE, model=pipe, quants=(overflow, "none")).run(tmp_path, progress=False).rows
    assert (bad.status, plain.status) == ("failed", "ok")
    assert not pipe.unet._forward_hooks


def test_specs_and_methods_are_resolved_in_their_rooms(tmp_path, pipe):
    """By name and as objects, alone and together; the pipeline is bit for bit what it was."""
    caches = ("none", "DeepCache( interval = 2 )", caching.Interval(interval=3))
    sweep = tiny_sweep(**ONE | {"steps": (4,)}, model=pipe, caches=caches, quants=("none", "Int8"))
    before = fingerprint.of_module(pipe.unet)
    rows = {(row.cache, row.quant): row for row in sweep.run(tmp_path, progress=False).rows}
    assert list(rows) == [
        (cache, quant)
        for cache in ("none", "DeepCache(interval=2)", "Interval(interval=3)")
        for quant in ("none", "Int8")
    ]
    assert [row.error for row in rows.values()] == [""] * 6
    assert fingerprint.of_module(pipe.unet) == before
    assert rows["none", "Int8"].effective_nfe_per_image == rows["none", "none"].nfe_per_image == 8
    assert 4 < rows["DeepCache(interval=2)", "none"].effective_nfe_per_image < 8
    identity = opened(tmp_path / rows["DeepCache(interval=2)", "none"].folder).identity["cache"]
    assert identity["name"] == "DeepCache(interval=2)"
    assert identity["settings"]["interval"] == 2
    # What it decided stands in the manifest, for the report; what it doubts in the notes.
    cells = {
        (cell["cache"], cell["quant"]): cell for cell in json.loads((tmp_path / "manifest.json").read_text())["cells"]
    }
    table = Decisions.from_json(cells["DeepCache(interval=2)", "none"]["decisions"])
    assert [row[0] for row in table.table] == [0, 1, 0, 1]
    assert any("4 steps leave little to reuse" in note for note in rows["DeepCache(interval=2)", "none"].notes)
    assert "decisions" not in cells["none", "Int8"]


def test_a_plan_is_told_by_its_digest(pipe):
    plans = [caching.DeepCache(interval=n).compile(caching.family_of(pipe.unet), 4) for n in (2, 3)]
    transforms = [make_transform("cache", plan) for plan in plans]
    assert transforms[0].name == f"plan {plans[0].digest[:8]} by {plans[0].method}"
    assert transforms[0].name != transforms[1].name
    assert transforms[0].identity["settings"] != transforms[1].identity["settings"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("DeepCash", "unknown cache 'DeepCash'; did you mean 'DeepCache'"),
        ("Method", "unknown cache 'Method'"),
        ("DeepCache(intervall=1)", r"cannot be made: .*intervall"),
        ("DeepCache(interval=-1)", r"cannot be made: .*-1"),
        ("DeepCache(1)", "write it as NAME or NAME"),
        ("DeepCache(interval=1+)", "write it as NAME or NAME"),
        ("DeepCache(interval=print(1))", "cannot read an option of the cache"),
    ],
)
def test_a_spec_that_no_room_knows_is_one_clear_error(spec, said):
    with pytest.raises(ValueError, match=said):
        make_transform("cache", spec)


# -- exclusions and bad requests ---------------------------------------------------------------------------------------


def test_exclusions_leave_out_what_meets_all_of_a_rule(pipe):
    request = {"model": pipe, "schedulers": ("DDIM", "DPMSolver(solver_order=3)", "DPMSolver"), "steps": (5, 10)}
    rules = [{"scheduler": "DDIM", "steps": [5]}, {"scheduler": "DPMSolver(solver_order=3)", "steps": 10}]
    cells = [(cell.scheduler, cell.steps) for cell in tiny_sweep(**request, exclude=rules).cells]
    assert cells == [("DDIM", 10), ("DPMSolver(solver_order=3)", 5), ("DPMSolver", 5), ("DPMSolver", 10)]
    without = tiny_sweep(**request, exclude=[{"scheduler": "DPMSolver"}]).cells  # a name is that name with any options
    assert {cell.scheduler for cell in without} == {"DDIM"}


def test_a_pair_that_cannot_be_is_excluded(pipe):
    request = {"model": pipe, "schedulers": ("DDIM", "diffusers:DDIMScheduler"), "grids": ("default", "karras")}
    with pytest.raises(ValueError, match="diffusers:DDIMScheduler cannot take the grid 'karras'"):
        tiny_sweep(**request)
    rule = {"scheduler": "diffusers:DDIMScheduler", "grid": "karras"}
    assert len(tiny_sweep(**request, exclude=[rule]).cells) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exclude": [{"sheduler": "DDIM"}]}, "unknown axis in exclude 'sheduler'; did you mean 'scheduler'?"),
        ({"exclude": [{"steps": [4]}]}, "unknown steps in exclude 4; known: 2, 3"),
        ({"exclude": [{"scheduler": "UniPC"}]}, "unknown scheduler in exclude 'UniPC'"),
        ({"exclude": [{"steps": []}]}, "exclude has no value for steps"),
        ({"exclude": [{}]}, "an exclude rule is {}"),
        ({"exclude": {"steps": 2}}, "exclude is {'steps': 2}; give a list of rules"),
        ({"exclude": [{"steps": [2, 3]}]}, "exclude leaves none of 4 cells"),
        ({"caches": ("DeepCash",)}, "unknown cache 'DeepCash'"),
        ({"caches": "none"}, "caches is 'none'; give a list"),
        ({"caches": (3,)}, "cache is 3; give a name with options, 'none', or a Transform"),
        ({"quants": ("none", "none")}, "quants has 'none' twice"),
        ({"quants": (scaled("x", 1.0), scaled("x", 2.0))}, "quants has 'x' twice"),
        ({"grids": (3,)}, "grids has 3"),
        ({"grids": ("karas",), "schedulers": ("DDIM",)}, "did you mean 'karras'"),
        ({"guidance": (1.0, 1.0)}, "guidance has 1.0 twice"),
        ({"guidance": ("high",)}, "guidance is 'high'"),
        ({"guidance": ()}, "guidance is ()"),
        ({"blocks": 0}, "blocks is 0"),
        ({"steps": 5}, "steps is 5; give a list"),
        ({"schedulers": (5,)}, "a scheduler is 5"),
        ({"model": []}, "model is []"),
        ({"model": {"a": 3}}, "model is 3; give a name, a folder, or a diffusers pipeline"),
        ({"model": ["fashion-sd", "fashion-sd"]}, "model has 'fashion-sd' twice"),
        ({"call": 3}, "call is 3"),
        ({"metrics": "fid"}, "metrics is 'fid'; give a list"),
        ({"prompts": [1]}, "prompts must be a list"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_is_one_clear_error(tmp_path, pipe, change, said):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r".") as error:
        tiny_sweep(**{"model": pipe} | change).run(out, progress=False)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()
