"""TaylorSeer: which polynomials its two predictors forecast exactly, and where it computes."""

import itertools
import math

import pytest
import torch

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, TRANSFORMERS, decided, timesteps, trajectory

PAST = ((7, 6, 4, 1, 0), (8, 4, 2, 1, 0), (5, 4, 3, 2, 1))


def forecast(predictor, values, past, step):
    used = past[: predictor.depth]
    weights = predictor.weights(used, step)
    return sum(w * values[s] for w, s in zip(weights, used, strict=True))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("past", PAST)
def test_extrapolation_is_exact_on_polynomials_of_its_order(order, past):
    for step in (past[0] + 1, past[0] + 4):
        for degree in range(order + 2):
            values = {s: (0.5 * s + 1.0) ** degree for s in (*past, step)}
            error = abs(forecast(caching.Extrapolate(order), values, past, step) - values[step])
            if degree <= order:
                assert error <= 1e-12 * max(values.values())
            else:
                assert error > 1e-3


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("past", PAST)
def test_the_published_sum_is_exact_on_lines_only(order, past):
    step = past[0] + 3
    line = {s: 3.0 - 0.25 * s for s in (*past, step)}
    assert forecast(caching.Taylor(order), line, past, step) == pytest.approx(line[step], rel=1e-12)
    parabola = {s: 1.0 + s**2 for s in (*past, step)}
    assert abs(forecast(caching.Taylor(order), parabola, past, step) - parabola[step]) > 0.1
    for lower in (0, 1):
        assert caching.Taylor(lower).weights(past[: lower + 1], step) == pytest.approx(
            caching.Extrapolate(lower).weights(past[: lower + 1], step)
        )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_published_sum_is_that_of_the_factors_kept_from_step_to_step(order):
    """The authors keep D^k and update them at each computed step, D^{k+1} = (D^k - old D^k) / (steps between)."""
    past = [0, 1, 2, 6, 10]
    values = {s: math.sin(0.7 * s) for s in past}
    factors: dict[int, float] = {}
    for last, s in zip([None, *past], past, strict=False):
        new = {0: values[s]}
        for k in range(order):
            if last is not None and k in factors:
                new[k + 1] = (new[k] - factors[k]) / (s - last)
        factors = new
    expected = sum(d * 3**k / math.factorial(k) for k, d in factors.items())
    assert forecast(caching.Taylor(order), values, past[::-1], 13) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("past", PAST)
def test_hermite_of_one_over_the_root_of_two_follows_a_line_as_the_published_sum_does(past):
    """2 sigma^2 = 1; a smaller sigma follows that share of the line's change."""
    step = past[0] + 3
    line = {s: 3.0 - 0.25 * s for s in (*past, step)}
    whole = caching.Hermite(1, sigma=2**-0.5)
    assert whole.weights(past[:2], step) == pytest.approx(caching.Taylor(1).weights(past[:2], step), rel=1e-14)
    part = forecast(caching.Hermite(1, sigma=0.5), line, past, step)
    assert part == pytest.approx(line[past[0]] + 0.5 * (line[step] - line[past[0]]), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("sigma", [0.5, 0.9])
def test_hermite_takes_the_differences_times_scaled_polynomials(order, sigma):
    past, step = (9, 7, 6, 4, 1), 11
    values = {s: math.sin(0.7 * s) for s in (*past, step)}
    polynomials = [1.0, 2 * sigma * (step - past[0])]
    for k in range(1, order):
        polynomials.append(2 * sigma * (step - past[0]) * polynomials[k] - 2 * k * polynomials[k - 1])
    row = [values[s] for s in past]
    expected = 0.0
    for k in range(order + 1):
        expected += sigma**k * polynomials[k] / math.factorial(k) * row[0]
        row = [(a - b) / (past[j] - past[j + 1]) for j, (a, b) in enumerate(itertools.pairwise(row))]
    assert forecast(caching.Hermite(order, sigma), values, past, step) == pytest.approx(expected, rel=1e-11)


def test_hicache_is_taylorseer_with_another_forecast(tmp_path):
    tiny = TINY["pixart"]
    family = family_of(tiny.model())
    ours, seer = (make(4, order=2, lite=True).compile(family, 12) for make in (caching.HiCache, caching.TaylorSeer))
    assert (ours.actions == seer.actions).all()
    assert ours.predictor == caching.Hermite(2, 0.5) != seer.predictor
    ours.save(tmp_path / "plan.json")
    assert caching.CachePlan.load(tmp_path / "plan.json").digest == ours.digest
    with pytest.raises(FewstepError, match="exact=True is TaylorSeer's"):
        caching.HiCache(exact=True)
    with pytest.raises(FewstepError, match="sigma is 0; give a number above 0"):
        caching.HiCache(sigma=0)


@pytest.mark.parametrize("exact", [False, True])
def test_a_network_that_moves_on_a_line_is_forecast_exactly(exact):
    start, slope = torch.randn(2, 3), torch.randn(2, 3)
    predict = caching.TaylorSeer(3, order=1, exact=exact).predictor
    method = caching.Interval(3, warmup=2, predict=predict)
    model = caching.wrap(lambda x, t: start + slope * t, method, num_inference_steps=9)
    for i in range(9):
        out = model(torch.zeros(2, 3), 9.0 - i)
        assert torch.allclose(out, start + slope * (9.0 - i), rtol=1e-5, atol=1e-5)
    assert model.controller.report().hit_rate > 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"interval": 4, "first_enhance": 3}, "CCCRRRCRRRCR"),
        ({"interval": 6, "first_enhance": 3}, "CCCRRRRRCRRR"),
        ({"interval": 1}, "CCCCCCCCCCCC"),
        ({"interval": 2, "first_enhance": 1}, "CRCRCRCRCRCR"),
    ],
)
@pytest.mark.parametrize("lite", [False, True])
def test_where_it_computes(options, expected, lite):
    tiny = TINY["pixart"]
    model = tiny.model()
    with caching.applied(model, caching.TaylorSeer(lite=lite, **options)) as controller:
        trajectory(tiny, model, [tiny.conditioning()], timesteps(12))
        assert {decided(controller, i) for i in range(len(controller.caches[0].sites))} == {expected}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_it_finds_attention_and_feed_forward_in_every_family(name):
    model = TINY[name].model()
    sites = caching.TaylorSeer().sites(family_of(model))
    blocks = sum(len(getattr(model, name, ())) for name in ("transformer_blocks", "blocks"))
    assert len(sites) >= 2 * blocks + len(getattr(model, "single_transformer_blocks", ()))
    assert caching.TaylorSeer(lite=True).sites(family_of(model)) == [f"blocks[0:{len(family_of(model).paths)}]"]


def test_memory_grows_with_the_order():
    tiny = TINY["dit"]
    model, streams = tiny.model(), [tiny.conditioning()]
    held = []
    for order in (0, 1, 2):
        with caching.applied(model, caching.TaylorSeer(3, order, lite=True)) as controller:
            trajectory(tiny, model, streams, timesteps(12))
            held.append(controller.report().held)
    assert held == [held[0], 2 * held[0], 3 * held[0]]


def test_refusals():
    with pytest.raises(FewstepError, match="order is 7"):
        caching.TaylorSeer(order=7)
    with pytest.raises(FewstepError, match="interval is 0"):
        caching.TaylorSeer(0)
    with pytest.raises(FewstepError, match="has no blocks with these"):
        caching.apply_(TINY["unet2d"].model(), caching.TaylorSeer())
