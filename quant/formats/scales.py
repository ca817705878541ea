"""What a scale is stored as: float32, float16, E4M3, or E8M0, a power of two in one byte."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.quant.formats.elements import E4M3

ScaleType = Literal["f32", "f16", "e4m3", "e8m0"]
SCALE_TYPES: tuple[str, ...] = get_args(ScaleType)
SCALE_BITS = {"f32": 32, "f16": 16, "e4m3": 8, "e8m0": 8}
PowerRule = Literal["floor", "rceil"]

_SMALLEST = {"f32": 2.0**-126, "f16": 2.0**-24, "e4m3": 2.0**-6}
"""The smallest in use: normal ones, whose reciprocals exist; of float16 the smallest there is, since it is widened first."""


def rounded(scale: Tensor, kind: ScaleType) -> Tensor:
    """A positive float32 scale as ``kind`` can say it, in float32; what is too small for it becomes the smallest it has."""
    if kind == "e8m0":
        raise ValueError("an E8M0 scale follows from the largest magnitude, not from a scale; use power_of_two")
    if kind == "f16":
        scale = scale.clamp(max=65504.0).half().float()
    elif kind == "e4m3":
        scale = E4M3.round(scale)
    return scale.clamp(min=_SMALLEST[kind])


def power_of_two(absmax: Tensor, element_max: float, max_exponent: int, rule: PowerRule) -> Tensor:
    """The E8M0 scale of blocks with these largest magnitudes, as float32 powers of two from 2^-127 to 2^127.

    ``floor`` is 2^(floor(log2 absmax) - floor(log2 element_max)), OCP's rule, with which the largest numbers saturate;
    ``rceil`` is 2^ceil(log2(absmax / element_max)), with which none does. A block of zeros has the smallest scale.

    Source: OCP Microscaling Formats 1.0, sec. 6.3.
    """
    if rule == "floor":
        exponent = torch.frexp(absmax)[1] - 1 - max_exponent
    else:
        fraction, exponent = torch.frexp(absmax / element_max)
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent)  # 0.5 * 2^e is the power 2^(e-1) itself
    exponent = torch.where(absmax > 0, exponent, -127).clamp(-127, 127)
    return torch.ldexp(torch.ones_like(absmax, dtype=torch.float64), exponent).float()


def to_e8m0(scale: Tensor) -> Tensor:
    """uint8 codes of powers of two: 2^(code - 127); 255 is NaN."""
    code = torch.frexp(scale.double())[1] - 1 + 127
    return torch.where(scale.isnan(), 255, code).to(torch.uint8)


def from_e8m0(codes: Tensor) -> Tensor:
    """float32 powers of two of E8M0 codes; 2^-127 is subnormal there, but exact."""
    value = torch.ldexp(torch.ones(codes.shape, dtype=torch.float64, device=codes.device), codes.int() - 127).float()
    return torch.where(codes == 255, torch.nan, value)


def stored(scale: Tensor, kind: ScaleType) -> Tensor:
    """Scales that are exact in ``kind`` as the bytes of a file: float32, float16, or uint8 codes."""
    if kind == "f32":
        return scale.float()
    if kind == "f16":
        return scale.half()
    return E4M3.encode(scale) if kind == "e4m3" else to_e8m0(scale)


def restored(scale: Tensor, kind: ScaleType) -> Tensor:
    """What :func:`stored` was given, float32."""
    if kind in ("f32", "f16"):
        return scale.float()
    return E4M3.decode(scale) if kind == "e4m3" else from_e8m0(scale)
