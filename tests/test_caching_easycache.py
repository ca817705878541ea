"""EasyCache: decisions recomputed by hand from samples and outputs, and what it makes of a flow that goes straight."""

import pytest
import torch

from fewstep import caching
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, decided, inputs_along, timesteps
from tests.pipeline_fixtures import tiny_dit_pipeline

STEPS, WARMUP = 12, 3


def size(x):
    return x.abs().double().sum()


@pytest.mark.parametrize("name", ["unet2d", "sd", "dit", "pixart", "sd3", "flux"])
def test_decisions_are_those_of_the_expected_change(name):
    tiny = TINY[name]
    model, conditioning, times = tiny.model(), tiny.conditioning(), timesteps(STEPS)
    samples = inputs_along(tiny, model, conditioning, times)
    usual = size(samples[1] - samples[0]) / size(samples[0])
    threshold = float(2.5 * usual)  # a few steps of the plain trajectory
    with (
        caching.applied(model, caching.EasyCache(threshold, warmup=WARMUP), num_inference_steps=STEPS) as controller,
        torch.no_grad(),
    ):
        samples = inputs_along(tiny, model, conditioning, times)
        found = decided(controller)
    expected, accumulated, rate, known = "", 0.0, None, None
    for i, (x, t) in enumerate(zip(samples, times, strict=True)):
        reuse = False
        if WARMUP <= i < STEPS - 1:
            accumulated += float(rate * size(x - samples[i - 1]))
            reuse = accumulated < threshold
        if not reuse:
            accumulated = 0.0
            with torch.no_grad():
                output = tiny.call(model, x, t, conditioning)[:, : x.shape[1]]
            if known is not None:
                rate = size(output - known[1]) / size(output) / size(x - known[0])
            known = x, output
        expected += "CR"[reuse]
    assert found == expected
    assert {"C", "R"} == set(found[WARMUP:])


def test_a_reused_output_is_the_sample_and_what_was_kept():
    """A straight flow, v = noise - data = x - data at time 1: v - x is the same at every step."""
    data = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    model = caching.wrap(lambda x, t: x - data, caching.EasyCache(0.5, warmup=2), num_inference_steps=6)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for i in range(6):
        v = model(x, 1.0 - i / 6)
        assert torch.allclose(v, x - data, rtol=0, atol=4e-7 * float(x.abs().max() + data.abs().max()))
        x = x - v / 10
    assert model.controller.report().hit_rate > 0


def test_a_sample_that_stands_still_is_reused():
    model = caching.wrap(lambda x, t: 2 * x, caching.EasyCache(0.01, warmup=2, cooldown=0), num_inference_steps=5)
    x = torch.ones(1, 2, 4, 4)
    assert all(torch.equal(model(x, 1.0 - i / 5), 2 * x) for i in range(5))
    assert decided(model.controller) == "CCRRR"


def test_another_batch_is_computed_before_it_is_reused():
    model = caching.wrap(lambda x, t: 2 * x, caching.EasyCache(9.0, warmup=1, cooldown=0), num_inference_steps=8)
    for i, batch in enumerate([2, 2, 2, 2, 3, 3, 3, 3]):
        x = torch.full((batch, 2, 4, 4), 1.0 + i / 8)
        assert model(x, 1.0 - i / 8).shape == x.shape
    found = decided(model.controller)
    assert found[4] == "C"
    assert "R" in found[:4]
    assert "R" in found[4:]


@pytest.mark.parametrize("vote", ["batch", "mean", "any"])
def test_it_runs_in_a_pipeline_with_guidance(vote):
    pipe = tiny_dit_pipeline()
    call = {"class_labels": [1, 2], "num_inference_steps": 10, "guidance_scale": 2.0, "output_type": "np"}
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with caching.applied(pipe, caching.EasyCache(5.0, warmup=3, vote=vote)) as controller:
        cached = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        assert 0 < controller.report().hit_rate < 1
    again = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert (again == plain).all()
    assert (cached != plain).any()


def test_a_threshold_of_nothing_is_refused():
    with pytest.raises(FewstepError, match="threshold is 0"):
        caching.EasyCache(0)
