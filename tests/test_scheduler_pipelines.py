"""The diffusers schedulers in pipelines: from disk in another process, image to image, and a flow pipeline's own grid."""

import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from fewstep import samplers
from tests.eval_fixtures import tiny_pipeline
from tests.scheduler_fixtures import OURS, scheduler
from tests.tensor_fixtures import relative


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, n=1, **kwargs):
    g = [torch.Generator().manual_seed(i) for i in range(n)]
    out = pipe("a dress", num_images_per_prompt=n, generator=g, output_type="pt", num_inference_steps=5, **kwargs)
    return out.images


@pytest.mark.parametrize("name", OURS)
def test_stable_diffusion_end_to_end_and_back_from_disk(pipe, name, tmp_path):
    pipe.scheduler = scheduler(name, pipe.scheduler.config)
    two = images(pipe, 2)
    assert relative(images(pipe, 1), two[:1]) < 1e-4  # batches sum in another order
    pipe.save_pretrained(tmp_path)
    # a fresh process loads the pipeline with our scheduler in it
    code = (
        "import sys, torch, diffusers, fewstep; p = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1]);"
        "p.set_progress_bar_config(disable=True);"
        "g = [torch.Generator().manual_seed(i) for i in range(2)];"
        "x = p('a dress', num_images_per_prompt=2, generator=g, output_type='pt', num_inference_steps=5).images;"
        "torch.save(x, sys.argv[2]); print(type(p.scheduler).__module__, type(p.scheduler).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "x.pt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["fewstep", f"{name}Scheduler"]
    assert relative(torch.load(tmp_path / "x.pt"), two) < 1e-4


def test_image_to_image(pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    for name in OURS:
        parts["scheduler"] = scheduler(name, pipe.scheduler.config)
        i2i = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        i2i.set_progress_bar_config(disable=True)
        start = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(4))
        call = {"image": start, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        out = i2i("a bag", strength=0.5, num_inference_steps=8, **call).images
        assert out.shape == (1, 1, 32, 32)
        assert out.isfinite().all()
        assert parts["scheduler"].step_index == 8
        assert len(parts["scheduler"]._active.calls) == 4


def test_stable_diffusion_3_passes_its_own_grid():
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0,
    )  # fmt: skip
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=euler, **dict.fromkeys(names))
    pipe.set_progress_bar_config(disable=True)

    def latents(**kwargs):
        g = torch.Generator().manual_seed(0)
        return pipe(
            prompt_embeds=torch.ones(1, 3, 32), pooled_prompt_embeds=torch.ones(1, 16), guidance_scale=1.0, generator=g,
            height=8, width=8, output_type="latent", **kwargs,
        ).images  # fmt: skip

    sigmas = np.linspace(1, 1 / 6, 6).tolist()
    theirs = latents(sigmas=sigmas)
    pipe.scheduler = samplers.DDIMScheduler.from_config(euler.config)
    assert relative(latents(sigmas=sigmas), theirs) < 1e-4
    assert relative(latents(num_inference_steps=6), theirs) < 1e-4
    # more steps come nearer to the fine solution, and a second-order solver nearer still
    fine = latents(num_inference_steps=200)
    first = relative(latents(num_inference_steps=12), fine)
    pipe.scheduler = samplers.DPMSolverScheduler.from_config(euler.config)
    assert relative(latents(num_inference_steps=12), fine) < first
