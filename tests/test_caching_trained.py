"""Routers and ERTACache: what they learn keeps the budget, helps, and leaves the pipeline alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fewstep import caching, samplers
from fewstep.caching.actions import Action
from fewstep.caching.calibration.rectifying import Paths, computed_steps, rectification, shortened
from fewstep.caching.calibration.routing import Gates, _gated, _Lesson
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.predictors import Affine
from fewstep.caching.residual import RESIDUAL
from fewstep.errors import FewstepError
from tests.pipeline_fixtures import sd3_prompts, tiny_dit_pipeline, tiny_sd3_pipeline

STEPS = 5
OPTIONS = {
    "num_inference_steps": STEPS,
    "guidance_scale": 2.0,
    "samples": 4,
    "held_out": 2,
    "batch": 2,
    "progress": False,
}


@pytest.fixture(scope="module")
def dit():
    return tiny_dit_pipeline()


def gates(logits, learned=None, costs=None):
    steps, sites = logits.shape
    return Gates(
        logits,
        torch.arange(steps) > 0 if learned is None else learned,
        tuple(f"site {i}" for i in range(sites)),
        torch.full((sites,), 0.8 / sites, dtype=torch.float64) if costs is None else costs,
        torch.ones(steps),
    )


def test_open_gates_compute_everything_and_shut_ones_nothing_but_the_first_step():
    everything = gates(torch.full((4, 3), 5.0)).actions(1.0)
    assert (everything == Action.COMPUTE).all()
    least = (0.2 * 3 + 1) / 4  # of the shut steps only what has no gate remains
    shut = gates(torch.full((4, 3), -5.0)).actions(least)
    assert (shut[0] == Action.COMPUTE).all()
    assert (shut[1:] == Action.REUSE).all()


def test_the_widest_gates_are_computed_within_the_budget():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    made = gates(logits)
    actions = made.actions(0.6)
    share = 1 - (actions * 0.2).sum() / 6
    assert 0.6 - 0.2 / 6 < share <= 0.6 + 1e-9  # one more branch would not fit
    computed = logits[1:][torch.from_numpy(actions[1:] == Action.COMPUTE)]
    reused = logits[1:][torch.from_numpy(actions[1:] == Action.REUSE)]
    assert computed.min() > reused.max()


def test_an_exchange_is_of_the_gates_whose_logits_ask_most_for_it():
    made = gates(torch.zeros(4, 3))
    table = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]], dtype=np.int8)
    with torch.no_grad():
        made.logits[:] = torch.where(torch.from_numpy(table == Action.COMPUTE), 0.5, -0.5)
        assert made.exchange(table, 0.9) is None  # nothing has moved
        made.logits[3, 0] += 0.4  # shut
        made.logits[2, 2] += 0.3
        made.logits[1, 0] -= 0.2  # open
        made.logits[0, 1] -= 0.9  # of a step that is always computed
    assert made.exchange(table, 0.9) == ([3, 1], [0, 0])
    made.settle(table, ([3, 1], [0, 0]))
    assert made.exchange(table, 0.9)[0][0] == 2


def test_an_exchange_keeps_the_budget():
    costs = torch.tensor([0.5, 0.1], dtype=torch.float64)
    made = gates(torch.zeros(3, 2), costs=costs)
    table = np.array([[0, 0], [1, 0], [1, 0]], dtype=np.int8)  # two of three cheap cells; 1 - (0.5 + 0.5) / 3
    with torch.no_grad():
        made.logits[:] = torch.where(torch.from_numpy(table == Action.COMPUTE), 0.5, -0.5)
        made.logits[1, 0] += 1.0  # the dear one asks, but only a cheap one could make room
    assert made.exchange(table, 0.7) is None
    assert made.exchange(table, 0.81) == ([1, 1], [0, 1])  # 0.667 + (0.5 - 0.1) / 3 = 0.8


def test_a_budget_below_shut_gates_is_refused():
    with pytest.raises(FewstepError, match=r"with all gates shut it is 36\.0%"):
        gates(torch.zeros(5, 2)).actions(0.3)


@pytest.mark.parametrize("scheme", ["harmonica", "l2c"])
def test_a_trained_router_keeps_its_budget_and_the_weights(dit, scheme):
    before = {name: p.clone() for name, p in dit.transformer.named_parameters()}
    plan = caching.calibrate(dit, caching.Router(budget=0.75, scheme=scheme, iterations=3), ["1", "2"], **OPTIONS)
    assert plan.cost(dit.transformer).share <= 0.75 + 1e-6
    assert (plan.actions[0] == Action.COMPUTE).all()
    if scheme == "l2c":
        assert (plan.actions[::2] == Action.COMPUTE).all()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in dit.transformer.named_parameters())
    assert all(p.requires_grad for p in dit.transformer.parameters())
    assert caching.controller_of(dit) is None


def test_training_shuts_the_gates_that_matter_less():
    """A branch whose output is nought costs nothing to reuse; its gates must end below the others."""
    pipe = tiny_dit_pipeline(seed=1)
    with torch.no_grad():
        for p in pipe.transformer.transformer_blocks[1].attn1.to_out[0].parameters():
            p.zero_()
        for p in pipe.transformer.parameters():  # the random network hardly changes along its steps
            p.mul_(2.0)
    method = caching.Router(budget=0.75)
    sites = tuple(method.gates(caching.family_of(pipe.transformer)))
    made, runs = gates(torch.zeros(STEPS, len(sites))), Runs.of(pipe, ["1"], 2, STEPS, 2.0)
    made.sites = sites
    made.logits.requires_grad_(True)
    lesson = _Lesson(made, method, 0.75)
    with _gated(runs, lesson):
        for _ in range(4):
            runs.batch_latents(0)
    learned = made.logits.detach()[1:].mean(0)
    dead = sites.index("transformer_blocks.1.attn1")
    assert all(learned[dead] < learned[i] for i in range(len(sites)) if i != dead)


def test_the_plan_errs_no_more_than_the_interval_and_the_searched_schedule(dit):
    plan = caching.calibrate(dit, caching.Router(budget=0.75, iterations=2), ["1", "2"], **OPTIONS)
    told = plan.provenance
    errors = {name: told[f"{name}_error"] for name in ("uniform", "searched", "trained")}
    assert told["latent_rms"] == errors[told["schedule"]] == min(errors.values())
    uniform = caching.CachePlan(plan.sites, np.tile([[0], [1]], (3, len(plan.sites)))[:STEPS])
    _, test = Runs.of(dit, ["1", "2"], 4, STEPS, 2.0, 10_000, 2).split(2)
    uncached = test.latents()
    with caching.applied(dit, uniform):
        error = float((test.latents() - uncached).flatten(1).square().mean(1).sqrt().mean())
    assert uniform.cost(dit.transformer).share <= 0.75
    assert told["latent_rms"] <= error + 1e-6  # written with 6 decimals


def paths(steps=6):
    """Velocities that change little at first and much in the end."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(3, 4, 5, 5, generator=generator)
    pace = torch.tensor([0.0, 0.01, 0.02, 0.2, 0.9, 2.5])[:steps]
    direction = torch.randn(3, 4, 5, 5, generator=generator)
    states = torch.stack([base * (1 - 0.05 * i) for i in range(steps)])
    return Paths(states, torch.stack([base + p * direction for p in pace]))


