"""LoRA on quantised layers without quantising again: adapters are columns more of the low-rank branch.

    y = ... + x [down; A]^T [up, s B]^T

Source: SVDQuant, 2411.05007, sec. 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError, unknown
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.sites import quantized_layers
from fewstep.quant.state import unwrapped
from fewstep.quant.views import weight_matrix

Adapter = tuple[Tensor, Tensor]


def add_lora_(module: nn.Module, adapters: Mapping[str, Adapter], scale: float = 1.0) -> int:
    """Add LoRA adapters to the branches of quantised layers, in place.

    Args:
        module: a quantised network.
        adapters: by layer A and B: (r, K) and (N, r) of a linear layer; (r, C, h, w) and (N, r) or (N, r, 1, 1) of a
            convolution. The layer's weight becomes W + scale B A.
        scale: alpha / r, or what the adapter's strength is.

    Returns:
        How many layers have one more adapter. Take them off with :func:`remove_lora_`.

    Raises:
        FewstepError: for a layer that is not quantised, or shapes that are not the layer's; nothing is changed then.
    """
    layers = quantized_layers(unwrapped(module))
    ready: list[tuple[QuantLayer, Tensor, Tensor]] = []
    for name, (a, b) in adapters.items():
        layer = layers.get(name)
        if layer is None:
            raise FewstepError(unknown("quantised layer", name, layers))
        if not isinstance(layer, QuantLayer):
            raise FewstepError(f"{name} is split into parts, which take no adapter")
        down, up = weight_matrix(a), b.flatten(1)
        n, k = layer.shape[0], layer.columns
        if down.shape[1:] != (k,) or up.shape != (n, down.shape[0]):
            raise FewstepError(
                f"{name}: A is {tuple(a.shape)} and B {tuple(b.shape)}; rank x {k} and {n} x rank are needed"
            )
        like = layer.codes
        ready.append((layer, down.to(like.device, layer.dtype), (scale * up.float()).to(like.device, layer.dtype)))
    for layer, down, up in ready:
        _extend(layer, down, up)
    return len(ready)


def remove_lora_(module: nn.Module) -> int:
    """Take all adapters off again; the branches are as they were. Returns from how many layers."""
    count = 0
    for layer in quantized_layers(unwrapped(module)).values():
        if isinstance(layer, QuantLayer) and layer.added:
            assert layer.down is not None
            assert layer.up is not None
            down, up, rank = layer.down.data, layer.up.data, layer.plan.rank
            layer.down = nn.Parameter(down[:rank].contiguous(), requires_grad=False) if rank else None
            layer.up = nn.Parameter(up[:, :rank].contiguous(), requires_grad=False) if rank else None
            layer.added = 0
            count += 1
    return count


def _extend(layer: QuantLayer, down: Tensor, up: Tensor) -> None:
    if layer.down is not None and layer.up is not None:
        down, up = torch.cat([layer.down.data, down]), torch.cat([layer.up.data, up], dim=1)
    layer.added = down.shape[0] - layer.plan.rank
    layer.down = nn.Parameter(down.contiguous(), requires_grad=False)
    layer.up = nn.Parameter(up.contiguous(), requires_grad=False)
