"""What one number is stored as: an integer, a small float, a power or a sign, each with its codes and their values.

An element knows nothing of scales: it rounds numbers that already lie in its range. :mod:`.format` scales them there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown


class _HasBits(Protocol):
    @property
    def bits(self) -> int: ...


class AsNamed:
    """A code takes as many bits, in a file and in the count of a plan, as the element has."""

    @property
    def storage_bits(self: _HasBits) -> int:
        return self.bits

    @property
    def cost_bits(self: _HasBits) -> float:
        return float(self.bits)


@dataclass(frozen=True)
class Integer:
    """Whole numbers from ``low`` to ``high``, stored in two's complement (unsigned where ``low`` is 0).

    Kinds: ``int``, -(2^(b-1) - 1) .. 2^(b-1) - 1, so that -x has a code wherever x has; ``uint``, 0 .. 2^b - 1 for numbers
    that are not negative; ``zint``, the same codes about a zero point that every scale brings along; ``bint``,
    -2^(b-1) .. 2^(b-1), one level more than b bits have, log2(2^b + 1) bits by BitsFusion's count (2406.04333, sec. 4).
    """

    bits: int
    kind: Literal["int", "uint", "zint", "bint"] = "int"

    def __post_init__(self) -> None:
        least = 2 if self.kind == "int" else 1
        most = 7 if self.kind == "bint" else 8
        if not least <= self.bits <= most:
            raise FewstepError(f"{self.kind} has {self.bits} bits; give {least} to {most}")

    @property
    def name(self) -> str:
        return f"{self.kind}{self.bits}"

    @property
    def low(self) -> int:
        half = 1 << (self.bits - 1)
        return {"int": 1 - half, "bint": -half}.get(self.kind, 0)

    @property
    def high(self) -> int:
        half = 1 << (self.bits - 1)
        return {"int": half - 1, "bint": half}.get(self.kind, 2 * half - 1)

    @property
    def max(self) -> float:
        """The largest magnitude."""
        return float(self.high)

    @property
    def signed(self) -> bool:
        return self.low < 0

    @property
    def storage_bits(self) -> int:
        """Bits a code takes in a file: balanced integers need one more than they are named after."""
        return self.bits + (self.kind == "bint")

    @property
    def cost_bits(self) -> float:
        """Bits of information in a code."""
        return math.log2(self.high - self.low + 1) if self.kind == "bint" else float(self.bits)

    def encode(self, x: Tensor) -> Tensor:
        """The nearest code, ties to even: int8 for signed kinds, uint8 for the others."""
        return self.round(x).to(torch.int8 if self.signed else torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float32)

    def round(self, x: Tensor) -> Tensor:
        """``decode(encode(x))`` in the dtype of x."""
        return x.round().clamp(self.low, self.high)


@dataclass(frozen=True)
class Minifloat(AsNamed):
    """A float of one sign, ``exponent`` and ``mantissa`` bits, biased by 2^(e-1) - 1, with subnormals.

    Codes are sign, exponent, mantissa from the highest bit down. Special values: ``fn`` gives up the highest code for NaN
    (E4M3); ``ieee`` the highest exponent for infinity and NaN (E5M2); ``finite`` none (E2M1, E3M2, E2M3 and any other).

    Source: FP8 Formats for Deep Learning, 2209.05433, table 1; OCP Microscaling Formats 1.0, sec. 5.3.
    """

    exponent: int
    mantissa: int
    special: Literal["finite", "fn", "ieee"] = "finite"
    signed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (1 <= self.exponent <= 6 and 0 <= self.mantissa <= 6 and self.bits <= 8):
            raise FewstepError(f"{self.name} is no float of at most 8 bits with 1 to 6 exponent bits")

    @property
    def name(self) -> str:
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal number and of all subnormal ones."""
        return 1 - self.bias

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float(_magnitudes(self)[-2 - _above(self)])

    @property
    def max_exponent(self) -> int:
        """floor(log2 max): what an E8M0 scale takes off."""
        return math.frexp(self.max)[1] - 1

    def encode(self, x: Tensor, *, saturate: bool = True) -> Tensor:
        """The nearest code, ties to the even mantissa: uint8.

        Args:
            x: any floating dtype.
            saturate: beyond :attr:`max` the largest finite code; without it NaN or infinity, as torch's cast gives.
                A ``finite`` format has neither and always saturates. NaN stays NaN where there is one and becomes 0 else.
        """
        magnitude = x.abs().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if saturate or self.special == "finite":
            magnitude = magnitude.clamp(max=self.max)
        table = _magnitudes(self).to(magnitude)
        middle = (table[1:] + table[:-1]) / 2
        down, up = torch.bucketize(magnitude, middle), torch.bucketize(magnitude, middle, right=True)
        code = torch.where(down % 2 == 1, up, down)  # they differ at ties only, and one of the two is even
        overflow = 2 ** (self.bits - 1) - _above(self)  # the code beyond the largest finite one: infinity or NaN
        code = code.clamp(max=overflow - (self.special == "finite"))
        nan = x.isnan()
        code = torch.where(nan, 0 if self.special == "finite" else 2 ** (self.bits - 1) - 1, code)
        sign = torch.signbit(x).to(code.dtype) << (self.bits - 1)
        return (code | sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of uint8 codes."""
        return _values(self).to(codes.device)[codes.long()]

    def round(self, x: Tensor) -> Tensor:
        """``decode(encode(x))`` in the dtype of x (float32 or float64), without a search: exact all the same."""
        clipped = x.clamp(-self.max, self.max)
        exponent = torch.frexp(clipped)[1] - 1
        step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=self.least_exponent) - self.mantissa)
        return (clipped / step).round() * step  # a power of two divides exactly, so the only rounding is the one meant


@dataclass(frozen=True)
class Sign(AsNamed):
    """+1 or -1 for each of ``bases`` bases; code bit i says whether base i is positive. 0 counts as positive.

    Every base has a scale of its own, so only :mod:`.binary` can encode; see there.
    """

    bases: int = 1
    signed: ClassVar[bool] = False  # how codes are stored, not what they mean
    max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.bases <= 8:
            raise FewstepError(f"binary numbers have {self.bases} bases; give 1 to 8")

    @property
    def name(self) -> str:
        return f"bin{self.bases}"

    @property
    def bits(self) -> int:
        return self.bases


@dataclass(frozen=True)
class Log(AsNamed):
    """Powers from 1 down: code q is 2^(-q step / 16), the last code 0. For numbers that are not negative and mostly small.

    After a softmax or a GELU; ``step`` 16 is log2, 8 is log sqrt 2, others are bases found by search. Rounded to the nearest
    exponent; below half of the smallest power there is 0.

    Source: RepQ-ViT, 2212.08254, sec. 3.4 (log sqrt 2); AdaLog, 2407.12951, sec. 3.2 (the base a parameter).
    """

    bits: int
    step: int = 16
    signed: ClassVar[bool] = False
    max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or not 1 <= self.step <= 64:
            raise FewstepError(
                f"log{self.bits}s{self.step}: powers have 2 to 8 bits, steps of 1 to 64 sixteenths of an octave"
            )

    @property
    def name(self) -> str:
        return f"log{self.bits}" + ("" if self.step == 16 else f"s{self.step}")

    @property
    def least(self) -> float:
        """The smallest power."""
        return float(2.0 ** (-(2**self.bits - 2) * self.step / 16))

    def encode(self, x: Tensor) -> Tensor:
        """Codes, uint8; negative numbers have that of 0."""
        last = 2**self.bits - 1
        exponents = (-16 / self.step * x.clamp(min=self.least / 2, max=1).log2()).round().clamp(0, last - 1)
        return torch.where(x < self.least / 2, float(last), exponents).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        values = torch.exp2(codes.to(torch.float32) * (-self.step / 16))
        return torch.where(codes == 2**self.bits - 1, 0.0, values)

    def round(self, x: Tensor) -> Tensor:
        """``decode(encode(x))`` in the dtype of x."""
        return self.decode(self.encode(x)).to(x.dtype)


Element = Integer | Minifloat | Log | Sign

E4M3 = Minifloat(4, 3, "fn")
E5M2 = Minifloat(5, 2, "ieee")
E2M1 = Minifloat(2, 1)
E3M2 = Minifloat(3, 2)
E2M3 = Minifloat(2, 3)

_INTEGER = re.compile(r"(int|uint|zint|bint)([1-8])")
_FLOAT = re.compile(r"e([1-6])m([0-6])")
_LOG = re.compile(r"log([2-8])(?:s([1-9][0-9]?))?")
_SIGN = re.compile(r"bin([1-8])")


def element(name: str) -> Element:
    """``int4``, ``uint8``, ``zint8``, ``bint2``, ``e4m3``, ``e2m1``, ``log4s8``, ``bin1`` ... by name.

    Raises:
        FewstepError: for a name that is none of these.
    """
    if match := _INTEGER.fullmatch(name):
        return Integer(int(match[2]), match[1])  # type: ignore[arg-type]
    if match := _FLOAT.fullmatch(name):
        known = {f.name: f for f in (E4M3, E5M2)}
        return known.get(name) or Minifloat(int(match[1]), int(match[2]))
    if match := _LOG.fullmatch(name):
        return Log(int(match[1]), int(match[2] or 16))
    if match := _SIGN.fullmatch(name):
        return Sign(int(match[1]))
    raise FewstepError(
        unknown("number format", name, ("int4", "uint4", "zint8", "bint2", "e4m3", "e2m1", "log4", "bin1"))
    )


def _above(element: Minifloat) -> int:
    """How many codes at the top of the table are no finite numbers."""
    return {"finite": 0, "fn": 1, "ieee": 1 << element.mantissa}[element.special]


@cache
def _magnitudes(element: Minifloat) -> Tensor:
    """The values of the codes without sign, float64, ascending: as if none were special, and one more beyond the last.

    The one more is where rounding overflows to: the middle between it and the last decides what is still finite.
    """
    code = torch.arange(2 ** (element.bits - 1) + 1)
    exponent, mantissa = code >> element.mantissa, code & (2**element.mantissa - 1)
    unit = 2.0**-element.mantissa
    normal = torch.ldexp(1 + mantissa.double() * unit, exponent - element.bias)
    subnormal = torch.ldexp(mantissa.double() * unit, torch.tensor(element.least_exponent))
    return torch.where(exponent > 0, normal, subnormal)


@cache
def _values(element: Minifloat) -> Tensor:
    """(2^bits,) float32: the value of each code."""
    values = _magnitudes(element)[:-1].float()
    if element.special == "fn":
        values[-1] = math.nan
    elif element.special == "ieee":
        values[-(2**element.mantissa) :] = math.nan
        values[-(2**element.mantissa)] = math.inf
    return torch.cat([values, -values])
