"""What a reuse does to the end: replayed exactly, interpolated exactly where features are smooth, and minimised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.caching.actions import Action
from fewstep.caching.calibration.polishing import Weighted, polished
from fewstep.caching.calibration.responses import Responses, _mixtures
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.calibration.traces import Trace
from fewstep.caching.plan import CachePlan
from fewstep.caching.predictors import Extrapolate
from tests.pipeline_fixtures import tiny_ddpm_pipeline, tiny_dit_pipeline

STEPS = 6
KEYS = (0, 1, 4)


def lively(pipe):
    """With weights twice as large: random networks hardly change along their steps."""
    model = getattr(pipe, "transformer", None) or pipe.unet
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return pipe


@pytest.fixture(scope="module")
def dit():
    return lively(tiny_dit_pipeline())


@pytest.fixture(scope="module")
def runs(dit):
    return Runs.of(dit, ["1", "2"], 2, STEPS, 2.0)


def schedule(keys):
    actions = np.full((STEPS, 1), Action.REUSE, dtype=np.int8)
    actions[list(keys)] = Action.COMPUTE
    return actions


@pytest.mark.parametrize(
    ("make", "sites"),
    [
        (tiny_dit_pipeline, ["blocks"]),
        (tiny_dit_pipeline, ["transformer_blocks.0.attn1", "transformer_blocks.1.ff"]),
        (tiny_ddpm_pipeline, ["branch.0"]),
        (tiny_ddpm_pipeline, ["encoder"]),
    ],
)
def test_a_replay_ends_where_a_run_with_that_one_reuse_ends(make, sites):
    pipe = lively(make())
    runs = Runs.of(pipe, ["1", "2"], 2, STEPS, 2.0)
    trace = Trace.of(runs, sites)
    uncached = runs.latents()
    assert torch.equal(trace.latents, uncached)
    with caching.applied(pipe, CachePlan(tuple(sites), schedule({0, 1, 2, 4, 5}).repeat(len(sites), 1))):
        reused = runs.latents() - uncached
    (changed,) = trace.changed(3, [2])
    # a residual is put on once as (end + (kept - true)), once as (begin + kept): roundings of float32, which later steps carry on
    rounding = 2e-5 * float(uncached.abs().max())
    torch.testing.assert_close(changed, reused, rtol=0, atol=rounding)
    assert float(reused.abs().max()) > 20 * rounding
    assert caching.controller_of(pipe) is None


def test_responses_between_those_measured_are_exact_where_features_are_polynomials_of_the_step():
    generator = np.random.default_rng(0)
    a, b, c = generator.standard_normal((3, 50))
    features = np.array([a + b * t + c * t * t for t in range(9)])
    mixture = _mixtures(features @ features.T, 8, [7, 4])
    differences = features[:8] - features[8]
    # two probes span the differences, which have no constant part; the ridge is 1e-9 of inner products that cancel by 1e2
    np.testing.assert_allclose(mixture @ differences[[7, 4]], differences, atol=1e-5 * np.abs(differences).max())


def test_predicted_errors_add_up_as_vectors():
    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((5, 5, 7))
    responses = Responses(vectors)
    # keys 0 and 2: step 1 holds 0; steps 3 and 4 are on the line through 0 and 2, weights 1 + d / 2 and -d / 2
    total = vectors[1, 0] + 1.5 * vectors[3, 2] - 0.5 * vectors[3, 0] + 2 * vectors[4, 2] - vectors[4, 0]
    assert responses.error((0, 2), 1) == pytest.approx(total @ total, rel=1e-12)
    held = vectors[1, 0] + vectors[3, 2] + vectors[4, 2]
    assert responses.error((0, 2), 0) == pytest.approx(held @ held, rel=1e-12)


def test_the_prediction_tells_good_schedules_from_bad_ones(dit, runs):
    """To first order: the ranks of all schedules of three steps agree, predicted and measured."""
    responses = Responses.measured(runs, ["blocks"])
    uncached = runs.latents()
    predicted, measured = [], []
    for rest in itertools.combinations(range(1, STEPS), 2):
        with caching.applied(dit, CachePlan(("blocks",), schedule((0, *rest)), Extrapolate(1))):
            measured.append(float((runs.latents() - uncached).square().mean()))
        predicted.append(responses.error((0, *rest), 1))
    ranks = [np.argsort(np.argsort(x)) for x in (predicted, measured)]
    # ten schedules: chance gives more than 0.75 one time in a hundred
    assert np.corrcoef(*ranks)[0, 1] > 0.75


@pytest.mark.parametrize("order", [0, 1, 2])
def test_weights_of_a_polynomial_are_those_of_extrapolation(dit, runs, order):
    made = Weighted.polynomial("blocks", schedule(KEYS), 3, order)
    with caching.applied(dit, made.plan):
        weighted = runs.latents()
    with caching.applied(dit, CachePlan(("blocks",), schedule(KEYS), Extrapolate(order))):
        extrapolated = runs.latents()
    # the same sums with weights rounded to float32 and in another order
    torch.testing.assert_close(weighted, extrapolated, rtol=0, atol=1e-4 * float(extrapolated.abs().max()))


def test_polishing_lowers_the_error_and_keeps_the_sums_of_weights(dit, runs):
    start = Weighted.polynomial("blocks", schedule(KEYS), 3, 1)
    uncached = runs.latents()
    *_, made = polished(start, runs, uncached, 2)

    def error(weighted):
        with caching.applied(dit, weighted.plan):
            return float((runs.latents() - uncached).flatten(1).square().mean(1).sqrt().mean())

    assert error(made) < 0.9 * error(start)  # what a line leaves here is mostly what other weights would not
    np.testing.assert_allclose(made.weights.sum(1), 1, atol=1e-12)
    assert np.array_equal(made.weights[list(KEYS)], start.weights[list(KEYS)])


def test_nothing_to_choose_leaves_the_weights_as_they_were(runs):
    start = Weighted.polynomial("blocks", schedule((0,)), 2, 1)  # one value is all there ever is
    assert start.free == []
    assert list(polished(start, runs, runs.latents(), 2)) == []
