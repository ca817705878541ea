"""A quantised network as diffusers' Nunchaku Lite loader reads it: a folder with config.json and a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as packed
from torch import Tensor, nn

from fewstep.artifact import write_bytes
from fewstep.errors import FewstepError
from fewstep.quant.exporters.fragments import COLUMNS, RANK, ROWS, low_rank, micro_scale_rows, scale_rows, weight_words
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.layers.build import unbuild
from fewstep.quant.layers.linear import QuantLinear
from fewstep.quant.sites import canonical, quantized_layers
from fewstep.quant.state import RECORD, unwrapped

_PRECISIONS = {"int4:g64": ("int4", 64), "nvfp4": ("nvfp4", 16)}


def save_nunchaku_lite(module: nn.Module, folder: str | Path, *, dtype: torch.dtype = torch.float16) -> dict[str, str]:
    """Write a quantised diffusers model so that ``from_pretrained`` loads it with nunchaku's kernels.

    Linear layers with 4-bit weights and inputs of one precision (``int4:g64``, or ``nvfp4``) are targets: codes, scales,
    smoothing factors and branch are written in the kernel's order, with zeros up to a common rank. All other layers,
    convolutions too, are written with the weights that their codes stand for, in ``dtype``.

    The layout is what the documented converters write and is tested against the fragments of the PTX ISA; it has not been run
    on nunchaku's kernels, which need a GPU of sm_75 to 89 or sm_100 on and ``pip install kernels``.

    Args:
        module: quantised, by ``SVDQuant(shift=False)`` best: the loader knows no unsigned inputs.
        folder: made if it is not there.
        dtype: float16, in which int4's scales are exact, or bfloat16.

    Returns:
        Why each quantised layer that is no target is none.

    Raises:
        FewstepError: not quantised, no diffusers model, another dtype, or no layer that fits.

    Source: diffusers' ``NunchakuLiteQuantizationConfig``; SVDQuant, 2411.05007.
    """
    model: Any = unwrapped(module)
    if getattr(model, RECORD, None) is None:
        raise FewstepError(f"{type(model).__name__} is not quantised; quantize_ it first")
    if not hasattr(model, "to_json_string"):
        raise FewstepError(
            f"{type(model).__name__} is no diffusers model; its loader could not make one from the config"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise FewstepError(f"dtype is {dtype}; the kernels take torch.float16 and torch.bfloat16")
    layers = quantized_layers(model)
    kinds = [_kind(layer) for layer in layers.values() if _unfit(layer) is None]
    precision = max(sorted(set(kinds)), key=kinds.count, default="")
    left = {name: reason for name, layer in layers.items() if (reason := _unfit(layer, precision or None)) is not None}
    targets = [name for name in layers if name not in left]
    if not targets:
        name, reason = next(iter(left.items()))
        raise FewstepError(f"no layer fits nunchaku's kernels; {name}: {reason}")
    chosen = [layers[name] for name in targets]
    rank = max(
        (len(layer.down) for layer in chosen if isinstance(layer, QuantLayer) and layer.down is not None), default=0
    )
    rank = -(-rank // RANK) * RANK
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if name in left:
            kept: Any = unbuild(layer).state_dict()
        else:
            assert isinstance(layer, QuantLinear)
            kept = target_state(layer, rank, dtype)
        tensors |= {f"{name}.{key}": _cast(value, dtype) if name in left else value for key, value in kept.items()}
    inside = tuple(f"{name}." for name in layers)
    for path, value in model.state_dict().items():
        if not canonical(path).startswith(inside):
            tensors[canonical(path)] = _cast(value, dtype)
    _write(model, Path(folder), tensors, precision, rank, targets, dtype)
    return left


def target_state(layer: QuantLinear, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arrays of one target, in the kernel's order, on the CPU."""
    n, k = layer.shape
    weight = layer.quantized_weight()
    cast: Callable[[Tensor], Tensor] = lambda value: value.detach().float().to(dtype)  # noqa: E731
    smooth = torch.ones(k) if layer.smooth is None else layer.smooth.cpu()
    down, up = torch.zeros(rank, k), torch.zeros(n, rank)
    if layer.down is not None and layer.up is not None:
        down[: len(layer.down)], up[:, : len(layer.down)] = layer.down.float().cpu(), layer.up.float().cpu()
    state = {
        "qweight": weight_words(weight.codes.cpu()),
        "smooth_factor": scale_rows(cast(smooth)[:, None]).reshape(-1),
        "proj_down": low_rank(cast(down), down=True),
        "proj_up": low_rank(cast(up), down=False),
    }
    if layer.bias is not None:
        state["bias"] = scale_rows(cast(layer.bias.cpu())[:, None]).reshape(-1)
    if weight.tensor_scale is None:
        return {**state, "wscales": scale_rows(cast(weight.scale.cpu()))}
    # The tensor's scale as a power of two times a factor of each row: 16 bits have few exponents for its small numbers.
    total = weight.tensor_scale.float().cpu()
    fraction, exponent = torch.frexp(total)
    state["wscales"] = micro_scale_rows(layer.scale.detach().cpu()).view(torch.float8_e4m3fn)
    state["wtscale"] = cast(torch.ldexp(torch.ones(1), exponent))
    state["wcscales"] = scale_rows(cast(fraction.expand(n))[:, None]).reshape(-1)
    return state


def _kind(layer: nn.Module) -> str:
    assert isinstance(layer, QuantLinear)
    return str(layer.plan.weight)


def _unfit(layer: nn.Module, precision: str | None = None) -> str | None:
    """Why a layer is no target, of any precision or of this one; None where it is."""
    if not isinstance(layer, QuantLinear):
        return "only whole linear layers can be targets"
    plan, (n, k) = layer.plan, layer.shape
    weight = str(plan.weight)
    if weight not in _PRECISIONS or str(plan.activation) != weight:
        return f"{plan.weight} x {plan.activation}; the kernels take int4:g64 or nvfp4 for both"
    if precision not in (None, weight):
        return f"one file has one precision, here {precision}"
    if plan.shift or plan.static or plan.first_token:
        return "the loader knows no shift, stored input scales or first tokens"
    if n % ROWS or k % COLUMNS:
        return f"{n} x {k}; multiples of {ROWS} and {COLUMNS} are needed"
    return None


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().cpu()
    return (value.to(dtype) if value.is_floating_point() else value).contiguous()


def _write(
    model: Any,
    folder: Path,
    tensors: dict[str, Tensor],
    precision: str,
    rank: int,
    targets: list[str],
    dtype: torch.dtype,
) -> None:
    kind, group = _PRECISIONS[precision]
    config = json.loads(model.to_json_string())
    config["quantization_config"] = {
        "quant_method": "nunchaku_lite",
        "compute_dtype": str(dtype).removeprefix("torch."),
        "svdq_w4a4": {"precision": kind, "group_size": group, "rank": rank, "targets": targets},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "diffusion_pytorch_model.safetensors", packed(tensors, metadata={"format": "pt"}))
    write_bytes(
        folder / "config.json", (json.dumps(config, indent=2) + "\n").encode()
    )  # last: without it nothing is there
