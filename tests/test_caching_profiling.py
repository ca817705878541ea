"""Online methods become plans: what most prompts decided, bit for bit the same where all agree."""

import numpy as np
import pytest

from fewstep import caching
from fewstep.errors import FewstepError
from tests.eval_fixtures import tiny_pipeline
from tests.pipeline_fixtures import seeded, tiny_ddpm_pipeline, tiny_dit_pipeline

METHODS = [caching.FirstBlockCache(0.2), caching.TeaCache(0.3)]
STEPS = 12


def images(pipe, seed=10_000, **call):
    import torch

    generator = [torch.Generator().manual_seed(seed)]
    return pipe(generator=generator, num_inference_steps=STEPS, output_type="np", **call).images


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_plan_of_one_sample_does_what_the_method_does(method, tmp_path):
    pipe = tiny_dit_pipeline()
    plan = caching.profile(pipe, method, ["3"], num_inference_steps=STEPS, samples=1, guidance_scale=4.0)
    assert plan.provenance == {"steps": STEPS, "samples": 1, "agreement": 1.0}
    assert 0 < plan.reuse < 1
    assert plan.actions[0, 0] == caching.Action.COMPUTE
    call = {"class_labels": [3], "guidance_scale": 4.0}
    with caching.applied(pipe, method) as controller:
        online = images(pipe, **call)
        assert [row[0] for row in controller.report().decisions()["decisions"]] == plan.actions[:, 0].tolist()
    plan.save(tmp_path / "plan.json")
    with caching.applied(pipe, caching.CachePlan.load(tmp_path / "plan.json")):
        assert np.array_equal(images(pipe, **call), online)
    assert plan.cost(pipe.transformer).share < 1
    assert plan.scheduler == "DDIMScheduler"


def test_the_majority_decides():
    pipe = tiny_dit_pipeline()
    labels = ["1", "20", "300", "4", "5"]
    method = caching.FirstBlockCache(0.2)
    rows = []
    for seed in range(5):
        one = caching.profile(
            pipe, method, labels[seed : seed + 1], num_inference_steps=STEPS, samples=1, seed=seed, guidance_scale=1.0
        )
        rows.append(one.actions[:, 0])
    table = np.stack(rows)
    assert (table != table[0]).any()
    plan = caching.profile(
        pipe, method, labels, num_inference_steps=STEPS, samples=5, seed=0, batch=1, guidance_scale=1.0
    )
    assert plan.actions[:, 0].tolist() == (table.sum(0) > 2).astype(int).tolist()
    assert plan.provenance["agreement"] == pytest.approx((table == plan.actions[:, 0]).mean())


def test_a_plan_has_a_row_for_every_call_of_a_scheduler_with_two_a_step():
    from diffusers import HeunDiscreteScheduler

    pipe = tiny_pipeline()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    method = caching.TeaCache(1.0, warmup=2)
    plan = caching.profile(pipe, method, ["a bag"], num_inference_steps=6, samples=1)
    assert plan.steps == 11
    call = {"prompt": ["a bag"], "num_inference_steps": 6, "output_type": "np"}
    with caching.applied(pipe, method):
        online = pipe(**call, generator=seeded(1)).images
    plan = caching.profile(pipe, method, ["a bag"], num_inference_steps=6, samples=1, seed=0)
    with caching.applied(pipe, plan):
        assert np.array_equal(pipe(**call, generator=seeded(1)).images, online)


def test_static_methods_are_compiled():
    pipe = tiny_ddpm_pipeline()
    plan = caching.profile(pipe, caching.DeepCache(3), num_inference_steps=7)
    assert plan.actions[:, 0].tolist() == [0, 1, 1, 0, 1, 1, 0]


def test_unconditional_networks_are_profiled_too():
    pipe = tiny_ddpm_pipeline()
    plan = caching.profile(pipe, caching.TeaCache(0.5), num_inference_steps=STEPS, samples=4, batch=2)
    assert plan.sites == ("branch.0",)
    assert plan.actions[-1, 0] == caching.Action.COMPUTE


def test_refusals():
    pipe = tiny_dit_pipeline()
    with pytest.raises(FewstepError, match="needs prompts"):
        caching.profile(pipe, METHODS[0], num_inference_steps=4)
    with (
        caching.applied(pipe, caching.Interval(2)),
        pytest.raises(FewstepError, match="has a cache; take it away before profiling"),
    ):
        caching.profile(pipe, METHODS[0], ["1"], num_inference_steps=4)
    with pytest.raises(FewstepError, match="serve UNets"):
        caching.profile(tiny_ddpm_pipeline(), METHODS[0], num_inference_steps=4)
    assert caching.controller_of(pipe) is None
