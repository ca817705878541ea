"""Format: an element, which numbers share a scale, and what that scale is stored as. Encodes (rows, K) matrices.

Rows and columns as a matrix product has them: of a weight (N, K), of activations (M, K). A convolution's tensors come as
matrices too, channels last, so that a group lies within one pixel; :mod:`fewstep.quant.views` makes them so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown
from fewstep.quant.formats import binary, packing, scales
from fewstep.quant.formats.blocks import blocks
from fewstep.quant.formats.elements import Element, Integer, Minifloat, Sign, element
from fewstep.quant.formats.scales import PowerRule, ScaleType

Granularity = Literal["tensor", "row", "group"]


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: ``Format.parse("int4:g64")``; ``str()`` is what :meth:`parse` reads.

    Attributes:
        element: what one number is.
        granularity: one scale for everything, for each row, or for each group of columns of a row.
        group: columns of a group, 0 for the others.
        scale: what a scale is stored as. With ``e4m3`` there is a float32 scale of the whole matrix on top (NVFP4).
        rule: how an E8M0 scale follows from a block's largest magnitude.
    """

    element: Element
    granularity: Granularity = "row"
    group: int = 0
    scale: ScaleType = "f32"
    rule: PowerRule = "rceil"

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group > 0):
            raise FewstepError(
                f"granularity {self.granularity!r} with a group of {self.group} columns; groups need 1 or more"
            )
        if self.scale in ("e4m3", "e8m0") and not isinstance(self.element, Minifloat):
            raise FewstepError(f"{self.element.name} with scales in {self.scale}; those are for floats, use f16 or f32")

    # -- names --------------------------------------------------------------------------------------------------------
    @classmethod
    def parse(cls, text: str | Format) -> Format:
        """Read ``element:tensor``, ``element:row`` or ``element:gN``, with ``/scale`` where it is not the usual one.

        The usual scale is f16 for groups and f32 else. ``nvfp4``, ``mxfp4``, ``mxfp8`` and ``fp8`` are short for
        ``e2m1:g16/e4m3``, ``e2m1:g32/e8m0``, ``e4m3:g32/e8m0`` and ``e4m3:row``; a bare element has a scale a row.

        Raises:
            FewstepError: for anything else.
        """
        if isinstance(text, Format):
            return text
        spelled = ALIASES.get(text, text)
        match = _SPELLING.fullmatch(spelled)
        if not match:
            raise FewstepError(
                f"{text!r} is no number format; write one like 'int4:g64', 'int8:row' or 'e2m1:g32/e8m0'"
            )
        group = int(match["group"] or 0)
        granularity = cast(Granularity, "group" if match["group"] else match["whole"] or "row")
        scale, _, rule = (match["scale"] or ("f16" if group else "f32")).partition("-")
        if scale not in scales.SCALE_TYPES or rule not in ("", "floor", "rceil"):
            raise FewstepError(unknown("kind of scale", match["scale"], (*scales.SCALE_TYPES, "e8m0-floor")))
        return cls(element(match["element"]), granularity, group, cast(Any, scale), cast(Any, rule or "rceil"))

    def __str__(self) -> str:
        usual = "f16" if self.group else "f32"
        scale = self.scale + ("-floor" if self.scale == "e8m0" and self.rule == "floor" else "")
        spelled = f"{self.element.name}:{f'g{self.group}' if self.group else self.granularity}"
        spelled += "" if scale == usual else f"/{scale}"
        return _SHORT.get(spelled, spelled)

    def grouped(self, group: int) -> Format:
        """The same with groups of other size."""
        return replace(self, granularity="group", group=group)

    # -- cost ---------------------------------------------------------------------------------------------------------
    @property
    def two_level(self) -> bool:
        return self.scale == "e4m3"

    def groups(self, columns: int) -> int:
        """How many scales a row of so many columns has.

        Raises:
            FewstepError: where groups do not divide the columns.
        """
        if not self.group:
            return 1
        if columns % self.group:
            raise FewstepError(
                f"{self} has groups of {self.group}, which do not divide {columns} columns; "
                f"the largest group that does is {_largest_divisor(columns, self.group)}"
            )
        return columns // self.group

    def bits(self, rows: int, columns: int) -> float:
        """Bits a number of a (rows, columns) matrix, its share of the scales and zero points included."""
        return 8 * self.nbytes(rows, columns) / (rows * columns)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a stored (rows, columns) matrix."""
        count = self.groups(columns) * (1 if self.granularity == "tensor" else rows)
        bases = self.element.bases if isinstance(self.element, Sign) else 1
        codes = rows * packing.packed_width(columns, self.element.storage_bits)
        zeros = count if self.has_zero else 0
        return codes + count * bases * scales.SCALE_BITS[self.scale] // 8 + zeros + 4 * self.two_level

    @property
    def has_zero(self) -> bool:
        return isinstance(self.element, Integer) and self.element.kind == "zint"

    # -- numbers ------------------------------------------------------------------------------------------------------
    def encode(
        self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, tensor_scale: Tensor | None = None
    ) -> Quantized:
        """Quantise a matrix.

        Args:
            x: (R, K), any float dtype; computed in float32.
            scale: what to use in place of the scales that x itself would give, (R, G) or what broadcasts to it, as
                decoded float32; a static activation scale, or one that was searched for.
            zero: zero points to go with ``scale``.
            tensor_scale: () of a two-level format, in place of absmax / (448 * 6).

        Raises:
            FewstepError: for a shape that the format cannot take.
        """
        x = self._matrix(x).float()
        groups = self._blocks(x)
        if isinstance(self.element, Sign):
            codes, scale = binary.encode(groups, self.element, self.scale, scale)
            return Quantized(self, codes.reshape(x.shape), scale)
        if scale is None:
            scale, zero, tensor_scale = self.scales(x, tensor_scale)
        scaled = self._scaled(groups, scale, zero, tensor_scale)
        return Quantized(self, self.element.encode(scaled).reshape(x.shape), scale, zero, tensor_scale)

    def round(
        self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, tensor_scale: Tensor | None = None
    ) -> Tensor:
        """``encode(...).decode()``, float32 (R, K), without the codes."""
        if isinstance(self.element, Sign):
            return self.encode(x, scale).decode()
        x = self._matrix(x).float()
        groups = self._blocks(x)
        if scale is None:
            scale, zero, tensor_scale = self.scales(x, tensor_scale)
        values = self.element.round(self._scaled(groups, scale, zero, tensor_scale))
        return _unscaled(values, scale, zero, tensor_scale).reshape(x.shape)

    def scales(self, x: Tensor, tensor_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scale (R, G), or (1, 1) of a tensor, zero point and tensor scale that the numbers of ``x`` (R, K) ask for."""
        x = self._matrix(x).float()
        groups = self._blocks(x)
        dims = (0, 1, 2) if self.granularity == "tensor" else (2,)
        element = self.element
        assert not isinstance(element, Sign), "scales of signs are made with the codes"
        if self.has_zero:
            low, high = groups.amin(dims).clamp(max=0), groups.amax(dims).clamp(min=0)
            scale = scales.rounded(((high - low) / element.max).reshape(-1, self._count(x)), self.scale)
            return scale, (-low.reshape_as(scale) / scale).round().clamp(0, element.max), None
        top = groups.amax(dims).clamp(min=0) if not element.signed else groups.abs().amax(dims)
        top = top.reshape(-1, self._count(x))
        if self.scale == "e8m0":
            assert isinstance(element, Minifloat)
            return scales.power_of_two(top, element.max, element.max_exponent, self.rule), None, None
        if self.two_level:
            if tensor_scale is None:
                tensor_scale = (x.abs().amax() / (448.0 * element.max)).clamp(
                    min=2.0**-100
                )  # its reciprocal over a block's exists
            return scales.rounded(top / element.max / tensor_scale, "e4m3"), None, tensor_scale
        return scales.rounded(top / element.max, self.scale), None, None

    def _scaled(self, groups: Tensor, scale: Tensor, zero: Tensor | None, tensor_scale: Tensor | None) -> Tensor:
        scale = scale.unsqueeze(-1)
        if tensor_scale is not None:  # one factor, as the fused kernels of NVFP4 have it
            return groups * ((1 / tensor_scale) / scale)
        scaled = groups / scale
        return scaled if zero is None else scaled + zero.unsqueeze(-1)

    def _blocks(self, x: Tensor) -> Tensor:
        """(R, G, K / G)."""
        return blocks(x, self.groups(x.shape[1]))

    def _count(self, x: Tensor) -> int:
        return self.groups(x.shape[1])

    def _matrix(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or not x.numel() or not x.is_floating_point():
            raise FewstepError(f"{self} takes a matrix of floats, not {x.dtype} of shape {tuple(x.shape)}")
        return x


@dataclass(frozen=True, eq=False)
class Quantized:
    """A matrix as codes and scales.

    Attributes:
        codes: (R, K), int8 for signed integers and uint8 for the rest.
        scale: (R, G) or (1, 1), float32; of binary numbers (R, G, bases).
        zero: as ``scale``, float32 whole numbers, where the format has zero points.
        tensor_scale: () float32 of a two-level format.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    tensor_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def decode(self) -> Tensor:
        """(R, K) float32: (code - zero) * scale, times the tensor scale where there is one."""
        element = self.format.element
        groups = blocks(self.codes, self.format.groups(self.codes.shape[1]))
        if isinstance(element, Sign):
            return binary.decode(groups, self.scale).reshape(self.codes.shape)
        values = _unscaled(element.decode(groups), self.scale, self.zero, self.tensor_scale)
        return values.reshape(self.codes.shape)

    # -- files --------------------------------------------------------------------------------------------------------
    def packed(self) -> dict[str, Tensor]:
        """What a file or a layer keeps: packed ``codes``, ``scale`` as stored, ``zero`` uint8, ``tensor_scale``."""
        kept = {
            "codes": packing.pack(self.codes, self.format.element.storage_bits),
            "scale": scales.stored(self.scale, self.format.scale),
        }
        if self.zero is not None:
            kept["zero"] = self.zero.to(torch.uint8)
        if self.tensor_scale is not None:
            kept["tensor_scale"] = self.tensor_scale.float()
        return kept

    @classmethod
    def from_packed(
        cls,
        format: Format,
        columns: int,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        tensor_scale: Tensor | None = None,
    ) -> Quantized:
        """What :meth:`packed` took apart; ``columns`` is K."""
        kind = format.element
        return cls(
            format,
            packing.unpack(codes, kind.storage_bits, columns, signed=kind.signed and isinstance(kind, Integer)),
            scales.restored(scale, format.scale),
            None if zero is None else zero.float(),
            tensor_scale,
        )


def _unscaled(values: Tensor, scale: Tensor, zero: Tensor | None, tensor_scale: Tensor | None) -> Tensor:
    if zero is not None:
        values = values - zero.unsqueeze(-1)
    if tensor_scale is not None:
        scale = scale * tensor_scale
    return values * scale.unsqueeze(-1)


@cache
def _largest_divisor(columns: int, below: int) -> int:
    return next(d for d in range(min(below, columns), 0, -1) if columns % d == 0)


_SPELLING = re.compile(
    r"(?P<element>[a-z0-9]+)(?::(?:(?P<whole>tensor|row)|g(?P<group>[1-9][0-9]*)))?(?:/(?P<scale>[a-z0-9-]+))?"
)
ALIASES = {
    "fp8": "e4m3:row",
    "nvfp4": "e2m1:g16/e4m3",
    "mxfp4": "e2m1:g32/e8m0",
    "mxfp6": "e3m2:g32/e8m0",
    "mxfp8": "e4m3:g32/e8m0",
}
_SHORT = {long: short for short, long in ALIASES.items()}
