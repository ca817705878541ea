"""Codes of 1 to 8 bits side by side in bytes, the first code in the lowest bits.

Two 4-bit codes share a byte with the even one in the low nibble, as torch.float4_e2m1fn_x2 and most kernels have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import FewstepError


def packed_width(columns: int, bits: int) -> int:
    """Bytes that a row of ``columns`` codes takes."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., K) int8 or uint8 codes to (..., ceil(K bits / 8)) uint8; of signed codes the lowest ``bits`` bits are kept.

    Raises:
        FewstepError: for other than 1 to 8 bits, or codes of another dtype.
    """
    _check(bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise FewstepError(f"codes have dtype {codes.dtype}; int8 or uint8 is needed")
    codes = codes.view(torch.uint8) if codes.dtype == torch.int8 else codes
    if bits == 8:
        return codes.contiguous()
    columns = codes.shape[-1]
    codes = torch.nn.functional.pad(codes & (2**bits - 1), (0, -columns % 8))
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> places) & 1).reshape(*codes.shape[:-1], -1, 8)
    eight = torch.arange(8, dtype=torch.uint8, device=codes.device)
    packed: Tensor = (stream << eight).sum(-1, dtype=torch.uint8)
    return packed[..., : packed_width(columns, bits)].contiguous()


def unpack(data: Tensor, bits: int, columns: int, *, signed: bool) -> Tensor:
    """(..., K) codes, int8 where ``signed`` and uint8 else, of what :func:`pack` made.

    Raises:
        FewstepError: where the bytes of a row do not hold ``columns`` codes.
    """
    _check(bits)
    if data.dtype != torch.uint8 or data.shape[-1] != packed_width(columns, bits):
        raise FewstepError(
            f"packed rows have {data.shape[-1]} elements of {data.dtype}; {columns} codes of {bits} bits "
            f"are {packed_width(columns, bits)} of torch.uint8"
        )
    if bits == 8:
        return data.view(torch.int8) if signed else data
    if bits == 4:  # the common case, without the stream of bits
        codes = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)[..., :columns]
    else:
        data = torch.nn.functional.pad(data, (0, -data.shape[-1] % bits))
        eight = torch.arange(8, dtype=torch.uint8, device=data.device)
        stream = ((data.unsqueeze(-1) >> eight) & 1).reshape(*data.shape[:-1], -1, bits)
        places = torch.arange(bits, dtype=torch.uint8, device=data.device)
        codes = (stream << places).sum(-1, dtype=torch.uint8)[..., :columns]
    if not signed:
        return codes.contiguous()
    lift = 8 - bits
    return (codes << lift).contiguous().view(torch.int8) >> lift  # an arithmetic shift carries the sign down


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise FewstepError(f"codes have {bits} bits; 1 to 8 can be packed")
