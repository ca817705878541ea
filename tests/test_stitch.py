"""Schemes over whole trajectories: stitched models, the leap to the end, and stages of different sizes."""

import copy

import diffusers
import pytest
import torch

from fewstep import pipelines
from fewstep.errors import FewstepError
from fewstep.pipelines.staged import resized, spans
from tests.caching_fixtures import TINY, unet_condition
from tests.eval_fixtures import tiny_pipeline
from tests.pipeline_fixtures import sd3_prompts, seeded, tiny_dit_pipeline, tiny_sd3_pipeline
from tests.solver_fixtures import SD


# -- T-Stitch ---------------------------------------------------------------------------------------------------------
def test_two_copies_of_a_model_are_the_model():
    """caching.md, oracle 10."""
    pipe = tiny_dit_pipeline()
    settings = {"class_labels": [1, 2], "num_inference_steps": 6, "output_type": "np"}
    plain = pipe(**settings, generator=seeded(2)).images
    model = pipe.transformer
    pipe.transformer = pipelines.StitchedDenoiser([(copy.deepcopy(model), 0.4), (model, 0.6)])
    assert (pipe(**settings, generator=seeded(2)).images == plain).all()


def test_each_model_takes_its_share_of_the_steps_in_every_run():
    pipe = tiny_pipeline()
    calls = []
    models = [copy.deepcopy(pipe.unet) for _ in range(3)]
    for number, model in enumerate(models):
        model.register_forward_pre_hook(lambda module, args, number=number: calls.append(number))
    pipe.unet = pipelines.StitchedDenoiser(list(zip(models, (0.4, 0.0, 0.6), strict=True)))
    for _ in range(2):
        calls.clear()
        pipe("a", num_inference_steps=5, output_type="latent")
        assert calls == [0, 0, 2, 2, 2]


def test_the_small_model_really_takes_the_first_steps():
    """Its output there, the large one's behind: two runs by hand."""
    tiny = TINY["dit"]
    small, large = tiny.model(0), tiny.model(1)
    stitched = pipelines.StitchedDenoiser([(small, 0.5), (large, 0.5)], num_inference_steps=2)
    x, given = tiny.sample(), tiny.conditioning()
    with torch.no_grad():
        for model, t in ((small, 900), (large, 100)):
            labels = torch.full((2,), t)
            expected = model(x, timestep=labels, **given).sample
            assert torch.equal(stitched(x, labels, **given).sample, expected)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(unet_condition(), 0.5), (unet_condition(), 0.6)], r"shares are \[0.5, 0.6\]"),
        ([], r"add up to 1"),
        ([(unet_condition(), 0.5), (unet_condition(in_channels=3), 0.5)], r"differ in in_channels: \['3', '4'\]"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(FewstepError, match=message):
        pipelines.StitchedDenoiser(parts)


def test_the_number_of_steps_has_to_be_known():
    model = unet_condition()
    with pytest.raises(FewstepError, match="give num_inference_steps="):
        pipelines.StitchedDenoiser([(model, 1.0)])(torch.zeros(1, 4, 8, 8), 9, torch.zeros(1, 3, 8))


# -- leap to the end --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def flow():
    return tiny_sd3_pipeline()


def generate(pipe, **changes):
    return pipe(
        **{"num_inference_steps": 8, "output_type": "latent", "generator": seeded(2), **sd3_prompts(2), **changes}
    ).images


def test_a_leap_at_the_last_step_is_the_last_step(flow):
    """caching.md, oracle 11."""
    plain = generate(flow)
    leap = pipelines.Leap(at_least=8, tolerance=10.0, patience=1)
    torch.testing.assert_close(generate(flow, callback_on_step_end=leap), plain, atol=1e-5, rtol=1e-5)
    assert leap.leapt == 7


def test_a_leap_takes_the_rest_of_the_way_at_once(flow):
    """x_0 = x_i - sigma_i v_i, with the velocity of step i by hand; and later steps are not computed."""
    states, calls = [], []

    def watch(pipe, step, timestep, kwargs):
        states.append(kwargs["latents"].clone())
        return {}

    generate(flow, callback_on_step_end=watch)
    leap = pipelines.Leap(at_least=4, tolerance=10.0, patience=1)
    hook = flow.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    leapt = generate(flow, callback_on_step_end=leap)
    hook.remove()
    sigmas = flow.scheduler.sigmas.tolist()
    velocity = (states[3] - states[2]) / (sigmas[4] - sigmas[3])
    torch.testing.assert_close(leapt, states[2] - sigmas[3] * velocity, atol=1e-4, rtol=1e-4)
    assert leap.leapt == 3
    assert len(calls) == 4


def test_a_flow_whose_direction_keeps_changing_is_not_cut_short(flow):
    plain = generate(flow)
    leap = pipelines.Leap(at_least=1, tolerance=0.0, patience=9)
    assert torch.equal(generate(flow, callback_on_step_end=leap), plain)
    assert leap.leapt is None


def test_an_object_is_good_for_many_runs(flow):
    leap = pipelines.Leap(at_least=4, tolerance=10.0, patience=1)
    first, second = (generate(flow, callback_on_step_end=leap) for _ in range(2))
    assert torch.equal(first, second)


def test_leaps_need_eulers_steps_of_a_flow():
    with pytest.raises(FewstepError, match="the scheduler is DDIMScheduler"):
        tiny_pipeline()("a", num_inference_steps=2, callback_on_step_end=pipelines.Leap())
    with pytest.raises(FewstepError, match="at_least is 0"):
        pipelines.Leap(at_least=0)


# -- stages of different sizes ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipeline()
    made.unet.double()
    made.text_encoder.double()
    made.scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    return made


def staged(pipe, stages, seed=0, size=8, **changes):
    noise = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent", "latents": noise, **changes}
    return pipelines.bottleneck(pipe, ["a", "b"], stages=stages, generator=seeded(2), **settings), settings


def test_stages_of_one_size_are_the_plain_loop(pipe):
    """caching.md, oracle 12: equal sizes, the same noise level and the same eps."""
    Stage = pipelines.Stage
    images, settings = staged(pipe, [Stage(0.3), Stage(0.4), Stage(0.3)], fresh=False)
    expected = pipe(["a", "b"], **settings).images
    # the pipeline's schedule is float32
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=1e-3)


