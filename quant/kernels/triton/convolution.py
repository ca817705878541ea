"""int8 convolution of channels-last images."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.kernels.triton.launch import FLOATS, config, launch, need, ready, tiles
from fewstep.quant.kernels.triton.products import BYTES
from fewstep.quant.kernels.triton.rows import quantize_rows

Pair = int | tuple[int, int]
BAND = 8


def int8_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    activation_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Y[b, o] = s_x[b] s_w[o] (Q_x * Q_w)[b, o] + bias[o]: implicit GEMM, zeros as padding, exact int32 sums.

    Every image has its own scale, so that an image does not depend on its batch.

    Args:
        x: (B, C, H, W) float32, float16 or bfloat16; in memory channels last, or copied so.
        codes: (O, KH, KW, C) int8, channels last, or the same bytes as uint8.
        scale: (O,) or (O, 1) float32.
        bias: (O,).
        stride, padding, dilation: as of ``torch.nn.functional.conv2d``; groups are not taken.
        activation_scale: () or (B,) static scale of x; without it absmax / 127 of each image.
        out_dtype: dtype of the result; that of x by default.

    Returns:
        (B, O, H', W'), channels last in memory.

    Raises:
        FewstepError: for a shape, dtype or device that the kernel does not take; without Triton.
    """
    capability = ready("int8_conv2d", x)
    if x.ndim != 4 or x.dtype not in FLOATS:
        raise FewstepError(f"images of {x.dtype} and shape {tuple(x.shape)}; float32, float16 or bfloat16 (B, C, H, W)")
    batch, channels, height, width = x.shape
    if codes.ndim != 4 or codes.shape[3] != channels:
        raise FewstepError(
            f"weight codes have shape {tuple(codes.shape)}; (O, KH, KW, {channels}) is needed, without groups"
        )
    codes = need(codes, "weight codes", tuple(codes.shape), BYTES, x).view(torch.int8)
    filters, kernel_h, kernel_w, _ = codes.shape
    scale = need(scale.reshape(-1), "weight scale", (filters,), (torch.float32,), x)
    if bias is not None:
        bias = need(bias, "bias", (filters,), FLOATS, x)
    (sh, sw), (ph, pw), (dh, dw) = _pair(stride), _pair(padding), _pair(dilation)
    out_h, out_w = _extent(height, kernel_h, sh, ph, dh), _extent(width, kernel_w, sw, pw, dw)
    dtype = out_dtype or x.dtype
    pixels = x.permute(0, 2, 3, 1).contiguous()
    if activation_scale is None:
        absmax = x.abs().amax((1, 2, 3)).float() if x.numel() else x.new_zeros(batch, dtype=torch.float32)
        activation_scale = (absmax / 127).clamp(min=2.0**-126)
    elif activation_scale.numel() not in (1, batch):
        raise FewstepError(f"activation_scale has shape {tuple(activation_scale.shape)}; () or ({batch},) is needed")
    each = activation_scale.float().reshape(-1).expand(batch).contiguous()
    rows = quantize_rows(pixels.reshape(-1, channels), "int8:row", scale=each.repeat_interleave(height * width))
    m = batch * out_h * out_w
    out = torch.empty(batch, out_h, out_w, filters, dtype=dtype, device=x.device)
    tile = config("conv", capability)
    from fewstep.quant.kernels.triton.jit.convolution import int8_conv

    launch(
        int8_conv, tiles(m, filters, tile), x.device, tile,
        rows.codes.view(torch.int8), each, codes, scale, bias, out,
        m, filters, channels, height, width, out_h, out_w,
        KERNEL_H=kernel_h, KERNEL_W=kernel_w, STRIDE_H=sh, STRIDE_W=sw, PAD_H=ph, PAD_W=pw, DILATION_H=dh, DILATION_W=dw,
        EVEN=channels % tile.block_k == 0, HAS_BIAS=bias is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BAND=BAND,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    extent = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if extent < 1:
        raise FewstepError(
            f"a kernel of {kernel} with dilation {dilation} is larger than {size} + 2 * {padding} pixels"
        )
    return extent
