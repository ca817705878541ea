"""Where a UNet joins a skip connection to what comes from below: channels of two origins, which one scale serves badly."""

from __future__ import annotations

from typing import Any

from torch import nn


def joints(model: nn.Module) -> dict[str, int]:
    """Of each layer that reads a joined input the channel at which the skip connection begins.

    Those are ``conv1`` and ``conv_shortcut`` of the residual blocks of a diffusers UNet's ``up_blocks``; no other model has
    any.

    Source: Q-Diffusion, 2302.04304, sec. 4.2.
    """
    found: dict[str, int] = {}
    below: Any = getattr(getattr(model, "mid_block", None), "resnets", None)
    for i, block in enumerate(getattr(model, "up_blocks", ())):
        for j, resnet in enumerate(getattr(block, "resnets", ())):
            if below is not None and (first := _out_channels(below[-1] if j == 0 else block.resnets[j - 1])):
                for name in ("conv1", "conv_shortcut"):
                    layer = getattr(resnet, name, None)
                    if isinstance(layer, nn.Conv2d) and first < layer.in_channels:
                        found[f"up_blocks.{i}.resnets.{j}.{name}"] = first
        below = getattr(block, "resnets", None)
    return found


def _out_channels(resnet: nn.Module) -> int:
    return int(getattr(resnet, "out_channels", 0) or 0)
