"""W4A4 on 4-bit tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.kernels.cuda.launch import call, ready

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STEP = 64


def w4a4_product(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    signed: bool = True,
    out_dtype: torch.dtype = torch.float32,
    emulate: bool = False,
) -> Tensor:
    """Y[m, n] = sum_g s[m, g] s_w[n, g] sum_{k in g} q[m, k] q_w[n, k] + bias[n]; sums within a group are exact int32.

    The low-rank branch of SVDQuant is not fused here; add it to the result.

    Args:
        codes: (M, K / 2) uint8, the even column in the low nibble, as :class:`fewstep.quant.formats.Format` packs int4.
        scale: (M, K / group) or (M, 1).
        weight: (N, K / 2) uint8, two's complement.
        weight_scale: (N, K / group) or (N, 1), group a multiple of 64; scales are used as float32.
        bias: (N,).
        signed: whether ``codes`` are two's complement, -8 to 7, or unsigned, 0 to 15.
        out_dtype: float32, float16 or bfloat16.
        emulate: run the kernel's source on the CPU, slowly, as the tests do.

    Returns:
        (M, N).

    Raises:
        FewstepError: for a shape, dtype or device that it does not take, without nvcc, or where no compiler succeeds.

    Source: the layout of fragments is PTX ISA's, mma.m16n8k64.
    """
    capability = ready("w4a4", codes, emulate)
    if (
        codes.ndim != 2
        or weight.ndim != 2
        or codes.shape[1] != weight.shape[1]
        or {codes.dtype, weight.dtype} != {torch.uint8}
    ):
        raise FewstepError(
            f"codes of shape {tuple(codes.shape)} and {tuple(weight.shape)}, {codes.dtype} and {weight.dtype}; "
            "(M, K / 2) and (N, K / 2) of uint8 are needed"
        )
    m, n, k = codes.shape[0], weight.shape[0], 2 * codes.shape[1]
    groups = max(scale.shape[-1], weight_scale.shape[-1])
    if not k or k % groups or k // groups % STEP:
        raise FewstepError(f"{groups} groups of {k} columns; the 4-bit product takes groups of a multiple of {STEP}")
    if out_dtype not in KINDS:
        raise FewstepError(f"an output in {out_dtype}; float32, float16 or bfloat16 is made")
    scales = [_expanded(s, rows, groups) for s, rows in ((scale, m), (weight_scale, n))]
    if bias is not None and tuple(bias.shape) != (n,):
        raise FewstepError(f"bias has shape {tuple(bias.shape)}; ({n},) is needed")
    bias = None if bias is None else bias.float().contiguous()
    if {t.device for t in (weight, *scales, *([] if bias is None else [bias]))} != {codes.device}:
        raise FewstepError(f"codes are on {codes.device} and something else is not")
    codes, weight = codes.contiguous(), weight.contiguous()
    out = torch.empty(m, n, dtype=out_dtype, device=codes.device)
    if out.numel():
        arguments = (
            codes,
            scales[0],
            weight,
            scales[1],
            bias,
            out,
            m,
            n,
            k,
            k // groups,
            int(signed),
            KINDS[out_dtype],
        )
        call("w4a4", capability, *arguments)
    return out


def _expanded(scale: Tensor, rows: int, groups: int) -> Tensor:
    if scale.ndim != 2 or scale.shape[0] != rows or scale.shape[1] not in (1, groups):
        raise FewstepError(f"a scale of shape {tuple(scale.shape)}; ({rows}, 1) or ({rows}, {groups}) is needed")
    return scale.float().expand(rows, groups).contiguous()
