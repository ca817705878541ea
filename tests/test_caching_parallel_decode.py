"""Faster Diffusion's parallel form against its sequential one, and prior noise.

Between key steps the network does not look at the sample, so one call of many steps gives what many calls give: in float64
on these sizes to 1e-9, which leaves a factor of 1e6 for what the steps make of rounding.
"""

import diffusers
import pytest
import torch

from fewstep import caching, pipelines
from fewstep.errors import FewstepError
from tests.eval_fixtures import tiny_pipeline
from tests.solver_fixtures import SD

SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False}, "EulerDiscreteScheduler": {}, "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {}, "HeunDiscreteScheduler": {}, "LMSDiscreteScheduler": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipeline()
    made.unet.double()
    made.text_encoder.double()
    return made


def options(**changes):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "num_inference_steps": 7, "guidance_scale": 3.0, "output_type": "latent", "latents": noise,
        "generator": torch.Generator().manual_seed(3), **changes,
    }  # fmt: skip


def sequential(pipe, keys=4, **changes):
    with caching.applied(pipe, caching.EncoderPropagation(keys)):
        return pipe(["a", "b"], **options(**changes)).images


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_batch_is_the_sequential_form_for_every_scheduler(pipe, scheduler):
    pipe.scheduler = getattr(diffusers, scheduler)(**SD, **SCHEDULERS[scheduler])
    images = pipelines.generate_propagated(pipe, ["a", "b"], keys=4, **options())
    torch.testing.assert_close(images, sequential(pipe), atol=1e-9, rtol=1e-9)
    assert caching.controller_of(pipe) is None


@pytest.mark.parametrize(
    ("keys", "most", "scale"),
    [(4, 1, 3.0), (4, 2, 3.0), (3, None, 1.0), ((1, 2), 3, 3.0), (1, None, 3.0), ("50ls", 2, 3.0)],
)
def test_neither_keys_nor_the_size_of_calls_nor_guidance_change_that(pipe, keys, most, scale):
    pipe.scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    images = pipelines.generate_propagated(pipe, ["a", "b"], keys=keys, most=most, **options(guidance_scale=scale))
    torch.testing.assert_close(images, sequential(pipe, keys, guidance_scale=scale), atol=1e-9, rtol=1e-9)


def test_calls_are_few_and_large(pipe):
    pipe.scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    pipelines.generate_propagated(pipe, ["a", "b"], keys=4, **options())
    hook.remove()
    assert batches == [4, 12, 4, 8]  # key steps 0 and 4 of 7, two prompts with guidance


def test_prior_noise_goes_in_before_the_late_steps(pipe):
    """DDIM steps are linear in the sample: what was added at step i arrives multiplied by the later steps' factors."""
    pipe.scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    settings = options(num_inference_steps=4)
    plain = pipelines.generate_propagated(pipe, ["a", "b"], keys=4, **settings)
    noisy = pipelines.generate_propagated(pipe, ["a", "b"], keys=4, prior_noise=0.01, **settings)
    alphas, times = pipe.scheduler.alphas_cumprod.double(), pipe.scheduler.timesteps.tolist()
    assert [t < 500 for t in times] == [False, False, True, True]
    final = [pipe.scheduler.final_alpha_cumprod]
    levels = [float(alphas[t]) for t in times] + [float(a) for a in final]
    factor = sum((levels[4] / levels[i]) ** 0.5 for i in (2, 3))  # keys=4: the network sees none of it
    torch.testing.assert_close(noisy - plain, 0.01 * factor * settings["latents"], atol=1e-9, rtol=1e-6)


def test_the_callback_adds_prior_noise_after_late_steps(pipe):
    pipe.scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    settings = options(num_inference_steps=4)
    noise, plain = settings["latents"], sequential(pipe, num_inference_steps=4)
    noisy = sequential(pipe, num_inference_steps=4, callback_on_step_end=caching.prior_noise(noise, 0.01))
    alphas, times = pipe.scheduler.alphas_cumprod.double(), pipe.scheduler.timesteps.tolist()
    last = float(pipe.scheduler.final_alpha_cumprod)
    factor = (last / float(alphas[times[3]])) ** 0.5 + 1  # after step 2, and after the last
    torch.testing.assert_close(noisy - plain, 0.01 * factor * noise, atol=1e-9, rtol=1e-6)


def test_without_the_noise_the_first_state_stands_for_it_in_every_run():
    class Pipe:
        scheduler = diffusers.DDIMScheduler(**SD)

    callback = caching.prior_noise(strength=0.5)
    for start in (1.0, 2.0):
        first, later = torch.full((1,), start), torch.zeros(1)
        assert callback(Pipe, 0, 900, {"latents": first}) == {}
        assert callback(Pipe, 1, 600, {"latents": later}) == {}
        assert callback(Pipe, 2, 300, {"latents": later})["latents"].item() == 0.5 * start


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda pipe: pipelines.generate_propagated(pipe, "a", most=0), r"most is 0"),
        (lambda pipe: pipelines.generate_propagated(pipe, "a", keys="51ls"), r"unknown key schedule '51ls'"),
        (
            lambda pipe: pipelines.generate_propagated(pipe, "a", latents=torch.zeros(3, 4, 8, 8)),
            r"3 latents.* 1 images",
        ),
        (lambda pipe: pipelines.generate_propagated(pipe.unet, "a"), r"StableDiffusionPipeline is needed"),
        (lambda pipe: caching.prior_noise(strength=-1), r"strength is -1"),
        (lambda pipe: caching.prior_noise(torch.zeros(1))(pipe, 0, 1, {"latents": torch.zeros(2)}), r"noise has shape"),
    ],
)
def test_bad_input_is_named(pipe, run, message):
    with pytest.raises(FewstepError, match=message):
        run(pipe)


def test_a_unet_with_a_cache_is_refused_and_keeps_it(pipe):
    with caching.applied(pipe, caching.DeepCache(2)) as controller:
        with pytest.raises(FewstepError, match="has a cache already"):
            pipelines.generate_propagated(pipe, "a", num_inference_steps=2)
        assert caching.controller_of(pipe).caches == controller.caches
