"""MagCache: tables against diffusers' own run, ratios measured by hand, growth carried by the predictor."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.caching.methods.magcache import nearest, published_ratios
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, decided, timesteps, trajectory
from tests.pipeline_fixtures import tiny_dit_pipeline, tiny_sd3_pipeline

RATIOS = (1.0, 1.21, 1.1, 1.05, 1.03, 1.02, 0.99, 0.98, 0.95, 0.9, 0.85, 0.8)


@pytest.mark.parametrize(
    ("threshold", "run", "retention"), [(0.06, 3, 0.2), (0.24, 5, 0.1), (10.0, 2, 0.0), (0.12, 4, 0.5)]
)
@pytest.mark.parametrize("steps", [12, 20])
def test_diffusers_own_gives_the_same(threshold, run, retention, steps):
    from diffusers import MagCacheConfig
    from diffusers.hooks import apply_mag_cache

    tiny = TINY["flux"]
    streams, times = [tiny.conditioning()], timesteps(steps)
    ours, theirs = tiny.model(), tiny.model()
    method = caching.MagCache(threshold, run, retention, RATIOS)
    with caching.applied(ours, method, num_inference_steps=steps) as controller:
        expected = trajectory(tiny, ours, streams, times, ["cond"])
        assert "R" in decided(controller)
    apply_mag_cache(theirs, MagCacheConfig(threshold, run, retention, steps, list(RATIOS)))
    found = trajectory(tiny, theirs, streams, times, ["cond"])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 12, 40])
def test_tables_for_other_numbers_of_steps_take_the_nearest_entries(steps):
    from diffusers.hooks.mag_cache import nearest_interp

    assert nearest(RATIOS, steps) == pytest.approx(nearest_interp(torch.tensor(RATIOS), steps).tolist(), rel=1e-6)


def test_ratios_that_stay_at_one_allow_the_longest_runs():
    plan = caching.MagCache(1e-6, 3, 0.0, (1.0,) * 12).compile(family_of(TINY["dit"].model()), 12)
    assert plan.actions[:, 0].tolist() == [0, 1, 1, 1] * 3


def test_the_error_of_a_run_never_passes_the_threshold():
    family, rng = family_of(TINY["dit"].model()), np.random.default_rng(0)
    for threshold in (0.02, 0.1, 0.5):
        ratios = tuple(rng.uniform(0.8, 1.2, 60))
        actions = caching.MagCache(threshold, 59, 0.0, ratios).compile(family, 60).actions[:, 0]
        grown, error = 1.0, 0.0
        for ratio, reused in zip(ratios, actions, strict=True):
            grown, error = (grown * ratio, error + abs(1 - grown * ratio)) if reused else (1.0, 0.0)
            assert error <= threshold
        assert actions.sum() > 0


def test_measured_ratios_are_those_of_the_residuals():
    pipe = tiny_sd3_pipeline()
    block, norms = pipe.transformer.transformer_blocks[0], []  # the only one

    def look(module, args, kwargs, out):
        norms.append((out[1] - kwargs["hidden_states"]).norm(dim=-1))

    from tests.pipeline_fixtures import sd3_prompts

    call = {**sd3_prompts(1), "prompt": None, "num_images_per_prompt": 1}
    options = {"guidance_scale": 1.0, "samples": 1, "call": call}
    method = caching.MagCache.fit(pipe, ["x"], num_inference_steps=5, threshold=0.3, **options)
    handle = block.register_forward_hook(look, with_kwargs=True)
    again = caching.MagCache.fit(pipe, ["x"], num_inference_steps=5, threshold=0.3, **options)
    handle.remove()
    expected = [1.0, *(float((b / a).mean()) for a, b in pairwise(norms))]
    assert method.ratios == again.ratios == pytest.approx(expected, rel=1e-5)
    assert method.threshold == 0.3
    assert caching.controller_of(pipe) is None


def test_growth_is_carried_to_the_value():
    """A network whose output grows by the ratios is reproduced exactly."""
    ratios = (1.0, 1.5, 0.5, 2.0, 1.25)

    def network(x, t):
        return x * float(np.prod(ratios[: int(t) + 1]))

    x, times = torch.ones(1, 3), [float(-i) for i in range(5)]
    method = caching.Interval(5, predict=caching.Scale(ratios))
    model = caching.wrap(lambda x, t: network(x, -t), method, num_inference_steps=5)
    found = [model(x, t) for t in times]
    assert model.controller.report().hit_rate == 0.8
    for i, out in enumerate(found):
        assert torch.allclose(out, network(x, i))


def test_scale_only_changes_what_is_reused():
    tiny = TINY["dit"]
    model, streams, times = tiny.model(), [tiny.conditioning()], timesteps(12)
    outputs = {}
    for scale in (False, True):
        method = caching.MagCache(0.3, 3, 0.2, RATIOS, scale)
        with caching.applied(model, method) as controller:
            outputs[scale] = trajectory(tiny, model, streams, times)
            steps = decided(controller)
    first = steps.index("R")
    assert all(torch.equal(a, b) for a, b in zip(outputs[True][:first], outputs[False][:first], strict=True))
    assert not torch.equal(outputs[True][first], outputs[False][first])


def test_unets_and_classes_are_measured_too():
    pipe = tiny_dit_pipeline()
    method = caching.MagCache.fit(pipe, ["3"], num_inference_steps=6)
    assert len(method.ratios) == 6
    with caching.applied(pipe.transformer, method, num_inference_steps=6) as controller:
        assert controller.caches[0].sites[0].name == "blocks[0:2]"


def test_refusals():
    assert len(published_ratios(family_of(TINY["flux"].model()))) == 28
    with pytest.raises(FewstepError, match=r"no magnitude ratios are published for DiTTransformer2DModel"):
        caching.MagCache().compile(family_of(TINY["dit"].model()), 10)
    with pytest.raises(FewstepError, match="ratios are positive"):
        caching.MagCache(ratios=(1.0, 0.0))
    with pytest.raises(FewstepError, match="retention is 2"):
        caching.MagCache(retention=2)
    with pytest.raises(FewstepError, match="max_run is 0"):
        caching.MagCache(max_run=0)
