"""Recipes: sampler, cache and quantisation as one value, carried out and taken back together, and found together."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep import caching, cli, pipelines, quant, samplers
from fewstep.errors import ArtifactError, FewstepError, PlanError
from fewstep.eval.pairs.latents import capture_latents
from fewstep.pipelines import Recipe
from fewstep.samplers import DPMSolver, Grid, NoiseSchedule, SolverPlan
from tests.eval_fixtures import PROMPTS, tiny_pipeline

STEPS = 4


@pytest.fixture
def pipe():
    return tiny_pipeline()


def latents(pipe, **call):
    with capture_latents(pipe) as captured:
        pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    return captured.latents(1)


def plan_for(pipe, steps=STEPS):
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    return DPMSolver(order=2).compile(schedule, Grid.uniform_t(schedule, steps))


def whole(pipe):
    cache = caching.DeepCache(interval=2).compile(caching.family_of(pipe.unet), steps=STEPS)
    return Recipe(plan_for(pipe), guidance=3.0, cache=cache, quant=quant.Int8().plan(pipe.unet))


def test_a_recipe_is_its_parts_and_is_taken_back_to_the_bit(pipe):
    recipe = whole(pipe)
    assert isinstance(recipe.sampler, SolverPlan)
    assert recipe.cache is not None
    assert recipe.quant is not None
    before = latents(pipe, num_inference_steps=STEPS, guidance_scale=3.0)
    scheduler = pipe.scheduler
    with pipelines.applied(pipe, recipe) as done:
        together = latents(pipe, **recipe.call)
    assert done.cache is not None
    assert done.quant is not None
    assert done.cache.report().hit_rate > 0
    assert done.quant.plan == recipe.quant
    assert pipe.scheduler is scheduler
    assert torch.equal(latents(pipe, num_inference_steps=STEPS, guidance_scale=3.0), before)
    # the same by hand
    pipe.scheduler = samplers.PlanScheduler.from_plan(recipe.sampler, scheduler.config)
    quant.quantize_(pipe.unet, recipe.quant)
    with caching.applied(pipe, recipe.cache):
        assert torch.equal(latents(pipe, **recipe.call), together)
    assert not torch.equal(together, before)


def test_a_file_keeps_everything(pipe, tmp_path):
    recipe = replace(whole(pipe), provenance={"why": "a test"})
    recipe.save(tmp_path / "mine.json")
    again = Recipe.load(tmp_path / "mine.json")
    assert str(again) == str(recipe) == repr(recipe)
    assert again.call == recipe.call == {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    assert again.provenance == {"why": "a test"}
    with pipelines.applied(pipe, recipe):
        expected = latents(pipe, **recipe.call)
    with pipelines.applied(pipe, tmp_path / "mine.json"):
        assert torch.equal(latents(pipe, **again.call), expected)
    body = json.loads((tmp_path / "mine.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**body, "cache_digest": "0" * 16}))
    with pytest.raises(ArtifactError, match="was saved with 0000"):
        Recipe.load(tmp_path / "mine.json")
    with pytest.raises(ArtifactError, match=r"must end in \.json"):
        recipe.save(tmp_path / "mine")


def test_a_part_alone_leaves_the_rest_as_it_is(pipe):
    recipe = Recipe("DPMSolver(solver_order=3)", steps=STEPS)
    scheduler = pipe.scheduler
    pipelines.apply_(pipe, recipe)
    assert type(pipe.scheduler) is samplers.DPMSolverScheduler
    assert quant.plan_of(pipe.unet) is None
    assert caching.controller_of(pipe) is None
    pipelines.remove_(pipe)
    assert pipe.scheduler is scheduler


def test_what_cannot_be_changes_nothing(pipe):
    recipe = whole(pipe)
    scheduler = pipe.scheduler
    before = latents(pipe, num_inference_steps=2)
    other = caching.CachePlan(("no such site",), np.zeros((STEPS, 1), dtype=np.int8))
    with pytest.raises(FewstepError, match="no such site"):
        pipelines.apply_(pipe, replace(recipe, cache=other))
    assert pipe.scheduler is scheduler
    assert torch.equal(latents(pipe, num_inference_steps=2), before)
    with pytest.raises(FewstepError, match="has no recipe to remove"):
        pipelines.remove_(pipe)
    pipelines.apply_(pipe, Recipe("DDIM", steps=2))
    with pytest.raises(FewstepError, match="has a recipe already"):
        pipelines.apply_(pipe, recipe)
    with pytest.raises(FewstepError, match="before tuning"):
        pipelines.tune(pipe, PROMPTS, quality=0.1)
    pipelines.remove_(pipe)


def test_recipes_that_contradict_themselves_are_refused(pipe):
    cache = caching.DeepCache(interval=2).compile(caching.family_of(pipe.unet), steps=6)
    for made, said in (
        (lambda: Recipe(), "decides something"),
        (lambda: Recipe("DDIM"), "takes any number of steps; give steps="),
        (lambda: Recipe("DDIM", steps=0), "steps is 0; give at least 1"),
        (lambda: Recipe(plan_for(pipe), cache=cache), "its sampler is for 4 steps; its cache is for 6 steps"),
        (lambda: Recipe(plan_for(pipe), steps=5), "the recipe is for 5 steps; its sampler is for 4 steps"),
    ):
        with pytest.raises(PlanError, match=said):
            made()
    with pytest.raises(FewstepError, match="DPMSolver"):
        Recipe("DPMSovler", steps=4)
    with pytest.raises(PlanError, match="was not tuned"):
        whole(pipe).plot()


SEARCH = {"guidance": 2.0, "trajectories": 4, "held_out": 2, "reference": 32, "minutes": 0.05}


def test_tuning_keeps_the_bound_it_is_given(tmp_path):
    pipe = pipelines.load("fashion-dit-small")
    before, labels = pipe.scheduler, ("dress", "bag")
    told: list[str] = []
    recipe = pipelines.tune(
        pipe, labels, budget=4.0, calls=(2, 4, 8), caches=(0.7,), quants=(), tell=told.append, **SEARCH
    )
    assert pipe.scheduler is before
    assert caching.controller_of(pipe) is None
    assert recipe.provenance["work"] <= 4.0
    tried = recipe.provenance["tried"]
    assert {c["calls"] for c in tried} == {2, 4, 8}
    assert any(c["cache"] is not None for c in tried), told
    measured = [c["measured"] for c in tried if c["measured"] is not None]
    assert recipe.provenance["error"] == min(measured)
    # what is said of it is what it does
    recipe.save(tmp_path / "r.json")
    with pipelines.applied(pipe, tmp_path / "r.json") as done:
        assert done.recipe.steps in (2, 4)
    assert recipe.plot().axes[0].get_xscale() == "log"

    looser = pipelines.tune(pipe, labels, quality=1.001 * max(measured), calls=(2, 4), caches=(), quants=(), **SEARCH)
    assert looser.provenance["error"] <= 1.001 * max(measured)


def test_tuning_says_what_was_best_where_nothing_will_do():
    pipe = pipelines.load("fashion-dit-small")
    few = {**SEARCH, "calls": (2,), "caches": (), "quants": ()}
    with pytest.raises(FewstepError, match="no recipe errs by at most 1e-09; the best one found errs by"):
        pipelines.tune(pipe, ("bag",), quality=1e-9, **few)
    with pytest.raises(FewstepError, match=r"the cheapest candidate costs 2\.00"):
        pipelines.tune(pipe, ("bag",), budget=1.0, **few)
    with pytest.raises(FewstepError, match="one of the two"):
        pipelines.tune(pipe, ("bag",))
    with pytest.raises(FewstepError, match="budget is -1"):
        pipelines.tune(pipe, ("bag",), budget=-1)
    with pytest.raises(FewstepError, match="GPTQ needs calibration data"):
        pipelines.tune(pipe, ("bag",), quality=1.0, **{**few, "quants": (quant.GPTQ(),)})


def test_the_command_line_tunes_a_recipe_and_draws_by_it(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("dress\nbag\n")
    asked = [
        "tune", "--recipe", "--model", "fashion-dit-small", "--prompts", str(tmp_path / "classes.txt"), "--budget",
        "8", "-g", "2", "--minutes", "0.02", "--trajectories", "4", "--teacher-steps", "32", "--calls", "2,4",
        "-o", str(tmp_path / "r.json"),
    ]  # fmt: skip
    assert cli.run(asked) == 0
    assert "the work of" in capsys.readouterr().out
    assert (tmp_path / "r.png").stat().st_size > 0
    recipe = Recipe.load(tmp_path / "r.json")
    drawn = ["generate", "-m", "fashion-dit-small", "-p", "bag", "-n", "2", "-o", str(tmp_path / "bags.png")]
    assert cli.run([*drawn, "--recipe", str(tmp_path / "r.json")]) == 0
    assert f"{2 * recipe.call['num_inference_steps']} NFE/image" in capsys.readouterr().out
    for wrong in (["--recipe", str(tmp_path / "r.json"), "--steps", "4"], ["--recipe", str(tmp_path / "none.json")]):
        assert cli.run([*drawn, *wrong]) == 2
    for wrong in (["tune", "--recipe"], ["tune", "--sampler", "--budget", "3"], ["tune", "--sampler", "--recipe"]):
        assert cli.run(wrong) == 2
