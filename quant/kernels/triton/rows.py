"""Activations to codes: one kernel that smooths, quantises, packs, and multiplies with the low-rank down-projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.formats import Format, Quantized
from fewstep.quant.kernels.triton.launch import FLOATS, config, launch, need, padded_rank, ready

GROUPS = (16, 32, 64, 128)
_KINDS = {"int8": "int8", "int4": "int4", "uint4": "uint4", "e4m3": "fp8"}
_BLOCKS = {"mxfp8": "mxfp8", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
_STORED = {"f32": torch.float32, "f16": torch.float16, "e4m3": torch.uint8, "e8m0": torch.uint8}


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Activations (M, K) as the matrix products take them; layers that share an input share these.

    Attributes:
        format: of the codes and scales, which lie in memory as :meth:`fewstep.quant.formats.Quantized.packed` has them.
        columns: K.
        codes: (M, K) uint8, two's complement or E4M3; of 4-bit formats (M, K / 2) uint8, the even column in the low nibble.
        scale: (M, G) with G = 1 or K / group: float32 or float16; of E4M3 and E8M0 scales their bytes as uint8.
        tensor_scale: () float32, NVFP4 only.
        projected: (M, R), x A^T in the dtype of x, or None.
        dtype: of x.
    """

    format: Format
    columns: int
    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    projected: Tensor | None
    dtype: torch.dtype

    def quantized(self) -> Quantized:
        """The same codes and scales for the reference: ``rows.quantized().decode()`` are the (M, K) float32 values."""
        return Quantized.from_packed(self.format, self.columns, self.codes, self.scale, None, self.tensor_scale)


def kernel_format(format: Format) -> str:
    """The name that the kernel has for ``format``.

    Raises:
        FewstepError: for a format that it cannot make.
    """
    name = _BLOCKS.get(str(format)) or (_KINDS.get(format.element.name) if format.scale in ("f32", "f16") else None)
    if name is None or (name == "fp8" and format.group):
        raise FewstepError(
            f"the Triton kernel quantises no {format}; it takes int8, int4 and uint4 with a scale a row or group, fp8, "
            "mxfp8, mxfp4 and nvfp4"
        )
    if format.group and format.group not in GROUPS:
        raise FewstepError(f"{format}: the Triton kernel takes groups of {', '.join(map(str, GROUPS))} columns")
    return name


