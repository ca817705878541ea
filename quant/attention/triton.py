"""The project's Triton kernel for attention in 8 bits: whether it can run, and running it."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from fewstep.quant.attention.plan import AttentionPlan


def missing(plan: AttentionPlan, device: torch.device) -> str | None:
    """Why the kernel cannot compute a plan on a device, None where it can."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install 'fewstep[quant]'"
    if device.type != "cuda":
        return "Triton compiles for GPUs"
    from fewstep.quant.kernels.triton.launch import config
    from fewstep.quant.kernels.triton.support import supported

    if (plan.qk, plan.pv) != ("int8", "float16"):
        return f"Triton's kernel computes int8 QK and float16 PV, not {plan}"
    capability = torch.cuda.get_device_capability(device)
    usable, why = supported(capability, "int8_attention")
    if not usable:
        return why
    tile = config("attention", capability)
    if plan.blocks[0] % tile.block_m or plan.blocks[1] % tile.block_n:
        return f"its tiles are of {tile.block_m} queries and {tile.block_n} keys, which do not divide blocks of {plan.blocks}"
    return None


def triton_attention(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None) -> Tensor:
    """As :func:`~fewstep.quant.attention.quantized_attention`, without a mask."""
    from fewstep.quant.kernels.triton import int8_attention

    return int8_attention(query, key, value, plan, scale)
