"""Calibration of caches: the schedule is the best one, the fit is exact where it can be, the budget is kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from fewstep import caching
from fewstep.artifact import ArtifactError
from fewstep.caching.actions import Action
from fewstep.caching.calibration.fitting import Fitter
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.calibration.schedule import (
    best_keys,
    even_keys,
    even_with_last,
    exhaustive,
    neighbours,
    total_cost,
)
from fewstep.caching.predictors import Affine
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError
from tests.pipeline_fixtures import tiny_ddpm_pipeline, tiny_dit_pipeline


@pytest.fixture(scope="module")
def dit():
    return tiny_dit_pipeline()


def random_cost(steps, seed):
    table = np.random.default_rng(seed).random((steps, steps, steps + 1))
    return lambda step, key, earlier: float(table[step, key, earlier])


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (5, 2), (7, 7), (8, 3), (9, 4), (10, 5)])
def test_the_schedule_costs_as_little_as_the_best_of_all(steps, count):
    cost = random_cost(steps, steps * 31 + count)
    found = best_keys(steps, count, cost)
    assert found[0] == 0
    assert len(set(found)) == count
    # the same sums in another order: a few roundings of numbers below 1
    assert total_cost(steps, found, cost) == pytest.approx(
        total_cost(steps, exhaustive(steps, count, cost), cost), rel=1e-13
    )


def test_the_schedule_is_never_worse_than_the_uniform_one_by_its_own_measure():
    for seed in range(5):
        cost = random_cost(12, seed)
        for interval in (2, 3, 4):
            uniform = tuple(range(0, 12, interval))
            assert total_cost(12, best_keys(12, len(uniform), cost), cost) <= total_cost(12, uniform, cost) + 1e-12


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_even_schedules_start_with_two_steps_and_have_gaps_that_differ_by_one_at_most(steps):
    for count in range(1, steps + 1):
        keys = even_keys(steps, count)
        assert len(set(keys)) == count
        assert keys[:2] == tuple(range(min(count, 2)))
        gaps = np.diff([*keys[1:], steps]) if count > 1 else np.array([1])
        assert gaps.max() - gaps.min() <= 1
        assert keys[-1] < steps


@pytest.mark.parametrize("steps", [4, 7, 20])
def test_even_schedules_with_the_last_step_end_there(steps):
    for count in range(3, steps + 1):
        keys = even_with_last(steps, count)
        assert len(set(keys)) == count
        assert keys[:2] == (0, 1)
        assert keys[-1] == steps - 1
        gaps = np.diff(keys[1:])
        assert gaps.max() - gaps.min() <= 1


def test_neighbours_differ_in_one_step_and_keep_the_first():
    found = set(neighbours((0, 2, 5), 6))
    assert found == {tuple(sorted({0, a, b})) for a, b in [(1, 5), (3, 5), (4, 5), (1, 2), (2, 3), (2, 4)]}


@pytest.mark.parametrize("count", [0, 5])
def test_an_impossible_number_of_computed_steps_is_refused(count):
    with pytest.raises(FewstepError, match=f"{count} of 4 steps"):
        best_keys(4, count, random_cost(4, 0))


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 9, 5)], ids=["maps", "tokens"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_fit_is_exact_where_the_value_is_an_affine_map_of_those_before(shape, depth):
    generator = torch.Generator().manual_seed(1)
    axis = 1 if len(shape) == 4 else 2
    channels = shape[axis]
    view = [1] * len(shape)
    view[axis] = channels
    cell = Cell.empty("site", depth)
    past = [torch.randn(shape, generator=generator) for _ in range(depth)]
    for step, value in enumerate(past):
        cell.keep(step, value)
    factors = [torch.rand(channels, generator=generator) + 0.5 for _ in range(depth)]
    offset = torch.randn(channels, generator=generator)
    true = sum(f.view(view) * v for f, v in zip(factors, past, strict=True)) + offset.view(view)
    fitter = Fitter(depth, depth + 1)
    answered = fitter(cell, depth, true)
    # the ridge pulls weights towards "hold" by 1e-4 of the distance at most, on values of order 1
    assert float((answered - true).abs().max()) < 1e-4 * 4 * depth * float(true.abs().max())
    again = fitter.predictor().predict(cell, depth)
    torch.testing.assert_close(again, answered, rtol=0, atol=1e-6)  # float32 tables of the same weights


@pytest.fixture(scope="module")
def calibrated(dit):
    return caching.calibrate(
        dit, caching.DPCache(budget=0.7, refine=3, polish=1), ["1", "2"], num_inference_steps=6, guidance_scale=2.0, samples=6,
        held_out=2, batch=4, progress=False,
    )  # fmt: skip


def test_a_calibrated_plan_keeps_its_budget_and_says_what_it_was_made_of(dit, calibrated):
    assert calibrated.cost(dit.transformer).share <= 0.7
    assert calibrated.provenance["macs_share"] == pytest.approx(calibrated.cost(dit.transformer).share, abs=1e-3)
    assert calibrated.provenance["budget"] == {"macs": 0.7}
    assert calibrated.model["class"] == "DiTTransformer2DModel"
    assert calibrated.scheduler == "DDIMScheduler"
    assert 0 < calibrated.reuse < 1


def test_its_error_is_that_of_the_samples_that_were_held_out(dit, calibrated):
    _, test = Runs.of(dit, ["1", "2"], 6, 6, 2.0, 10_000, 4).split(2)
    uncached = test.latents()
    with caching.applied(dit, calibrated):
        error = (test.latents() - uncached).flatten(1).square().mean(1).sqrt()
    assert calibrated.provenance["latent_rms"] == pytest.approx(
        float(error.mean()), abs=1e-6
    )  # written with 6 decimals


def test_no_plain_method_is_better_at_the_same_budget(dit, calibrated):
    """Those that it tried, and one that is measured here by other means."""
    assert calibrated.provenance["latent_rms"] <= min(calibrated.provenance["plain"].values())
    _, test = Runs.of(dit, ["1", "2"], 6, 6, 2.0, 10_000, 4).split(2)
    uncached, family = test.latents(), caching.family_of(dit.transformer)
    plain = caching.TaylorSeer(interval=3, first_enhance=2, lite=True)
    assert plain.compile(family, 6).cost(dit.transformer).share <= 0.7
    with caching.applied(dit, plain):
        error = float((test.latents() - uncached).flatten(1).square().mean(1).sqrt().mean())
    assert calibrated.provenance["latent_rms"] <= error + 1e-6  # written with 6 decimals


def test_calibration_beats_holding_at_the_same_steps(dit, calibrated):
    test = Runs.of(dit, ["1", "2"], 4, 6, 2.0, 77, 4)
    uncached = test.latents()

    def error(plan):
        with caching.applied(dit, plan):
            return float((test.latents() - uncached).square().mean())

    held = caching.CachePlan(calibrated.sites, calibrated.actions)
    assert error(calibrated) < error(held)


def test_the_pipeline_is_left_as_it_was(dit, calibrated):
    assert caching.controller_of(dit) is None
    assert not any("forward" in vars(m) or hasattr(m, "_diffusers_hook") for m in dit.transformer.modules())


def test_a_bound_on_quality_takes_the_fewest_steps_that_keep_it(dit):
    options = {
        "num_inference_steps": 6,
        "guidance_scale": 2.0,
        "samples": 4,
        "held_out": 2,
        "batch": 4,
        "progress": False,
    }
    method = caching.DPCache(at=("blocks",), refine=0, polish=0)
    free = caching.calibrate(dit, method, ["1"], budget=caching.Budget(macs=0.5), **options)
    bound = free.provenance["latent_rms"] * 1.01  # rounding of the written number
    plan = caching.calibrate(dit, method, ["1"], budget=caching.Budget(latent_rms=bound), **options)
    assert plan.provenance["latent_rms"] <= bound
    assert (plan.actions == Action.COMPUTE).sum() <= (free.actions == Action.COMPUTE).sum()


def test_an_interval_is_turned_to_the_budget():
    pipe = tiny_ddpm_pipeline()
    plan = caching.calibrate(
        pipe, caching.DeepCache(), num_inference_steps=6, budget=0.8, samples=3, held_out=2, progress=False
    )
    assert plan.cost(pipe.unet).share <= 0.8
    family = caching.family_of(pipe.unet)
    full = {i: caching.DeepCache(interval=i).compile(family, 6).cost(pipe.unet).share for i in range(1, 7)}
    assert plan.method == f"DeepCache(interval={min(i for i, share in full.items() if share <= 0.8)})"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0.01}, "with one step computed in full it is"),
        ({"budget": caching.Budget(latent_rms=1e-12)}, "no plan keeps latent_rms"),
        ({"held_out": 4}, "4 of 4 samples cannot be held out"),
        ({"prompts": None}, "needs prompts"),
    ],
)
def test_what_cannot_be_is_said(dit, options, said):
    given = {"prompts": ["1"], "budget": 0.5, "held_out": 1, **options}
    prompts = given.pop("prompts")
    with pytest.raises(FewstepError, match=said):
        caching.calibrate(
            dit,
            caching.DPCache(at=("blocks",), refine=0, polish=0),
            prompts,
            num_inference_steps=4,
            samples=4,
            progress=False,
            **given,
        )


def test_a_plan_refuses_another_model_scheduler_and_number_of_steps(dit, calibrated):
    other = tiny_dit_pipeline()
    other.scheduler = DDPMScheduler()
    calls = {"class_labels": [1], "output_type": "np"}
    with (
        pytest.raises(FewstepError, match="calibrated with DDIMScheduler, the pipeline has DDPMScheduler"),
        caching.applied(other, calibrated),
    ):
        other(num_inference_steps=6, **calls)
    with pytest.raises(FewstepError, match="is for 6 steps, the run has 7"), caching.applied(dit, calibrated):
        dit(num_inference_steps=7, **calls)
    with pytest.raises(FewstepError, match="made for DiTTransformer2DModel, the model is UNet2DModel"):
        caching.apply_(tiny_ddpm_pipeline(), calibrated)
    wider = DiTTransformer2DModel.from_config(dit.transformer.config, num_layers=3)
    with pytest.raises(FewstepError, match="another configuration"):
        caching.apply_(wider, calibrated)


@pytest.mark.parametrize("bounds", [{}, {"macs": 0.5, "psnr": 30.0}, {"macs": 1.5}, {"latent_rms": -1.0}])
def test_a_budget_has_one_sensible_bound(bounds):
    with pytest.raises(FewstepError, match="budget"):
        caching.Budget(**bounds)


def test_a_plan_with_tables_comes_back_from_its_file(dit, calibrated, tmp_path):
    calibrated.save(tmp_path / "plan.json")
    loaded = caching.CachePlan.load(tmp_path / "plan.json")
    assert loaded.digest == calibrated.digest
    runs = Runs.of(dit, ["1"], 2, 6, 2.0)
    with caching.applied(dit, calibrated):
        before = runs.latents()
    with caching.applied(dit, loaded):
        assert torch.equal(runs.latents(), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"actions": [[0], [7]]}, "numbers from 0"),
        ({"actions": [[1], [0]]}, "reused at step 0 before it is computed"),
        ({"sites": ["a", "b"]}, "is needed"),
        ({"predictor": {"kind": "oracle"}}, "unknown predictor 'oracle'"),
        ({"method": "mine", "actions": [[0], [0]]}, "was changed"),
    ],
)
def test_a_changed_file_is_refused(tmp_path, change, said):
    path = tmp_path / "plan.json"
    caching.CachePlan(("a",), np.array([[0], [1]], dtype=np.int8)).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=said):
        caching.CachePlan.load(path)


def test_affine_tables_of_other_shapes_are_refused():
    with pytest.raises(FewstepError, match="are needed"):
        Affine({"a": torch.zeros(3, 4)}, {"a": torch.zeros(3, 4)})
