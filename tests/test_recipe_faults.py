"""Recipes that go wrong or are handled oddly: no half of one stays behind, in a pipeline or on the disk."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from fewstep import caching, pipelines, quant
from fewstep.errors import FewstepError, PlanError
from fewstep.eval import fingerprint
from fewstep.pipelines import Recipe
from fewstep.samplers import learn
from tests.eval_fixtures import tiny_pipeline
from tests.test_recipes import STEPS, latents, plan_for, whole

CALL = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize("part", ["cache", "quant", "scheduler"])
def test_what_was_taken_back_by_hand_does_not_keep_the_rest(pipe, part):
    before, scheduler = latents(pipe, **CALL), pipe.scheduler
    with pipelines.applied(pipe, whole(pipe)):
        if part == "cache":
            caching.remove_(pipe)
        elif part == "quant":
            quant.dequantize_(pipe.unet)
        else:
            pipe.scheduler = scheduler
    assert pipe.scheduler is scheduler
    assert torch.equal(latents(pipe, **CALL), before)


def test_what_took_a_parts_place_stays(pipe):
    pipelines.apply_(pipe, whole(pipe))
    caching.remove_(pipe)
    quant.dequantize_(pipe.unet)
    mine = caching.apply_(pipe, caching.DeepCache(interval=3))
    report = quant.quantize_(pipe.unet, quant.Int8())
    pipelines.remove_(pipe)
    assert quant.plan_of(pipe.unet) is report.plan
    found = caching.controller_of(pipe)
    assert found is not None
    assert found.caches == mine.caches
    latents(pipe, **CALL)
    assert mine.report().hit_rate > 0


def test_a_copied_pipeline_takes_its_own_recipe_back(pipe):
    before = latents(pipe, **CALL)
    recipe = whole(pipe)
    pipelines.apply_(pipe, recipe)
    together = latents(pipe, **recipe.call)
    twin = copy.deepcopy(pipe)
    pipelines.remove_(twin)
    assert torch.equal(latents(twin, **CALL), before)
    assert torch.equal(latents(pipe, **recipe.call), together)
    pipelines.remove_(pipe)
    assert torch.equal(latents(pipe, **CALL), before)


def test_parts_of_another_kind_are_refused(pipe):
    for made, said in (
        ({"quant": quant.Int8()}, r"quant is Int8.*give a QuantPlan: config\.plan"),
        ({"cache": caching.DeepCache()}, "cache is DeepCache.*give a CachePlan"),
        ({"sampler": 3, "steps": 4}, "sampler is 3; give a SolverPlan"),
        ({"sampler": "DDIM", "steps": 2.5}, r"steps is 2\.5; give at least 1, a whole number"),
        ({"sampler": "DDIM", "steps": True}, "steps is True"),
        ({"sampler": "DDIM", "steps": 4, "guidance": float("nan")}, "guidance is nan; give a number"),
        ({"sampler": "DDIM", "steps": 4, "guidance": "high"}, "guidance is 'high'; give a number"),
    ):
        with pytest.raises(PlanError, match=said):
            Recipe(**made)
    with pytest.raises(FewstepError, match="has no scheduler; recipes are for diffusers pipelines"):
        pipelines.apply_(pipe.unet, Recipe("DDIM", steps=4))
    with pytest.raises(FewstepError, match="recipe is of type dict; give a Recipe"):
        pipelines.apply_(pipe, {"sampler": "DDIM"})


def test_a_file_with_other_values_is_refused(pipe, tmp_path):
    path = tmp_path / "mine.json"
    whole(pipe).save(path)
    body = json.loads(path.read_text())
    for changed, said in (
        ({"steps": [4]}, r"steps is \[4\]"),
        ({"sampler": 5}, "sampler is 5"),
        ({"quant": "x"}, "a plan of formats is a table, got a str"),
        ({"provenance": 3}, "provenance is 3; give a dict"),
    ):
        path.write_text(json.dumps({**body, **changed}))
        with pytest.raises(PlanError, match=said):
            Recipe.load(path)


def test_saving_leaves_no_file_that_belongs_to_nothing(pipe, tmp_path):
    recipe = whole(pipe)
    for wrong in (object(), float("nan")):
        with pytest.raises(PlanError, match="provenance cannot be written as JSON"):
            replace(recipe, provenance={"why": wrong}).save(tmp_path / "mine.json")
    assert not list(tmp_path.iterdir())
    recipe.save(tmp_path / "mine.json")
    recipe.save(tmp_path / "mine-too.json")
    other = caching.DeepCache(interval=3).compile(caching.family_of(pipe.unet), steps=STEPS)
    replace(recipe, cache=other).save(tmp_path / "mine.json")
    assert len(list(tmp_path.glob("mine-cache-*"))) == 2  # JSON and arrays of the new one
    for name in ("mine.json", "mine-too.json"):
        Recipe.load(tmp_path / name)
    replace(recipe, cache=None).save(tmp_path / "mine.json")
    assert not list(tmp_path.glob("mine-cache-*"))


def test_the_same_weights_in_another_precision_have_to_be_asked_for(pipe):
    plan = replace(plan_for(pipe), provenance={"model": fingerprint.of_module(pipe.unet)})
    pipe.to(torch.bfloat16)
    scheduler = pipe.scheduler
    with pytest.raises(FewstepError, match="or the same in another precision"):
        pipelines.apply_(pipe, Recipe(plan))
    assert pipe.scheduler is scheduler
    with pytest.warns(learn.OutsideCalibration), pipelines.applied(pipe, Recipe(plan), other_model=True):
        assert latents(pipe, num_inference_steps=STEPS).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calls": "4,6"}, "calls is '4,6'; give whole numbers"),
        ({"calls": (2.5,)}, r"calls is \(2\.5,\); give whole numbers"),
        ({"caches": (2.0,)}, r"caches has 2\.0; give shares of the MACs between 0 and 1"),
        ({"quants": (quant.Int8,)}, "quants has <class .*; give configs"),
        ({"quants": (quant.Int8(error=0.01),)}, "Int8 needs calibration data"),
        ({"quants": (quant.Int8(static=True),)}, "Int8 needs calibration data"),
        ({"minutes": -1}, "minutes is -1; give a positive number"),
        ({"trajectories": 2}, "trajectories is 2 and held_out 8; give at least 3 and 1"),
        ({"held_out": 0}, "held_out 0; give at least 3 and 1"),
        ({"guidance": [1.0, 2.0]}, r"guidance is \[1\.0, 2\.0\]; give one number"),
    ],
)
def test_a_search_is_refused_before_it_begins(pipe, options, said):
    told = []
    with pytest.raises(FewstepError, match=said):
        pipelines.tune(pipe, ("a dress",), budget=8.0, tell=told.append, **options)
    assert not told
