"""TeaCache: the signal is what the first attention sees, decisions recomputed by hand, polynomials fitted and named."""

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.caching.families.modulation import modulated_input
from fewstep.caching.methods.teacache import PUBLISHED, fitted, published_for
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, TRANSFORMERS, blocks_of, decided, inputs_along, seen_by, timesteps, trajectory
from tests.pipeline_fixtures import tiny_ddpm_pipeline, tiny_dit_pipeline

STEPS = 10
PLAIN = (1.0, 0.0)


def first_attention(model):
    block = blocks_of(model)[0]
    return block.attn1 if hasattr(block, "attn1") else block.attn


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_modulated_input_is_what_the_first_attention_sees(name):
    tiny = TINY[name]
    model, conditioning, x, t = tiny.model(), tiny.conditioning(), tiny.sample(), torch.tensor(500)
    made = []

    def look(module, args, kwargs):
        made.append(modulated_input(module, args, kwargs))

    handle = blocks_of(model)[0].register_forward_pre_hook(look, with_kwargs=True)
    seen = seen_by(first_attention(model), tiny, model, conditioning, x, t)
    handle.remove()
    assert torch.allclose(made[0], seen, rtol=1e-6, atol=1e-6)
    assert not torch.equal(made[0], seen_by(blocks_of(model)[0], tiny, model, conditioning, x, t))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_decisions_are_those_of_the_accumulated_change(name):
    tiny = TINY[name]
    model, conditioning, times = tiny.model(), tiny.conditioning(), timesteps(STEPS)
    polynomial = (0.5, 1.0, 0.01)
    with caching.applied(
        model, caching.TeaCache(0.5, polynomial, "modulated", warmup=2), num_inference_steps=STEPS
    ) as controller:
        samples = inputs_along(tiny, model, conditioning, times)
        found = decided(controller)
    expected, accumulated, last = "", 0.0, None
    for i, (x, t) in enumerate(zip(samples, times, strict=True)):
        seen = seen_by(first_attention(model), tiny, model, conditioning, x, t).double()
        if i >= 2:
            accumulated += float(np.polyval(polynomial, (seen - last).abs().mean() / last.abs().mean()))
        reuse = 2 <= i < STEPS - 1 and accumulated < 0.5
        accumulated = accumulated if reuse else 0.0
        expected, last = expected + "CR"[reuse], seen
    assert found == expected
    assert "R" in found


@pytest.mark.parametrize("name", ["unet2d", "sd", "sdxl"])
def test_unets_are_watched_where_the_layers_begin_that_are_left_out(name):
    tiny = TINY[name]
    model, streams = tiny.model(), [tiny.conditioning()]
    plain = trajectory(tiny, model, streams, timesteps(STEPS))
    with caching.applied(model, caching.TeaCache(0.3, PLAIN)) as controller:
        cached = trajectory(tiny, model, streams, timesteps(STEPS))
        assert set(decided(controller)) == {"C", "R"}
        assert decided(controller)[0] == decided(controller)[-1] == "C"
    assert not torch.equal(cached[-1], plain[-1])


def test_a_polynomial_of_zero_never_wants_to_compute():
    tiny = TINY["wan"]
    model = tiny.model()
    with caching.applied(model, caching.TeaCache(0.1, (0.0,), warmup=3)) as controller:
        trajectory(tiny, model, [tiny.conditioning()], timesteps(STEPS))
        assert decided(controller) == "CCCRRRRRRC"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("flux", "flux"), ("cogvideox", "cogvideox-2b"), ("wan", None), ("dit", None), ("sd", None)],
)
def test_which_published_polynomial_a_model_gets(name, expected):
    assert published_for(family_of(TINY[name].model())) == expected


def test_the_published_polynomials_do_not_fall_over_the_changes_they_were_made_for():
    """Relative changes of a few per cent must not count for less than nothing by much, nor for more than everything."""
    for _, coefficients in PUBLISHED.values():
        assert len(coefficients) == 5
    changes = np.linspace(0.02, 0.2, 50)
    values = np.polyval(PUBLISHED["flux"][1], changes)
    assert (values > 0).all()
    assert values[-1] < 1


def test_a_polynomial_is_recovered_and_noise_is_not():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 0.3, 200)
    truth = np.array([30.0, -4.0, 3.0, 0.5, 0.02])
    fit = fitted(np.stack([x, np.polyval(truth, x)], 1))
    assert np.allclose(fit.coefficients, truth, rtol=1e-6)
    assert fit.r2 == pytest.approx(1.0)
    noise = fitted(np.stack([x, rng.uniform(0, 1, 200)], 1))
    assert noise.r2 < 0.1  # 4 of 199 degrees of freedom are 0.02 on average
    assert "R^2" in str(noise)
    with pytest.raises(FewstepError, match="4 pairs do not determine"):
        fitted(np.zeros((4, 2)))


def test_fitting_on_a_pipeline_leaves_it_as_it_was():
    pipe = tiny_dit_pipeline()
    fit = caching.fit_polynomial(pipe, ["1", "2"], num_inference_steps=6, samples=4, degree=1, guidance_scale=2.0)
    assert fit.pairs.shape == (4 * 5, 2)
    assert (fit.pairs > 0).all()
    assert 0 <= fit.r2 <= 1
    slope, offset = fit.coefficients
    residual = fit.pairs[:, 1] - slope * fit.pairs[:, 0] - offset
    assert abs(residual.mean()) < 1e-12  # of least squares
    assert abs((residual * fit.pairs[:, 0]).mean()) < 1e-12
    assert caching.controller_of(pipe) is None
    method = fit.method(0.5)
    assert method.polynomial == fit.coefficients
    unconditional = caching.fit_polynomial(
        tiny_ddpm_pipeline(), num_inference_steps=4, samples=2, degree=1, signal="input"
    )
    assert unconditional.pairs.shape == (2 * 3, 2)


def test_refusals():
    with pytest.raises(FewstepError, match="unknown polynomial 'fluks'"):
        caching.TeaCache(polynomial="fluks")
    with pytest.raises(FewstepError, match="signal"):
        caching.TeaCache(signal="output")
    with pytest.raises(FewstepError, match="threshold is -1"):
        caching.TeaCache(-1)
