"""A cache's correction fitted with the quantised network: towards the float one, never worse where it is judged."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep import caching, quant
from fewstep.caching.calibration.runs import Runs
from fewstep.errors import FewstepError
from fewstep.eval.sweeps.transforms import structure
from tests.eval_fixtures import tiny_dit

STEPS = 6
PROMPTS = ("dress", "bag")


@pytest.fixture
def pipe():
    return tiny_dit()


def plan_of(sites=("blocks",)):
    actions = np.full((STEPS, len(sites)), caching.Action.COMPUTE, dtype=np.int8)
    actions[1::2] = caching.Action.REUSE
    return caching.CachePlan(sites, actions)


def drift(pipe, plan, wanted):
    with caching.applied(pipe, plan):
        return float((runs(pipe).latents() - wanted).square().mean().sqrt())


def runs(pipe):
    return Runs.of(pipe, PROMPTS, 8, STEPS, 3.0, seed=500)


def test_the_fit_takes_off_what_skipping_and_rounding_do_together(pipe):
    shape = structure(pipe)
    wanted = runs(pipe).latents()
    plan = plan_of()
    quant.quantize_(pipe.transformer, quant.Int4(weight="int4:g8", activation="int8:row"))
    layers = structure(pipe)
    fitted = quant.fit_cache(pipe, plan, PROMPTS, guidance_scale=3.0, samples=12)
    assert structure(pipe) == layers  # the float layers hung in only while they were asked
    assert (fitted.actions == plan.actions).all()
    first, second = fitted.provenance["quantised"]["latent_rms"]
    assert second < first
    assert fitted.provenance["quantised"]["method"] == "Int4"
    assert drift(pipe, fitted, wanted) < drift(pipe, plan, wanted)  # on seeds that nobody saw
    quant.dequantize_(pipe.transformer)
    assert structure(pipe) == shape


def test_the_truth_is_the_float_networks(pipe):
    """Codes that stand for half of their weights: a fit towards what the quantised layers say themselves could not see it."""
    model = pipe.transformer
    plan = plan_of()
    quant.quantize_(model, quant.Int8(weight="int8:row"))
    record = model._fewstep_quant
    for name in record.originals:
        if "ff.net.2" in name:
            quantised = model.get_submodule(name)
            quantised.scale.data *= 0.5
            quantised.bias.data *= 0.5
            quantised.memory.clear()
    fitted = quant.fit_cache(pipe, plan, PROMPTS, guidance_scale=3.0, samples=12)
    first, second = fitted.provenance["quantised"]["latent_rms"]
    assert second < 0.9 * first


def test_refusals(pipe):
    plan = plan_of()
    with pytest.raises(FewstepError, match="quantize_ the network with keep_originals=True"):
        quant.fit_cache(pipe, plan, PROMPTS)
    quant.quantize_(pipe.transformer, quant.Int8())
    computed = replace(plan, actions=np.full_like(plan.actions, caching.Action.COMPUTE))
    with pytest.raises(FewstepError, match="reuses nothing"):
        quant.fit_cache(pipe, computed, PROMPTS)
    with pytest.raises(FewstepError, match="4 of 4 samples cannot be held out"):
        quant.fit_cache(pipe, plan, PROMPTS, samples=4)
    with caching.applied(pipe, plan), pytest.raises(FewstepError, match="the pipeline has a cache"):
        quant.fit_cache(pipe, plan, PROMPTS)
    assert torch.isfinite(runs(pipe).latents()).all()
