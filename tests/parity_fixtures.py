"""Tiny random pipelines of further kinds, without text encoders: real diffusers classes, called with random embeddings."""

from typing import Any

import torch

from tests.eval_fixtures import quiet, tiny_pipeline, tiny_unet, tiny_vae


def tiny_controlnet_pipeline() -> Any:
    """StableDiffusionControlNetPipeline over the tiny Stable Diffusion."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    base = tiny_pipeline()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        control = ControlNetModel.from_unet(
            base.unet, conditioning_embedding_out_channels=(8, 16, 16), conditioning_channels=1
        ).eval()
        # a fresh ControlNet is silent: its last convolutions are zero
        for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.1)
    parts = {k: v for k, v in base.components.items() if k != "image_encoder"}
    return quiet(StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False))


def tiny_sdxl_pipeline() -> Any:
    """StableDiffusionXLPipeline of 16 x 16 RGB images; prompts as embeddings of width 16, pooled 8."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny_unet(
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 + 6 * 8,
        )
        vae = tiny_vae()
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
            force_zeros_for_empty_prompt=True,
            **nothing,
        )
    )


def tiny_pixart_pipeline() -> Any:
    """PixArtAlphaPipeline of 16 x 16 RGB images, which learned a variance."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            norm_type="ada_norm_single",
            use_additional_conditions=False,
        )
        vae = tiny_vae()
    return quiet(
        PixArtAlphaPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            transformer=transformer.eval(),
            scheduler=DPMSolverMultistepScheduler(),
        )
    )


def tiny_flux_pipeline() -> Any:
    """FluxPipeline of 16 x 16 RGB images: packed latents, shift by resolution."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        )
        vae = tiny_vae(shift_factor=0.1, scaling_factor=1.5)
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=vae,
            transformer=transformer.eval(), **nothing,
        )
    )  # fmt: skip


def tiny_wan_pipeline() -> Any:
    """WanPipeline of 5 frames of 16 x 16: a flow model of video."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
    return quiet(
        WanPipeline(
            tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )  # fmt: skip
