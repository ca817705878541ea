"""How a file stores what a plan leaves in floating point: exactly, in 16 bits, or its large matrices in 8.

In networks of 4 bits that rest weighs as much as the codes do: embeddings, tables of classes, low-rank branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown
from fewstep.quant.formats import Format, Quantized
from fewstep.quant.layers.base import INPUT, WEIGHT
from fewstep.quant.sites import role_of

Rest = Literal["exact", "float16", "int8"]

_FORMAT = Format.parse("int8:row/f16")
_LEAST = 4096
"""Numbers of a matrix below which 8 bits are not worth it."""
_HALF_MAX = 65504.0
_MODULATING = ("proj_out_1", "norm_out")
"""AdaLN's linear layers before the last one: at the edge of a model, but they do not see the sample."""


def check(rest: str) -> None:
    """FewstepError for a name that is none of these."""
    if rest not in get_args(Rest):
        raise FewstepError(unknown("rest", rest, get_args(Rest)))


def packed(name: str, value: Tensor, rest: Rest, *, buffer: bool = False) -> tuple[dict[str, Tensor], Any]:
    """What is written of one tensor, by name, and what :func:`restored` must know beside its dtype, None for nothing.

    ``exact``: in the fewest bytes that keep every bit. ``float16``: numbers rounded to float16 where none overflows;
    codes, scales and small buffers exact. ``int8``: so too, and matrices of 4096 numbers or more with 8 bits and a float16 scale
    a row (a branch's up-projection: a direction), but for the first and last layers, which see and make the sample itself.

    Args:
        name: dotted, of the parameter.
        value: on the CPU.
        buffer: whether it is a buffer: frequencies and the like, which are few, are kept exactly, tables of positions in
            float16 at least.
    """
    layer, _, last = name.rpartition(".")
    fixed = rest == "exact" or last in (*WEIGHT, *INPUT) or (buffer and value.numel() < _LEAST)
    if fixed or value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return {name: narrowest(value)}, None
    top = float(value.abs().max()) if value.numel() else 0.0
    if not top <= _HALF_MAX:  # NaN too
        return {name: value}, None
    sample = role_of(layer, value.ndim == 4) == "edge" and layer.split(".")[0] not in _MODULATING
    large = not buffer and value.ndim >= 2 and value.numel() >= _LEAST and not sample
    if rest == "float16" or not large:
        return {name: value.half() if value.dtype == torch.float32 else value}, None
    turned = last == "up"
    kept = _FORMAT.encode((value.t() if turned else value.flatten(1)).float()).packed()
    return {f"{name}|{part}": array for part, array in kept.items()}, {"shape": list(value.shape), "turned": turned}


def restored(tensors: Mapping[str, Tensor], about: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Tensors by name of what :func:`packed` made of them, 8-bit ones in float32."""
    found = {name: value for name, value in tensors.items() if "|" not in name}
    for name, how in about.items():
        shape = [int(size) for size in how["shape"]]
        columns = shape[0] if how["turned"] else int(torch.Size(shape[1:]).numel())
        codes, scale = (tensors[f"{name}|{part}"] for part in ("codes", "scale"))
        value = Quantized.from_packed(_FORMAT, columns, codes, scale).decode()
        found[name] = (value.t() if how["turned"] else value).reshape(shape).contiguous()
    return found


def narrowest(value: Tensor) -> Tensor:
    """float32 as float16 where that keeps every number; everything else as it is."""
    if value.dtype != torch.float32:
        return value
    half = value.half()
    return half if torch.equal(half.float(), value) else value