def quantize_rows(
    x: Tensor,
    format: str | Format = "int8:row",
    *,
    smooth: Tensor | None = None,
    shift: float = 0.0,
    down: Tensor | None = None,
    scale: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> QuantizedRows:
    """Codes of (x + shift) / smooth and, from the same read of x, the low-rank branch's x A^T.

    Bit for bit ``Format.encode`` of the float32 values: divided as PyTorch divides, rounded with ties to even. A NaN or an
    infinity makes its row's (or group's) scale infinite or NaN, so that it shows in the result.

    Args:
        x: (..., K) float32, float16 or bfloat16; leading dimensions are flattened to M rows.
        format: int8, int4 or uint4 with a scale a row or a group of 16, 32, 64 or 128 columns; ``fp8`` (a scale a row),
            ``mxfp8``, ``mxfp4``, ``nvfp4``. Groups along K, which they divide; K is even for 4 bits.
        smooth: (K,) what columns are divided by before they are quantised (SVDQuant's lambda).
        shift: what is added before that, for inputs after GELU in ``uint4``.
        down: (R, K) A of the low-rank branch, which reads x as it is: fold the smoothing into A. R at most 128.
        scale: () or (M,) a static scale for formats with one a row; saves a read of x.
        tensor_scale: () float32 of nvfp4; without it absmax / (448 * 6), another pass over x.

    Raises:
        FewstepError: for a format, shape, dtype or device that the kernel does not take.

    Source: SVDQuant, 2411.05007, sec. 4.2 (fused quantisation and down-projection).
    """
    format = Format.parse(format)
    kind = kernel_format(format)
    capability = ready("quantize_rows", x)
    rows, columns = _matrix(x)
    groups = format.groups(columns)
    four_bits = kind not in ("int8", "fp8", "mxfp8")
    if four_bits and columns % 2:
        raise FewstepError(f"{format} packs two columns in a byte; {columns} columns are odd")
    m = rows.shape[0]
    static = None
    if kind == "nvfp4":
        static = tensor_scale if tensor_scale is not None else _tensor_scale(rows, smooth, shift)
        static = static.float().reshape(1)
    elif tensor_scale is not None:
        raise FewstepError(f"{format} has no tensor_scale; nvfp4 has")
    if scale is not None:
        if format.group or scale.numel() not in (1, m):
            raise FewstepError(
                f"a static scale of shape {tuple(scale.shape)} for {format}; one a tensor or row is taken"
            )
        static = scale.float().reshape(-1).expand(m).contiguous()
    elif format.granularity == "tensor":
        raise FewstepError(
            f"{format} needs a static scale: nobody has seen the whole tensor when the first row is done"
        )
    smooth, down, rank = _branches(rows, smooth, down)
    codes = torch.empty(m, columns // 2 if four_bits else columns, dtype=torch.uint8, device=x.device)
    scales = torch.empty(m, groups, dtype=_STORED[format.scale], device=x.device)
    projected = torch.empty(m, rank, dtype=x.dtype, device=x.device) if rank else None
    tile = config("rows", capability)
    from fewstep.quant.kernels.triton.jit.rows import quantize_rows as kernel

    launch(
        kernel, -(-m // tile.block_m), x.device, tile,
        rows, smooth, down, static, codes.view(torch.int8) if kind == "int8" else codes, scales, projected,
        m, columns, rank, rows.stride(0), columns,
        FORMAT=kind, GROUP=format.group, SHIFT=shift, HAS_SMOOTH=smooth is not None, STATIC=scale is not None,
        RANK=padded_rank(rank), BLOCK_M=tile.block_m, BLOCK_K=tile.block_k,
    )  # fmt: skip
    return QuantizedRows(format, columns, codes, scales, static if kind == "nvfp4" else None, projected, x.dtype)


@dataclass(frozen=True, eq=False)
class MixedRows:
    """Activations whose first K8 columns, in the order of their weights, are int8 and the others int4.

    Attributes:
        group: columns of a group in both parts.
        codes8: (M, K8) uint8, two's complement. ``scale8``: (M, K8 / group) float32.
        codes4: (M, K4 / 2) uint8, the even column in the low nibble. ``scale4``: (M, K4 / group) float32.
        projected: (M, R), x A^T in the dtype of x, or None.
        dtype: of x.
    """

    group: int
    codes8: Tensor
    scale8: Tensor
    codes4: Tensor
    scale4: Tensor
    projected: Tensor | None
    dtype: torch.dtype


def quantize_mixed(
    x: Tensor,
    order: Tensor,
    wide: int,
    *,
    group: int = 128,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
) -> MixedRows:
    """Columns ``order`` of x / smooth, the first ``wide`` of them in int8 and the others in int4.

    A permutation gathers the channels with outliers in a few groups; these get 8 bits, and the product runs both kinds of
    tiles in one kernel against 4-bit weights whose columns have the same order.

    Args:
        x: (..., K) float32, float16 or bfloat16.
        order: (K,) int32, a permutation of the columns; :func:`mixed_order` makes one.
        wide: how many columns have 8 bits, 0 to K, a multiple of ``group``.
        group: columns of a group, 32, 64 or 128; divides K.
        smooth, down: as for :func:`quantize_rows`, in the order of x.

    Raises:
        FewstepError: for a shape, dtype or device that the kernel does not take.

    Source: COMET, 2410.12168, sec. 4 (fine-grained mixed precision by channel permutation).
    """
    capability = ready("quantize_mixed", x)
    rows, columns = _matrix(x)
    if group not in GROUPS[1:] or columns % group or wide % group or not 0 <= wide <= columns:
        raise FewstepError(
            f"{wide} of {columns} columns in 8 bits, groups of {group}; groups are 32, 64 or 128 and divide both counts"
        )
    order = need(order, "order", (columns,), (torch.int32,), x)
    smooth, down, rank = _branches(rows, smooth, down)
    m, narrow = rows.shape[0], columns - wide

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(m, width, dtype=dtype, device=x.device)

    codes8, codes4 = empty(wide, torch.uint8), empty(narrow // 2, torch.uint8)
    scale8, scale4 = empty(wide // group, torch.float32), empty(narrow // group, torch.float32)
    projected = empty(rank, x.dtype) if rank else None
    tile = config("rows", capability)
    from fewstep.quant.kernels.triton.jit.rows import quantize_mixed as kernel

    launch(
        kernel, -(-m // tile.block_m), x.device, tile,
        rows, order, smooth, down, codes8.view(torch.int8), scale8, codes4, scale4, projected,
        m, columns, wide, rank, rows.stride(0), columns,
        GROUP=group, HAS_SMOOTH=smooth is not None, RANK=padded_rank(rank), BLOCK_M=tile.block_m,
    )  # fmt: skip
    return MixedRows(group, codes8, scale8, codes4, scale4, projected, x.dtype)


def mixed_order(absmax: Tensor, wide: int) -> Tensor:
    """(K,) int32 permutation that puts the ``wide`` channels of the largest ``absmax`` (K,) first, the rest as they were.

    Both parts keep the channels' order, so that reads of x stay close together.
    """
    outliers = absmax.argsort(descending=True, stable=True)[:wide].sort().values
    keep = torch.ones_like(absmax, dtype=torch.bool).index_fill_(0, outliers, False)
    return torch.cat([outliers, keep.nonzero().flatten()]).int()


def _matrix(x: Tensor) -> tuple[Tensor, int]:
    if x.dtype not in FLOATS or x.ndim < 1 or not x.shape[-1]:
        raise FewstepError(
            f"activations of {x.dtype} and shape {tuple(x.shape)}; float32, float16 or bfloat16 (..., K)"
        )
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous(), x.shape[-1]


def _branches(rows: Tensor, smooth: Tensor | None, down: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    columns = rows.shape[1]
    if smooth is not None:
        smooth = need(smooth, "smooth", (columns,), FLOATS, rows)
    if down is None:
        return smooth, None, 0
    if down.ndim != 2:
        raise FewstepError(f"down has shape {tuple(down.shape)}; (R, {columns}) is needed")
    padded_rank(down.shape[0])
    return smooth, need(down, "down", (down.shape[0], columns), FLOATS, rows).to(rows.dtype), down.shape[0]


def _tensor_scale(rows: Tensor, smooth: Tensor | None, shift: float) -> Tensor:
    values = rows.float() + shift
    if smooth is not None:
        values = values / smooth
    return (values.abs().amax() / (448 * 6.0)).clamp(min=2.0**-100)
