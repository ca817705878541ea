"""Linear layers on floating codes: FP8 with a scale per row, MXFP8, MXFP4 and NVFP4."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.quant.formats import Format
from fewstep.quant.kernels.triton.launch import FLOATS, config, interpreting, launch, need, ready, tiles
from fewstep.quant.kernels.triton.products import epilogue, rows_of, shaped, weight_columns
from fewstep.quant.kernels.triton.rows import QuantizedRows
from fewstep.quant.kernels.triton.support import native

BAND = 8


def fp8_linear(
    x: Tensor | QuantizedRows,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    activation_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accurate: bool | None = None,
    emulate: bool | None = None,
) -> Tensor:
    """Y = s_x s_w (Q_x Q_w^T) + (X A^T) B^T + b with E4M3 codes and a float32 scale for each row of X and of W.

    Args:
        x: (..., K) float32, float16 or bfloat16, or what :func:`quantize_rows` made of it in ``fp8``.
        codes: (N, K) E4M3 bytes as uint8, or torch.float8_e4m3fn.
        scale: (N, 1) float32.
        bias: (N,).
        smooth, down, up, activation_scale, out_dtype: as for :func:`int8_linear`.
        accurate: take partial sums to float32 after every 128 columns on sm_90, whose own have some 14 bits; by default
            above 4096 columns.
        emulate: decode to float16 in the kernel; by default where there are no FP8 tensor cores. Products are exact.

    Returns:
        (..., N).

    Raises:
        FewstepError: for a shape, dtype, format or device that the kernel does not take; without Triton.

    Source: FP8 Formats for Deep Learning, 2209.05433.
    """
    capability = ready("fp8_linear", x if isinstance(x, Tensor) else x.codes)
    rows = rows_of(x, "fp8", "e4m3", smooth=smooth, down=down, scale=activation_scale)
    columns, m = rows.columns, rows.codes.shape[0]
    codes, n = weight_columns(codes.view(torch.uint8), 8, columns, rows.codes)
    scale = need(scale, "weight scale", (n, 1), (torch.float32,), rows.codes)
    end = epilogue(rows, m, n, up, bias, out_dtype, rows.codes)
    emulate = not (capability and native(capability, "fp8_linear")) if emulate is None else emulate
    kind = torch.uint8 if emulate else torch.float8_e4m3fn
    tile = config("emulated" if emulate else "fp8", capability)
    from fewstep.quant.kernels.triton.jit.floating import fp8_gemm

    launch(
        fp8_gemm, tiles(m, n, tile), rows.codes.device, tile,
        rows.codes.view(kind), rows.scale, codes.view(kind), scale, end.projected, end.up, end.bias, end.out,
        m, n, columns, end.rank, columns, columns, n,
        EMULATE=emulate, EVEN=columns % tile.block_k == 0, **end.constants,
        ACCURATE=columns > 4096 if accurate is None else accurate,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=BAND,
    )  # fmt: skip
    return shaped(end.out, x)


def mxfp8_linear(x: Tensor | QuantizedRows, codes: Tensor, scale: Tensor, *args: Any, **options: Any) -> Tensor:
    """Y = X W^T + (X A^T) B^T + b with E4M3 codes and a power of two for each 32 columns of X and of W.

    Args:
        x: (..., K) float32, float16 or bfloat16, K a multiple of 32, or what :func:`quantize_rows` made of it.
        codes: (N, K) E4M3 bytes as uint8, or torch.float8_e4m3fn.
        scale: (N, K / 32) E8M0 bytes as uint8, or torch.float8_e8m0fnu; row-major, not in cuBLAS's order.
        *args, **options: ``bias``, and by name ``smooth``, ``down``, ``up``, ``out_dtype`` as for :func:`int8_linear`, and
            ``emulate``: decode to 16 bits in the kernel, which is exact; by default below sm_100.

    Returns:
        (..., N).

    Raises:
        FewstepError: for a shape, dtype, format or device that the kernel does not take; without Triton.

    Source: OCP Microscaling Formats 1.0.
    """
    return _block_scaled("mxfp8", x, codes, scale, *args, **options)


def mxfp4_linear(x: Tensor | QuantizedRows, codes: Tensor, scale: Tensor, *args: Any, **options: Any) -> Tensor:
    """As :func:`mxfp8_linear` with E2M1 ``codes`` (N, K / 2), the even column in the low nibble."""
    return _block_scaled("mxfp4", x, codes, scale, *args, **options)


def nvfp4_linear(
    x: Tensor | QuantizedRows, codes: Tensor, scale: Tensor, tensor_scale: Tensor, *args: Any, **options: Any
) -> Tensor:
    """As :func:`mxfp4_linear` with E4M3 scales (N, K / 16) of 16 columns and a float32 scale of the tensor.

    Args:
        tensor_scale: () float32 of the weight.
        *args, **options: as for :func:`mxfp8_linear`, and ``activation_tensor_scale``: () float32, static; without it the
            largest magnitude of x is found first, which reads x once more.

    Source: NVIDIA's NVFP4; two levels as in torchao's prototype.
    """
    return _block_scaled("nvfp4", x, codes, scale, *args, tensor_scale=tensor_scale, **options)


def _block_scaled(
    format: str,
    x: Tensor | QuantizedRows,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    tensor_scale: Tensor | None = None,
    activation_tensor_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    emulate: bool | None = None,
) -> Tensor:
    name = f"{format}_linear"
    capability = ready(name, x if isinstance(x, Tensor) else x.codes)
    element = "e4m3" if format == "mxfp8" else "e2m1"
    rows = rows_of(x, format, element, smooth=smooth, down=down, tensor_scale=activation_tensor_scale)
    bits, block = (8 if format == "mxfp8" else 4), Format.parse(format).group
    columns, m = rows.columns, rows.codes.shape[0]
    codes, n = weight_columns(codes.view(torch.uint8), bits, columns, rows.codes)
    scale = need(scale.view(torch.uint8), "weight scale", (n, columns // block), (torch.uint8,), rows.codes)
    alpha = None
    if tensor_scale is not None:
        assert rows.tensor_scale is not None
        alpha = rows.tensor_scale * need(tensor_scale.reshape(()), "tensor_scale", (), FLOATS, rows.codes).float()
    end = epilogue(rows, m, n, up, bias, out_dtype, rows.codes)
    emulate = not (capability and native(capability, name)) if emulate is None else emulate
    code_kind = torch.uint8 if emulate or bits == 4 else torch.float8_e4m3fn
    scale_kind = torch.uint8 if emulate or format != "nvfp4" else torch.float8_e4m3fn
    tile = config("emulated" if emulate else "block scaled", capability)
    from fewstep.quant.kernels.triton.jit.floating import block_scaled_gemm

    launch(
        block_scaled_gemm, tiles(m, n, tile), rows.codes.device, tile,
        rows.codes.view(code_kind), rows.scale.view(scale_kind), codes.view(code_kind), scale.view(scale_kind), alpha,
        end.projected, end.up, end.bias, end.out,
        m, n, columns, end.rank, codes.shape[1], scale.shape[1], codes.shape[1], scale.shape[1], n,
        FORMAT=format, WIDE=_wide(format) if emulate else None, EVEN=columns % tile.block_k == 0, **end.constants,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=BAND,
    )  # fmt: skip
    return shaped(end.out, x)


def _wide(format: str) -> Any:
    """The type in which ``format`` is emulated: 6 * 448 and its fractions fit float16, powers of two need bfloat16's range.

    Triton's interpreter multiplies the bit patterns of bfloat16, so it gets float32, which holds the same values.
    """
    import triton.language as tl

    if format == "nvfp4":
        return tl.float16
    return tl.float32 if interpreting() else tl.bfloat16
