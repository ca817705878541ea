"""Caches beside what pipelines do: two calls a step, starts in the middle, offloaded weights, compiled blocks, adapters."""

import copy
import pickle

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, timesteps, trajectory
from tests.eval_fixtures import tiny_pipeline
from tests.pipeline_fixtures import sd3_prompts, seeded, tiny_sd3_pipeline

PROMPTS = ["a dress", "a bag"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def draw(pipe, steps=4, **options):
    given = {"prompt": PROMPTS, "output_type": "np", **options}
    given["generator"] = seeded(len(given["prompt"] or PROMPTS))
    return pipe(num_inference_steps=steps, **given).images


def with_scheduler(pipe, name, **options):
    import diffusers

    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    return type(pipe)(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)


def columns(report):
    """How often each position of the first site was reached."""
    return [sum(counter.values()) for (step, site), counter in sorted(report.counts.items()) if site == 0]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        ("DDIMScheduler", 4),
        ("HeunDiscreteScheduler", 7),
        ("KDPM2DiscreteScheduler", 7),
        ("PNDMScheduler", 5),  # its fourth timestep is there twice: skip_prk_steps
        ("DPMSolverSinglestepScheduler", 4),
        ("EulerAncestralDiscreteScheduler", 4),
    ],
)
def test_every_call_has_a_position_of_its_own_and_reuse_follows_the_plan(pipe, scheduler, calls, guidance):
    options = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    other = with_scheduler(pipe, scheduler, **options)
    other.set_progress_bar_config(disable=True)
    plain = draw(other, guidance_scale=guidance)
    with caching.applied(other, caching.DeepCache(1)) as controller:
        assert np.array_equal(draw(other, guidance_scale=guidance), plain)
        assert columns(controller.report()) == [1] * calls
    with caching.applied(other, caching.DeepCache(2)) as controller:
        first, second = draw(other, guidance_scale=guidance), draw(other, guidance_scale=guidance)
        report = controller.report()
    assert np.array_equal(first, second)
    assert not np.array_equal(first, plain)
    assert columns(report) == [2] * calls
    assert report.hit_rate == pytest.approx((calls // 2) / calls)
    assert np.array_equal(draw(other, guidance_scale=guidance), plain)


def test_image_to_image_starts_in_the_middle_of_the_plan(pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    given = {"image": image, "strength": 0.5, "steps": 8}
    plain = draw(other, **given)
    table = np.zeros((8, 1))
    table[[4, 6]] = caching.Action.REUSE  # the run starts with a step that the plan reuses
    with caching.applied(other, caching.CachePlan(("branch.0",), table)) as controller:
        draw(other, **given)
        report = controller.report()
    assert sorted(step for step, _ in report.counts) == [4, 5, 6, 7]
    assert report.forced == 1
    assert [report.counts[step, 0].most_common(1)[0][0] for step in range(4, 8)] == [0, 0, 1, 0]
    table[6] = 0
    with caching.applied(other, caching.CachePlan(("branch.0",), table)):
        assert np.array_equal(draw(other, **given), plain)  # its one reuse has to be computed


def test_other_batches_sizes_and_step_counts_from_call_to_call(pipe):
    settings = [{}, {"prompt": PROMPTS[:1]}, {"height": 64, "width": 32}, {"steps": 6}, {"guidance_scale": 1.0}, {}]
    alone = []
    for options in settings:
        with caching.applied(pipe, caching.DeepCache(2)):
            alone.append(draw(pipe, **options))
    with caching.applied(pipe, caching.DeepCache(2)) as controller:
        for options, expected in zip(settings, alone, strict=True):
            assert np.array_equal(draw(pipe, **options), expected), options
        assert controller.report().forced == 0


def test_a_callback_that_ends_guidance_leaves_the_half_that_goes_on(pipe):
    def end_guidance(pipe, step, t, given):
        if step == 1:
            pipe._guidance_scale = 1.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    given = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain = draw(pipe, **given)
    with caching.applied(pipe, caching.CachePlan(("branch.0",), np.array([[0], [0], [1], [0]]))) as controller:
        cached = draw(pipe, **given)  # the step after the change is one to reuse
        report = controller.report()
    assert (report.forced, report.hit_rate) == (0, 0.25)
    assert not np.array_equal(cached, plain)


def test_two_pipelines_with_one_network_take_turns(pipe):
    """A shared network carries one cache, and each call of either pipeline is a trajectory of its own."""
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with caching.applied(pipe, caching.DeepCache(2)):
        with pytest.raises(FewstepError, match="has a cache already"):
            caching.apply_(other, caching.DeepCache(2))
        first = draw(pipe)
        assert np.array_equal(draw(other), first)
        assert np.array_equal(draw(pipe), first)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_copied_pipelines(pipe, copied):
    with caching.applied(pipe, caching.DeepCache(2)):
        expected = draw(pipe)
        twin = copied(pipe)
        assert np.array_equal(draw(twin), expected)
        twin.unet.conv_in.weight.data.zero_()
        assert not np.array_equal(draw(twin), expected)
        assert np.array_equal(draw(pipe), expected)


def test_saving_and_loading_with_a_cache_on(pipe, tmp_path):
    plain = draw(pipe)
    with caching.applied(pipe, caching.DeepCache(2)):
        pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert caching.controller_of(loaded) is None
    assert np.array_equal(draw(loaded), plain)


def test_flow_pipelines_and_transformers():
    pipe = tiny_sd3_pipeline()
    given = {**sd3_prompts(2), "prompt": None}
    plain = draw(pipe, **given)
    with caching.applied(pipe, caching.TaylorSeer(2, first_enhance=1, lite=True)) as controller:
        cached = draw(pipe, **given)
        assert controller.report().hit_rate == 0.5
    assert not np.array_equal(cached, plain)
    assert np.array_equal(draw(pipe, **given), plain)


@pytest.mark.parametrize("name", ["sd", "pixart", "sd3", "wan"])
@pytest.mark.parametrize("sequential", [False, True])
def test_offloaded_weights(name, sequential):
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    tiny = TINY[name]
    model, streams = tiny.model(), [tiny.conditioning()]
    methods = (
        [caching.DeepCache(2)]
        if name == "sd"
        else [caching.TaylorSeer(2, first_enhance=1), caching.FirstBlockCache(0.5)]
    )
    for method in (*methods, caching.TeaCache(5.0, (1.0, 0.0), "time")):
        with caching.applied(model, method, num_inference_steps=4):
            expected = trajectory(tiny, model, streams)
        if sequential:
            cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
        with caching.applied(model, method, num_inference_steps=4) as controller:
            found = trajectory(tiny, model, streams)
            assert controller.report().hit_rate > 0, method
        remove_hook_from_module(model, recurse=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), method


def test_a_skipped_block_is_never_loaded():
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook

    tiny = TINY["dit"]
    model, streams, loaded = tiny.model(), [tiny.conditioning()], []
    cpu_offload(model, execution_device=torch.device("cpu"))
    hook = model.transformer_blocks[1].attn1.to_q._hf_hook
    assert isinstance(hook, AlignDevicesHook)
    original = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: (loaded.append(module), original(module, *args, **kwargs))[1]
    with caching.applied(model, caching.Interval(4, at=("blocks",)), num_inference_steps=4):
        trajectory(tiny, model, streams)
    assert len(loaded) == 1


@pytest.mark.parametrize(("name", "first"), [("dit", "apply"), ("sd3", "compile"), ("wan", "apply")])
def test_compiled_blocks_hold_no_decision(name, first):
    """fullgraph=True refuses to compile a block with a graph break in it."""
    torch._dynamo.reset()
    tiny = TINY[name]
    model, streams = tiny.model(), [tiny.conditioning()]
    blocks = getattr(model, "transformer_blocks", None) or model.blocks
    for method in (caching.Interval(2, at=("blocks[1:]",)), caching.FirstBlockCache(0.5, max_run=1)):
        with caching.applied(model, method, num_inference_steps=4):
            expected = trajectory(tiny, model, streams)
        torch._dynamo.reset()
        if first == "compile":
            for block in blocks:
                block.compile(fullgraph=True, backend="eager")
            controller = caching.apply_(model, method, num_inference_steps=4)
        else:
            controller = caching.apply_(model, method, num_inference_steps=4)
            for block in blocks:
                block.compile(fullgraph=True, backend="eager")
        found = trajectory(tiny, model, streams)
        assert controller.report().hit_rate == 0.5
        caching.remove_(model)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
        plain = trajectory(tiny, model, streams)
        for block in blocks:
            block._compiled_call_impl = None
        for a, b in zip(plain, trajectory(tiny, model, streams), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_of_compiled_blocks_keeps_the_cache(how):
    """Copies are not compiled, as torch has it; the sites must not go with the compiled calls."""
    torch._dynamo.reset()
    tiny = TINY["dit"]
    model, streams = tiny.model(), [tiny.conditioning()]
    method = caching.FirstBlockCache(0.5, max_run=1)
    with caching.applied(model, method, num_inference_steps=4):
        expected = trajectory(tiny, model, streams)
    plain = trajectory(tiny, model, streams)
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    with caching.applied(model, method, num_inference_steps=4) as original:
        trajectory(tiny, model, streams)
        other = copy.deepcopy(model) if how == "copied" else pickle.loads(pickle.dumps(model))
        found = trajectory(tiny, other, streams)
        copied = caching.controller_of(other)
        assert copied.report().hit_rate == original.report().hit_rate == 0.5
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        other.transformer_blocks[1].compile(backend="eager")  # as any other, the copy may be compiled
        for a, b in zip(trajectory(tiny, other, streams), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
        caching.remove_(other)
        other.transformer_blocks[1]._compiled_call_impl = None
        assert all(torch.equal(a, b) for a, b in zip(trajectory(tiny, other, streams), plain, strict=True))
        trajectory(tiny, model, streams)
        assert original.report().hit_rate == 0.5  # the original is as it was


def test_a_network_compiled_as_a_whole_is_refused():
    model = TINY["dit"].model()
    with pytest.raises(FewstepError, match="compile its blocks instead"):
        caching.apply_(torch.compile(model, backend="eager"), caching.Interval(2))
    model.compile(backend="eager")
    with pytest.raises(FewstepError, match="compile its blocks instead"):
        caching.apply_(model, caching.Interval(2))


def test_adapters_may_come_and_go():
    peft = pytest.importorskip("peft")
    tiny = TINY["sd3"]
    model, streams = tiny.model(), [tiny.conditioning()]
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    method = caching.FORA(2)
    torch.manual_seed(0)
    with caching.applied(model, method):
        without = trajectory(tiny, model, streams)
        model.add_adapter(config)
        adapted = trajectory(tiny, model, streams)
        times = timesteps()
    with caching.applied(model, method):
        assert all(torch.equal(a, b) for a, b in zip(trajectory(tiny, model, streams, times), adapted, strict=True))
        model.disable_adapters()
        again = trajectory(tiny, model, streams)
    for a, b in zip(again, without, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # the adapter's layers round differently even when disabled
    assert not torch.equal(adapted[0], without[0])
