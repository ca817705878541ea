"""Inputs of the transformers' usual size, to count on: made of shapes that the configuration tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Zeros = Callable[..., torch.Tensor]


def _labels(batch: int, zeros: Zeros) -> torch.Tensor:
    return zeros(batch).to(torch.int64)


def _dit(config: Any, batch: int, zeros: Zeros) -> dict[str, Any]:
    return {
        "hidden_states": zeros(batch, config.in_channels, config.sample_size, config.sample_size),
        "timestep": _labels(batch, zeros),
        "class_labels": _labels(batch, zeros),
    }


def _pixart(config: Any, batch: int, zeros: Zeros) -> dict[str, Any]:
    arguments = {
        "hidden_states": zeros(batch, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": zeros(batch, 120, config.caption_channels or config.cross_attention_dim),
        "timestep": _labels(batch, zeros),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    if config.sample_size == 128 and config.get("use_additional_conditions") is not False:
        arguments["added_cond_kwargs"] = {"resolution": zeros(batch, 2), "aspect_ratio": zeros(batch, 1)}
    return arguments


def _sd3(config: Any, batch: int, zeros: Zeros) -> dict[str, Any]:
    return {
        "hidden_states": zeros(batch, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": zeros(batch, 333, config.joint_attention_dim),
        "pooled_projections": zeros(batch, config.pooled_projection_dim),
        "timestep": zeros(batch),
    }


def _flux(config: Any, batch: int, zeros: Zeros) -> dict[str, Any]:
    tokens = 64 * 64  # 1024 x 1024 pixels
    arguments = {
        "hidden_states": zeros(batch, tokens, config.in_channels),
        "encoder_hidden_states": zeros(batch, 512, config.joint_attention_dim),
        "pooled_projections": zeros(batch, config.pooled_projection_dim),
        "timestep": zeros(batch),
        "img_ids": zeros(tokens, 3),
        "txt_ids": zeros(512, 3),
    }
    if config.guidance_embeds:
        arguments["guidance"] = zeros(batch)
    return arguments


def _cogvideox(config: Any, batch: int, zeros: Zeros) -> dict[str, Any]:
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    return {
        "hidden_states": zeros(batch, frames, config.in_channels, config.sample_height, config.sample_width),
        "encoder_hidden_states": zeros(batch, config.max_text_seq_length, config.text_embed_dim),
        "timestep": _labels(batch, zeros),
    }


def _wan(config: Any, batch: int, zeros: Zeros) -> dict[str, Any]:
    return {
        "hidden_states": zeros(batch, config.in_channels, 21, 60, 104),  # 81 frames of 480 x 832 pixels
        "timestep": _labels(batch, zeros),
        "encoder_hidden_states": zeros(batch, 512, config.text_dim),
    }


EXAMPLES: dict[str, Callable[[Any, int, Zeros], dict[str, Any]]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "CogVideoXTransformer3DModel": _cogvideox,
    "WanTransformer3DModel": _wan,
}
