"""Plans made on schedulers that have more calls than steps, and on calls that begin in the middle."""

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline

from fewstep import caching, pipelines, quant
from fewstep.caching.calibration.runs import Runs
from fewstep.errors import FewstepError
from tests.eval_fixtures import tiny_pipeline
from tests.pipeline_fixtures import tiny_dit_pipeline

STEPS = 4
OPTIONS = {"num_inference_steps": STEPS, "samples": 3, "held_out": 1, "batch": 2, "progress": False}


def tiny_heun():
    pipe = tiny_dit_pipeline()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        (caching.DPCache(at=("blocks",), refine=1, polish=1), 0.6),
        (caching.ERTACache(adjust=False), 0.6),
        (caching.Interval(at=("blocks",)), 0.6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_scheduler_of_two_calls_a_step_is_calibrated_by_its_calls(method, budget):
    pipe = tiny_heun()
    plan = caching.calibrate(pipe, method, ["1"], budget=budget, **OPTIONS)
    assert plan.steps == 2 * STEPS - 1  # the last step is one call
    assert plan.provenance["steps"] == STEPS
    assert plan.provenance["macs_share"] <= budget
    _, test = Runs.of(pipe, ["1"], 3, STEPS, 4.0, 10_000, 2).split(1)
    uncached = test.latents()
    with caching.applied(pipe, plan) as controller:
        error = (test.latents() - uncached).flatten(1).square().mean(1).sqrt()
        assert controller.report().hit_rate == pytest.approx(plan.reuse)
    assert plan.provenance["latent_rms"] == pytest.approx(float(error.mean()), abs=1e-6)  # written with 6 decimals


def test_positions_are_those_that_the_run_comes_by():
    pipe = tiny_pipeline()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    runs = Runs.of(pipe, ["a bag"], 1, STEPS, 2.0).followed()
    assert (runs.first, runs.positions) == (0, STEPS + 1)  # its second time is there twice
    image = StableDiffusionImg2ImgPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    image.set_progress_bar_config(disable=True)
    call = {"image": torch.rand(1, 1, 32, 32), "strength": 0.5}
    runs = Runs.of(image, ["a bag"], 1, STEPS, 2.0, call=call).followed()
    assert (runs.first, runs.positions) == (STEPS // 2, STEPS)
    with pytest.raises(
        FewstepError, match="begins at position 2 of 4, and DPCache is calibrated on whole trajectories"
    ):
        caching.calibrate(image, caching.DPCache(), ["a bag"], call=call, **{**OPTIONS, "batch": 1})


def test_a_call_that_begins_in_the_middle_is_costed_from_there():
    image = StableDiffusionImg2ImgPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    image.set_progress_bar_config(disable=True)
    call = {"image": torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(3)), "strength": 0.5}
    given = {
        **OPTIONS,
        "num_inference_steps": 10,
        "batch": 1,
        "call": call,
    }
    plan = caching.calibrate(image, caching.DeepCache(), ["a bag"], budget=0.75, **given)
    with caching.applied(image, plan) as controller:
        image("a bag", num_inference_steps=10, output_type="np", generator=torch.Generator().manual_seed(0), **call)
    report, cost = controller.report(), plan.cost(image.unet)
    computed = [report.decisions()["decisions"][step] == [caching.Action.COMPUTE] for step in range(5, 10)]
    assert plan.actions[5, 0] == caching.Action.REUSE
    assert computed[0]  # there was nothing to reuse yet
    expected = sum(cost.full if all_of_it else min(cost.macs) for all_of_it in computed) / (5 * cost.full)
    assert plan.provenance["macs_share"] == pytest.approx(expected, abs=1e-6)  # written with 6 decimals
    assert plan.provenance["call"] == {"strength": 0.5}


def test_profiles_of_static_methods_are_the_plans_that_run():
    pipe = tiny_heun()
    for method in (caching.Interval(2, at=("blocks",)), caching.PyramidBroadcast(window=(100, 600))):
        plan = caching.profile(pipe, method, ["1"], num_inference_steps=STEPS, samples=1)
        with caching.applied(pipe, method) as controller:
            pipe([1], num_inference_steps=STEPS, output_type="np")
            assert controller.report().decisions()["decisions"] == plan.actions.tolist()


def test_tables_measured_along_trajectories_have_a_row_for_every_call():
    pipe = tiny_heun()
    options = {"num_inference_steps": STEPS, "samples": 1, "guidance_scale": 1.0}
    assert len(caching.MagCache.fit(pipe, ["1"], **options).ratios) == 2 * STEPS - 1
    rehash = caching.StepRehash.fit(pipe, ["1"], threshold=-1.0, **options)
    with caching.applied(pipe, rehash) as controller:
        pipe([1], num_inference_steps=STEPS, guidance_scale=1.0, output_type="np")
    assert controller.report().steps == len(rehash.similarity) == 2 * STEPS - 1


def test_a_recipe_and_a_quantisation_call_the_pipeline_with_its_steps():
    pipe = tiny_heun()
    plan = caching.profile(pipe, caching.Interval(2, at=("blocks",)), ["1"], num_inference_steps=STEPS, samples=1)
    assert (plan.steps, plan.num_inference_steps) == (2 * STEPS - 1, STEPS)
    recipe = pipelines.Recipe(cache=plan)
    assert recipe.call == {"num_inference_steps": STEPS}
    with pipelines.applied(pipe, recipe) as done:
        pipe([1], output_type="np", **recipe.call)
    assert done.cache.report().hit_rate == pytest.approx(plan.reuse)
    quant.quantize_(pipe.transformer, quant.Int8(), keep_originals=True)
    fitted = quant.fit_cache(pipe, plan, ["1"], samples=2, held_out=1)
    assert fitted.steps == plan.steps
    assert len(fitted.provenance["quantised"]["latent_rms"]) == 2
