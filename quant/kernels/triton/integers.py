"""Linear layers on integer codes: W8A8, W4A8, W4A4, and W4 with activations of 4 and 8 bits in one product."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.formats import Format
from fewstep.quant.kernels.triton.launch import Config, config, launch, need, ready, tiles
from fewstep.quant.kernels.triton.products import SCALES, Epilogue, epilogue, rows_of, shaped, weight_columns
from fewstep.quant.kernels.triton.rows import MixedRows, QuantizedRows, quantize_mixed
from fewstep.quant.kernels.triton.support import Capability

if TYPE_CHECKING:
    from typing_extensions import Unpack

PRODUCT_GROUPS = (32, 64, 128)
BAND = 8


class Options(TypedDict, total=False):
    """What the products of one kind of activation take by name."""

    activation: str | Format
    smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None
    activation_scale: Tensor | None
    out_dtype: torch.dtype | None


def int8_linear(
    x: Tensor | QuantizedRows, codes: Tensor, scale: Tensor, bias: Tensor | None = None, **options: Unpack[Options]
) -> Tensor:
    """Y = s_x s_w (Q_x Q_w^T) + (X A^T) B^T + b with 8-bit activations and weights; exact int32 sums within a group.

    Args:
        x: (..., K) float32, float16 or bfloat16, or what :func:`quantize_rows` made of it.
        codes: (N, K) int8, or the same bytes as uint8.
        scale: (N, 1) float32 or float16, or (N, K / group) with group 32, 64 or 128.
        bias: (N,).
        activation: format of the activations, ``int8:row`` or ``int8:gN`` with the weight's group (or a weight per row).
        smooth: (K,) what x is divided by before it is quantised; the weight was multiplied with it.
        down, up: (R, K) and (N, R), A and B of the low-rank branch, R at most 128. With ``x`` quantised before, ``down``
            was given there and ``up`` is given here.
        activation_scale: () or (M,) static scale.
        out_dtype: dtype of the result; that of x by default.

    Returns:
        (..., N).

    Raises:
        FewstepError: for a shape, dtype, format or device that the kernel does not take; without Triton.
    """
    return _linear("int8_linear", 8, x, codes, scale, bias, **options)


def w4a8_linear(
    x: Tensor | QuantizedRows, codes: Tensor, scale: Tensor, bias: Tensor | None = None, **options: Unpack[Options]
) -> Tensor:
    """As :func:`int8_linear` with weights of 4 bits: ``codes`` (N, K / 2) bytes, the even column in the low nibble.

    Codes are two's complement, -8 to 7. ``scale`` is (N, K / group), or (N, 1).
    """
    return _linear("w4a8_linear", 4, x, codes, scale, bias, **options)


def w4a4_linear(
    x: Tensor | QuantizedRows,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    shift: float = 0.0,
    **options: Unpack[Options],
) -> Tensor:
    """As :func:`w4a8_linear` with activations in ``int4`` or ``uint4``, packed in the same way; ``int4:g64`` by default.

    With ``shift`` and ``activation="uint4:g64"`` the codes are those of (x + shift) / smooth, while the low-rank branch
    reads x. The bias that is given has to make up for it: b - shift * sum_k W[n, k] / smooth[k], W the dequantised weight.

    Source: SVDQuant, 2411.05007, sec. 4.
    """
    return _linear("w4a4_linear", 4, x, codes, scale, bias, shift=shift, **{"activation": "int4:g64", **options})  # type: ignore[arg-type]


def w4ax_linear(
    x: Tensor | MixedRows,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    order: Tensor | None = None,
    wide: int | None = None,
    group: int = 128,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """W4 with 8-bit activations in the first ``wide`` columns of ``order`` and 4-bit ones in the rest, in one product.

    Args:
        x: (..., K), with ``order`` and ``wide`` as :func:`quantize_mixed` takes them, or what that made of it.
        codes: (N, K / 2) bytes of the weight *with its columns in that order*.
        scale: (N, K / group), or (N, 1).
        group: columns of a group, 32, 64 or 128.
        bias, smooth, down, up, out_dtype: as for :func:`int8_linear`; ``smooth`` and ``down`` in the order of x.

    Raises:
        FewstepError: for a shape, dtype or device that the kernel does not take; without Triton.

    Source: COMET, 2410.12168, sec. 4.
    """
    ready("w4ax_linear", x if isinstance(x, Tensor) else x.codes4)
    if isinstance(x, MixedRows):
        if order is not None or wide is not None or smooth is not None or down is not None:
            raise FewstepError("order, wide, smooth or down given with an input that is quantised already")
        rows = x
    elif order is None or wide is None:
        raise FewstepError("w4ax_linear needs order and wide: which columns have 8 bits")
    else:
        rows = quantize_mixed(x, order, wide, group=group, smooth=smooth, down=down)
    columns = rows.codes8.shape[1] + 2 * rows.codes4.shape[1]
    return shaped(_product("w4ax_linear", rows, rows, columns, codes, scale, 4, bias, up, out_dtype), x)


def _tensor(x: Tensor | QuantizedRows) -> Tensor:
    return x if isinstance(x, Tensor) else x.codes


def _linear(
    name: str,
    bits: int,
    x: Tensor | QuantizedRows,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: str | Format = "int8:row",
    smooth: Tensor | None = None,
    shift: float = 0.0,
    down: Tensor | None = None,
    up: Tensor | None = None,
    activation_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    ready(name, _tensor(x))
    narrow = name == "w4a4_linear"
    kinds = "int4 or uint4" if narrow else "int8"
    rows = rows_of(x, activation, kinds, smooth=smooth, shift=shift, down=down, scale=activation_scale)
    eight, four = (None, rows) if narrow else (rows, None)
    return shaped(_product(name, eight, four, rows.columns, codes, scale, bits, bias, up, out_dtype), x)


def _product(
    name: str,
    wide: QuantizedRows | MixedRows | None,
    narrow: QuantizedRows | MixedRows | None,
    columns: int,
    codes: Tensor,
    scale: Tensor,
    bits: int,
    bias: Tensor | None,
    up: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """One launch of ``int_gemm``: ``wide`` holds the columns of 8 bits, ``narrow`` those of 4, or both are one value."""
    rows = wide or narrow
    assert rows is not None
    a8, sa8 = _part(wide, 8)
    a4, sa4 = _part(narrow, 4)
    like = a8 if a8 is not None else a4
    assert like is not None
    capability = ready(name, like)
    codes, n = weight_columns(codes, bits, columns, like)
    groups = scale.shape[1] if scale.ndim == 2 else 1
    scale = need(scale, "weight scale", (n, groups), SCALES, like)
    m = like.shape[0]
    group = _group(columns, groups, rows)
    tile = _tile(capability, group, bits == 8)
    block_k = group or tile.block_k
    end: Epilogue = epilogue(rows, m, n, up, bias, out_dtype, like)
    from fewstep.quant.kernels.triton.jit.integer import int_gemm

    k8 = 0 if a8 is None else a8.shape[1]
    k4 = columns - k8
    launch(
        int_gemm, tiles(m, n, tile), like.device, tile,
        a8, sa8, a4, sa4, codes.view(torch.int8) if bits == 8 else codes.view(torch.uint8), scale,
        end.projected, end.up, end.bias, end.out,
        m, n, k8, k4, end.rank,
        k8, *_strides(sa8), k4 // 2, *_strides(sa4), codes.shape[1], *_strides(scale), n,
        HAS8=k8 > 0, HAS4=k4 > 0, A_SIGNED=not isinstance(rows, QuantizedRows) or rows.format.element.signed, W_BITS=bits,
        GROUP=group, EVEN=k8 % block_k == 0 and k4 % block_k == 0, **end.constants,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=block_k, BAND=BAND,
    )  # fmt: skip
    return end.out


def _part(rows: QuantizedRows | MixedRows | None, bits: int) -> tuple[Tensor | None, Tensor | None]:
    if rows is None:
        return None, None
    if isinstance(rows, QuantizedRows):
        return (rows.codes.view(torch.int8) if bits == 8 else rows.codes), rows.scale
    return (rows.codes8.view(torch.int8), rows.scale8) if bits == 8 else (rows.codes4, rows.scale4)


def _strides(scale: Tensor | None) -> tuple[int, int]:
    """Strides of (rows, G) scales; one scale a row serves every group."""
    return (0, 0) if scale is None else (scale.stride(0), scale.stride(1) if scale.shape[1] > 1 else 0)


def _group(columns: int, weight_groups: int, rows: QuantizedRows | MixedRows) -> int:
    """Columns after which sums are scaled; 0 if every row has one scale on both sides."""
    mine = rows.format.group if isinstance(rows, QuantizedRows) else rows.group
    if columns % weight_groups:
        raise FewstepError(f"{weight_groups} scales a row of the weight, which do not divide {columns} columns")
    theirs = 0 if weight_groups == 1 else columns // weight_groups
    sizes = {mine if mine < columns else 0, theirs} - {0}
    if isinstance(rows, MixedRows):
        sizes.add(rows.group)
    if len(sizes) > 1:
        raise FewstepError(
            f"groups of {mine} columns in the activations and of {theirs} in the weight; they must agree"
        )
    group = sizes.pop() if sizes else 0
    if group and group not in PRODUCT_GROUPS:
        raise FewstepError(f"groups of {group} columns; the Triton products take 32, 64 and 128, or one scale a row")
    return group


def _tile(capability: Capability | None, group: int, eight_bits: bool) -> Config:
    if group:
        return config("wide groups" if group > 64 else "grouped", capability)
    return config("int8" if eight_bits else "int4", capability)
