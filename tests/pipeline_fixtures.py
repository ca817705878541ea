"""Tiny random pipelines of the kinds that return no latents, or whose denoiser is a transformer: real diffusers classes."""

from typing import Any

import torch

from tests.eval_fixtures import quiet, tiny_vae
from tests.tensor_fixtures import generators


def tiny_dit_pipeline(seed: int = 0) -> Any:
    """DiTPipeline of 16 x 16 RGB images: 8 x 8 latents, a learned variance, guidance as one batch of 2N."""
    from diffusers import DDIMScheduler, DiTPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = tiny_vae()
        return quiet(DiTPipeline(tiny_dit(), vae, DDIMScheduler(clip_sample=False)))


def tiny_dit() -> Any:
    """DiTTransformer2DModel of 2 blocks, width 16 (2 heads of 8), 4 x 4 tokens."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
    ).eval()


def tiny_ddpm_pipeline(seed: int = 0) -> Any:
    """DDPMPipeline of 8 x 8 RGB images: its latents are its pixels."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
    return quiet(DDPMPipeline(unet.eval(), DDPMScheduler()))


def tiny_sd3_pipeline(seed: int = 0) -> Any:
    """StableDiffusion3Pipeline without text encoders, to be called with :func:`sd3_prompts`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=8,
        )
        vae = tiny_vae(shift_factor=0.1, scaling_factor=1.5)
    return quiet(
        StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def sd3_prompts(count: int) -> dict[str, torch.Tensor]:
    """Random embeddings of ``count`` prompts and of as many empty ones."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"prompt_embeds": (3, 16), "pooled_prompt_embeds": (16,)}
    return {
        sign + name: torch.randn(count, *shape, generator=generator)
        for sign in ("", "negative_")
        for name, shape in shapes.items()
    }


def seeded(count: int) -> list[torch.Generator]:
    return generators(*range(count))
