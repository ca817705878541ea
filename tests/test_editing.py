"""Inversion-free editing: the published formula, what equal prompts give back, and that an edit edits."""

import diffusers
import pytest
import torch

from fewstep import pipelines, samplers
from fewstep.errors import FewstepError
from fewstep.pipelines.zoo import CLASSES, features
from fewstep.samplers import Grid, NoiseSchedule
from tests.eval_fixtures import tiny_pipeline
from tests.tensor_fixtures import generators


def pictures(n, seed=0):
    return torch.rand(n, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def latents_of(pipe, images):
    with torch.no_grad():
        return pipe.vae.encode(2 * images - 1).latent_dist.mode() * pipe.vae.config.scaling_factor


def embedding(pipe, prompt, n):
    return pipe.encode_prompt([prompt] * n, "cpu", 1, False)[0]


def test_it_is_the_published_loop(pipe):
    """InfEdit's ddcm_sampler at eta = 1, in terms of eps; both streams without guidance."""
    images, steps = pictures(2), 4
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    grid = Grid.uniform_t(schedule, steps, spacing="trailing")
    x0, draws = latents_of(pipe, images), generators(3, 4)
    source, target = (embedding(pipe, prompt, 2) for prompt in ("a", "a b"))

    def noise():
        return torch.cat([torch.randn(x0[:1].shape, generator=g) for g in draws])

    z = noise()
    bar = (grid.alpha**2).tolist()
    x_s = x_t = bar[0] ** 0.5 * x0 + (1 - bar[0]) ** 0.5 * z
    with torch.no_grad():
        for i, t in enumerate(grid.model_time.tolist()):
            e_s, e_t = (
                pipe.unet(x, t, encoder_hidden_states=e).sample for x, e in ((x_s, source), (x_t, target))
            )  # fmt: skip
            pred_x0 = x0 + ((x_t - x_s) - (1 - bar[i]) ** 0.5 * (e_t - e_s)) / bar[i] ** 0.5
            if i + 1 < steps:
                z = noise()
                x_s, x_t = (bar[i + 1] ** 0.5 * c + (1 - bar[i + 1]) ** 0.5 * z for c in (x0, pred_x0))
    ours = pipelines.edit(
        pipe, images, "a", "a b", num_inference_steps=steps, guidance_scale=1, generator=generators(3, 4),
        output_type="latent",
    )  # fmt: skip
    # float32: the difference of two x0 of size |x| / alpha, alpha = 0.07 at the noisiest step
    assert torch.allclose(ours, pred_x0, rtol=0, atol=20 * steps * 1.2e-7 * float(x0.abs().max()) / bar[0] ** 0.5)
    assert not torch.allclose(ours, x0, atol=1e-2)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equal_prompts_give_the_image_back(pipe, scale):
    """The two streams see equal numbers, so nothing but the rounding of the network's kernels tells them apart."""
    images = pictures(2)
    out = pipelines.edit(
        pipe, images, "a b", "a b", num_inference_steps=5, guidance_scale=scale, generator=generators(1, 2),
        output_type="latent",
    )  # fmt: skip
    x0 = latents_of(pipe, images)
    assert torch.allclose(out, x0, rtol=0, atol=1e-4 * float(x0.abs().max()))
    decoded = pipelines.edit(
        pipe, images, "a b", "a b", num_inference_steps=2, generator=generators(1, 2), output_type="pt"
    )
    with torch.no_grad():
        expected = (pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(decoded, expected, atol=1e-4)


def test_an_image_depends_on_its_own_generator_alone(pipe):
    images = pictures(3)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    whole = pipelines.edit(pipe, images, "a", ["b", "a b", "b a"], generator=generators(1, 2, 3), **options)
    alone = pipelines.edit(pipe, images[1:2], "a", "a b", generator=generators(2), **options)
    assert torch.allclose(alone, whole[1:2], rtol=0, atol=1e-3 * float(whole.abs().max()))
    other = pipelines.edit(pipe, images[1:2], "a", "a b", generator=generators(9), **options)
    assert not torch.allclose(alone, other, atol=1e-2)


def test_less_strength_takes_the_last_steps_only(pipe):
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(float(args[1])))
    try:
        for strength, expected in ((1.0, 10), (0.5, 5), (0.01, 1)):
            calls.clear()
            pipelines.edit(
                pipe, pictures(1), "a", "b", num_inference_steps=10, strength=strength, guidance_scale=1,
                generator=generators(0), output_type="latent",
            )  # fmt: skip
            assert len(calls) == 2 * expected
            assert min(calls) == 99.0  # trailing: 999, 899, ..., 99
    finally:
        handle.remove()


def test_what_it_cannot_take_is_named(pipe):
    with pytest.raises(FewstepError, match="2 prompts were given for 1 images"):
        pipelines.edit(pipe, pictures(1), "a", ["b", "c"])
    with pytest.raises(FewstepError, match=r"at most 1, got 1\.5"):
        pipelines.edit(pipe, pictures(1), "a", "b", strength=1.5)
    with pytest.raises(FewstepError, match="2 generators were given for a batch of 1"):
        pipelines.edit(pipe, pictures(1), "a", "b", generator=generators(0, 1))
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(4, block_out_channels=(32, 64), **blocks)
    other = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    with pytest.raises(FewstepError, match="DDIMPipeline has no vae; edit takes a StableDiffusionPipeline"):
        pipelines.edit(other, pictures(1), "a", "b")


def test_sneakers_become_ankle_boots():
    """Four sneakers that the classifier takes for sneakers: after the edit most of them are ankle boots to it."""
    pipe, classifier = pipelines.load("fashion-sd"), features()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = samplers.DPMSolverScheduler.from_config(pipe.scheduler.config)

    def verdicts(images):
        with torch.no_grad():
            return [CLASSES[i] for i in classifier.logits(images.float()).argmax(1).tolist()]

    sneakers = pipe(
        ["a sneaker"] * 4, num_inference_steps=6, guidance_scale=2.0, generator=generators(0, 1, 2, 3), output_type="pt"
    ).images
    assert verdicts(sneakers) == ["sneaker"] * 4
    boots = pipelines.edit(
        pipe, sneakers, "a sneaker", "an ankle boot", num_inference_steps=8, guidance_scale=1.0,
        generator=generators(10, 11, 12, 13), output_type="pt",
    )  # fmt: skip
    assert boots.shape == sneakers.shape
    assert verdicts(boots).count("ankle boot") >= 3
    # an edit, not a new picture: what sets a boot apart from the others resembles what sets its own sneaker apart; three of
    # four by chance has a probability of 1/20
    apart = [(x - x.mean(0)).flatten(1) for x in (boots, sneakers)]
    likeness = torch.nn.functional.cosine_similarity(apart[0][:, None], apart[1][None], dim=2)
    assert int((likeness.argmax(1) == torch.arange(4)).sum()) >= 3