def test_a_higher_threshold_computes_less_and_always_the_ends():
    counts = []
    for threshold in (0.0, 0.05, 0.5, 100.0):
        keys = computed_steps(paths(), threshold)
        assert keys[0] == 0
        assert keys[-1] == 5
        counts.append(len(keys))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 6
    assert counts[-1] == 2


def test_shortened_steps_leave_the_ends_of_the_grid_where_they_were():
    sigmas = [1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    assert shortened(paths(), range(6), sigmas) == pytest.approx(
        sigmas[:-1], abs=1e-12
    )  # nothing reused: the same grid
    grid = shortened(paths(), [0, 5], sigmas)
    assert grid[0] == 1.0
    assert all(a > b > 0 for a, b in itertools.pairwise(grid))
    assert all(new >= old - 1e-12 for new, old in zip(grid, sigmas, strict=False))  # shorter steps lag behind


def test_the_rectification_is_exact_where_the_error_is_a_line_of_the_guess():
    made = paths(3)
    guess = made.states[1] + made.residuals[0]
    made.velocities[1] = guess - (0.25 * guess - 0.1)
    table = rectification(made, [0, 2])
    assert isinstance(table, Affine)
    # float32 tables of a float64 fit
    assert float(table.scale[RESIDUAL][1]) == pytest.approx(0.75, abs=1e-6)
    assert float(table.shift[RESIDUAL][1]) == pytest.approx(0.1, abs=1e-6)


def test_erta_makes_a_plan_and_a_grid_that_the_scheduler_ends_up_with():
    pipe = tiny_sd3_pipeline()
    calls = {**sd3_prompts(2), "prompt": None}
    plan = caching.calibrate(
        pipe, caching.ERTACache(budget=0.6), [""], call=calls, **{**OPTIONS, "num_inference_steps": 6}
    )
    assert plan.sites == (RESIDUAL,)
    assert (plan.actions == Action.COMPUTE).sum() <= 0.6 * 6
    assert plan.actions[0, 0] == plan.actions[-1, 0] == Action.COMPUTE
    pipe.scheduler.set_timesteps(sigmas=plan.provenance["sigmas"])
    np.testing.assert_allclose(
        pipe.scheduler.sigmas[:-1], plan.provenance["grid"], rtol=1e-6
    )  # float32 of the scheduler


def test_erta_refuses_models_that_are_no_flows(dit):
    with pytest.raises(FewstepError, match="are for flow models"):
        caching.calibrate(dit, caching.ERTACache(), ["1"], **OPTIONS)


def test_without_its_steps_erta_serves_other_models(dit):
    plan = caching.calibrate(dit, caching.ERTACache(budget=0.6, adjust=False), ["1"], **OPTIONS)
    assert "sigmas" not in plan.provenance
    assert (plan.actions == Action.COMPUTE).sum() <= 0.6 * STEPS
    bare = caching.CachePlan(plan.sites, plan.actions)  # the same, without the correction
    train, _ = Runs.of(dit, ["1"], 4, STEPS, 2.0, 10_000, 2).split(2)
    uncached, errors = train.latents(), []
    for made in (plan, bare):
        with caching.applied(dit, made):
            errors.append(float((train.latents() - uncached).square().mean()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("method", [caching.DPCache(), caching.Router(), caching.ERTACache()])
def test_what_has_to_be_calibrated_says_so_when_applied(dit, method):
    with pytest.raises(FewstepError, match=r"caching\.calibrate"):
        caching.apply_(dit, method)
    assert caching.controller_of(dit) is None


def test_a_reused_residual_follows_the_sample():
    """x + r: with equal samples the same output, with another sample the difference of the samples more."""

    def network(sample, timestep):
        return sample * 3 + timestep

    model = caching.wrap(network, caching.Interval(2, at=(RESIDUAL,)), num_inference_steps=2)
    x, y = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first = model(x, 2.0)
    # (3x + 2 - x) + y: one addition and one subtraction of values below 16
    torch.testing.assert_close(model(y, 1.0), first + (y - x), rtol=0, atol=8e-6)


def test_the_schedulers_here_take_the_corrected_grid_literally():
    schedule = samplers.FlowScheduler.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    schedule.set_timesteps(sigmas=[1.0, 0.8, 0.35])
    np.testing.assert_allclose(schedule.sigmas[:-1], [1.0, 0.8, 0.35], rtol=1e-6)