def test_the_middle_runs_at_the_low_resolution(pipe):
    Stage, sizes = pipelines.Stage, []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    images, _ = staged(pipe, [Stage(0.2), Stage(0.5, 0.5), Stage(0.3, 1.0, 0.1)], size=16)
    hook.remove()
    assert sizes == [16] * 2 + [8] * 5 + [16] * 4  # one step taken anew
    assert images.shape == (2, 4, 16, 16)
    assert bool(images.isfinite().all())


def test_images_do_not_depend_on_their_neighbours(pipe):
    Stage = pipelines.Stage
    stages = [Stage(0.2), Stage(0.5, 0.5), Stage(0.3, 1.0, 0.1)]
    both, settings = staged(pipe, stages, size=16)
    alone = pipelines.bottleneck(
        pipe, "b", stages=stages, generator=seeded(2)[1:], **{**settings, "latents": settings["latents"][1:]}
    )
    torch.testing.assert_close(alone, both[1:], atol=1e-8, rtol=1e-8)


def test_spans_follow_the_shares_and_go_back_where_noise_is_added():
    Stage = pipelines.Stage
    assert spans([Stage(0.2), Stage(0.5, 0.5), Stage(0.3, 1.0, 0.1)], 10) == [(0, 2), (2, 7), (6, 10)]


def test_resizing_keeps_means_down_and_constants_up():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resized(x, (4, 4), None), x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)))
    flat = torch.full((1, 1, 4, 4), 0.7)
    torch.testing.assert_close(resized(flat, (8, 8), None), torch.full((1, 1, 8, 8), 0.7))
    torch.testing.assert_close(resized(x, (4, 4), 1.0).std(dim=(1, 2, 3)), torch.ones(2))
    assert resized(x, (8, 8), 1.0) is x


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"add up to 1"),
        ([(0.5, 1.0, 0.0)], r"add up to 1"),
        ([(1.0, 0.5, 0.0)], r"the last stage's scale is 0.5"),
        ([(0.5, 0.0, 0.0), (0.5, 1.0, 0.0)], r"share or a scale of 0"),
    ],
)
def test_stages_that_are_none_are_refused(pipe, stages, message):
    with pytest.raises(FewstepError, match=message):
        staged(pipe, [pipelines.Stage(*stage) for stage in stages])
