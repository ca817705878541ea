"""Caches and their calibration, asked for oddly: nothing of another cache is removed, nothing is fitted to what judges."""

import json

import numpy as np
import pytest
import torch

import fewstep.caching.profiling as profiling
from fewstep import caching
from fewstep.errors import ArtifactError, FewstepError
from tests.eval_fixtures import tiny_dit

FEW = {"num_inference_steps": 4, "samples": 3, "held_out": 1, "batch": 2, "progress": False}


@pytest.fixture
def pipe():
    made = tiny_dit()
    made.set_progress_bar_config(disable=True)
    return made


def reusing(site="blocks", steps=4):
    return caching.CachePlan((site,), np.arange(steps)[:, None] % 2)


def test_a_block_leaves_a_cache_that_took_the_place_of_its_own(pipe):
    with caching.applied(pipe, reusing()):
        caching.remove_(pipe)
        mine = caching.apply_(pipe, reusing())
    pipe([1], num_inference_steps=4)
    assert mine.report().hit_rate == 0.5
    caching.remove_(pipe)
    assert caching.controller_of(pipe) is None


def test_one_prompt_is_one_prompt(pipe):
    plan = caching.calibrate(pipe, caching.FORA(), "dress", budget=0.9, **FEW)
    assert plan.provenance["prompts"] == ["dress"]


def test_what_cannot_be_calibrated_is_refused(pipe):
    for method, options, said in (
        (caching.DPCache(), {"batch": 0}, "batch is 0; give a whole number, at least 1"),
        (caching.DPCache(), {"num_inference_steps": 2.5}, r"num_inference_steps is 2\.5; give a whole number"),
        (reusing(), {}, "method is of type CachePlan; give one to calibrate"),
    ):
        with pytest.raises(FewstepError, match=said):
            caching.calibrate(pipe, method, ("dress",), **{**FEW, **options})
    for at in ((), "blocks"):
        with pytest.raises(FewstepError, match="give a tuple of sites"):
            caching.DPCache(at=at)


def test_odd_arguments_are_named(pipe):
    plan = reusing()
    for call, said in (
        (lambda: caching.family_of(pipe), "DiTPipeline is no network; give one, such as pipe.unet"),
        (lambda: plan.cost(pipe), "DiTPipeline is no network"),
        (
            lambda: caching.profile(pipe, plan, ["dress"], num_inference_steps=4),
            "is of type CachePlan; give one to profile",
        ),
        (
            lambda: caching.apply_(pipe, plan, num_inference_steps="4"),
            "num_inference_steps is '4'; give a whole number",
        ),
        (lambda: caching.EncoderPropagation(keys=(0, -3)), r"keys are \(0, -3\); give steps"),
    ):
        with pytest.raises(FewstepError, match=said):
            call()
    assert caching.controller_of(pipe) is None


def test_counts_may_be_numpys(pipe, tmp_path):
    four = np.arange(5)[-1]
    with caching.applied(pipe, caching.Interval(np.int64(2), at=("blocks",)), num_inference_steps=four) as controller:
        pipe([1], num_inference_steps=4, output_type="np")
    assert controller.report().hit_rate == 0.5
    plan = caching.profile(pipe, caching.Interval(2, at=("blocks",)), ["dress"], num_inference_steps=four, samples=1)
    plan.save(tmp_path / "plan.json")
    assert caching.CachePlan.load(tmp_path / "plan.json").num_inference_steps == 4


def test_blocks_that_take_turns_have_no_range():
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2, video_length=2,
        caption_channels=8, cross_attention_dim=16, norm_type="ada_norm_single",
    )  # fmt: skip
    for method in (
        caching.TaylorSeer(lite=True),
        caching.TeaCache(),
        caching.EarlyExit(),
        caching.Interval(at=("blocks[0:1]",)),
    ):
        with pytest.raises(FewstepError, match="for space and for time take turns"):
            caching.apply_(model, method, num_inference_steps=4)
    assert caching.controller_of(model) is None
    offered = caching.family_of(model).offered()
    assert not [site for site in offered if site.startswith("blocks[")]
    with caching.applied(model, caching.FORA()) as controller:  # what is inside the blocks is there
        assert {site.name for site in controller.caches[0].sites} <= set(offered)


def test_a_budget_that_lets_everything_be_computed_needs_no_search(pipe):
    """One step, or all of the work: there is no step to leave out, so the plan is the network as it is."""
    method = caching.DPCache(budget=1.0, at=("blocks",), refine=1, polish=1)
    plan = caching.calibrate(pipe, method, ("dress",), **{**FEW, "num_inference_steps": 1})
    assert plan.reuse == 0
    assert plan.provenance["latent_rms"] == 0


def test_latents_that_are_not_finite_are_refused(pipe):
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight.fill_(float("nan"))
    for method in (caching.FORA(), caching.DPCache(at=("blocks",))):
        with pytest.raises(FewstepError, match="ends with latents that are not finite; run it in float32"):
            caching.calibrate(pipe, method, ("dress",), budget=0.9, **FEW)
    assert caching.controller_of(pipe) is None


def test_decisions_are_not_taken_from_the_samples_that_judge(pipe, monkeypatch):
    seen, real = [], profiling.profiled

    def watched(runs, method):
        seen.append(runs.seeds)
        return real(runs, method)

    monkeypatch.setattr(profiling, "profiled", watched)
    loose = caching.Budget(latent_rms=1e9)
    caching.calibrate(pipe, caching.EasyCache(), ("dress",), budget=loose, seed=100, **FEW)
    assert set(seen) == {(100, 101)}  # of 100 to 102, the last judges


def test_a_plans_file_names_arrays_beside_it(tmp_path):
    path = tmp_path / "plan.json"
    reusing().save(path)
    body = json.loads(path.read_text())
    for changed in ({"arrays": "../plan.safetensors"}, {"arrays": 5}, {"arrays_named": 5}):
        path.write_text(json.dumps({**body, **changed}))
        with pytest.raises(ArtifactError, match="arrays"):
            caching.CachePlan.load(path)


def test_a_site_that_the_end_does_not_depend_on_is_calibrated(pipe):
    """A network whose output layer is zero: every derivative of the end is zero, and every plan is exact."""
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight.zero_()
        pipe.transformer.proj_out_2.bias.zero_()
    method = caching.DPCache(budget=0.9, at=("blocks",), refine=1, polish=1)
    plan = caching.calibrate(pipe, method, ("dress",), **FEW)
    assert plan.provenance["latent_rms"] == 0
