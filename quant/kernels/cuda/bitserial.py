"""Products of codes of 1 to 8 bits, one pair of bit planes at a time, on binary tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.formats import Integer, Quantized
from fewstep.quant.kernels.cuda.launch import call, ready

CHUNK = 256
"""Columns of a binary product; planes are padded to a multiple of it."""


@dataclass(frozen=True, eq=False)
class BitPlanes:
    """Unsigned codes (R, K), taken apart into bits.

    Attributes:
        planes: (bits, R, K' / 8) uint8, K' = K padded with zeros to a multiple of 256. Bit k % 8 of byte k // 8 of plane i is
            bit i of the code in column k.
        columns: K.
    """

    planes: Tensor
    columns: int

    @property
    def bits(self) -> int:
        return int(self.planes.shape[0])

    @property
    def rows(self) -> int:
        return int(self.planes.shape[1])


def bit_planes(codes: Tensor, bits: int) -> BitPlanes:
    """Take apart unsigned ``codes`` (R, K) uint8 of ``bits`` bits.

    Raises:
        FewstepError: for other codes, or numbers of bits other than 1 to 8.
    """
    if not 1 <= bits <= 8 or codes.ndim != 2 or codes.dtype != torch.uint8:
        raise FewstepError(f"{bits} bits of codes {tuple(codes.shape)} in {codes.dtype}; 1 to 8 bits of a uint8 matrix")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise FewstepError(f"a code {int(codes.max())} does not fit in {bits} bits")
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)[:, None, None]
    padded = torch.nn.functional.pad(codes >> places & 1, (0, -codes.shape[1] % CHUNK))
    eight = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return BitPlanes((padded.reshape(*padded.shape[:2], -1, 8) << eight).sum(-1, dtype=torch.uint8), codes.shape[1])


def plane_products(a: BitPlanes, w: BitPlanes, *, bipolar: bool = False, emulate: bool = False) -> Tensor:
    """sum_k a[m, k] w[n, k], exact, as int32 (M, N): bits p of A times bits q of W binary products.

    Args:
        a, w: planes of (M, K) and (N, K) codes.
        bipolar: bit i stands for +2^i or -2^i, so that a code c of b bits is the odd integer 2 c - (2^b - 1); by XOR.
            Otherwise for 2^i or 0; by AND.
        emulate: run the kernel's source on the CPU, slowly, as the tests do.

    Raises:
        FewstepError: if K differs, sums may not fit in 32 bits, or the device has no such product.

    Source: ABQ-LLM, 2408.08554 (AND); Efficient Arbitrary Precision Acceleration for LLMs on GPU Tensor Cores, 2409.17870
        (bipolar integers, XOR).
    """
    capability = ready("bitserial", a.planes, emulate)
    if a.columns != w.columns or a.planes.device != w.planes.device:
        raise FewstepError(
            f"planes of {a.columns} columns on {a.planes.device} and of {w.columns} on {w.planes.device}; both must agree"
        )
    if 2 * (2**a.bits - 1) * (2**w.bits - 1) * a.columns >= 2**31:
        raise FewstepError(f"{a.columns} products of {a.bits} and {w.bits} bits may not fit in 32 bits; split K")
    out = torch.empty(a.rows, w.rows, dtype=torch.int32, device=a.planes.device)
    if out.numel():
        planes = a.planes.contiguous(), w.planes.contiguous()
        sizes = (a.rows, w.rows, a.columns, planes[0].shape[2], a.bits, w.bits)
        call("bitserial", capability, *planes, out, *sizes, int(bipolar))
    return out


def bitserial_product(a: Quantized, w: Quantized, *, emulate: bool = False) -> Tensor:
    """decode(a) decode(w)^T of integer codes of any width and sign, with or without zero points, exact but for the scales.

    With c = code - low >= 0 and z = zero - low, sum (c_a - z_a)(c_w - z_w) = sum c_a c_w - z_w sum c_a - z_a sum c_w + K z_a z_w.

    Args:
        a: (M, K), ``int``, ``uint`` or ``zint`` of 1 to 8 bits with a scale a row or tensor.
        w: (N, K), likewise.
        emulate: run the kernel's source on the CPU, slowly, as the tests do.

    Returns:
        (M, N) float32.

    Raises:
        FewstepError: for other formats, and as :func:`plane_products`.
    """
    sides = [_unsigned(side) for side in (a, w)]
    (codes_a, zero_a), (_, zero_w) = sides
    planes = [
        bit_planes(codes, side.format.element.storage_bits) for (codes, _), side in zip(sides, (a, w), strict=True)
    ]
    sums = [codes.sum(1, keepdim=True, dtype=torch.int64) for codes, _ in sides]
    exact = plane_products(*planes, emulate=emulate).long()
    exact = exact - sums[0] * zero_w.T - zero_a * sums[1].T + codes_a.shape[1] * zero_a * zero_w.T
    return exact.float() * a.scale * w.scale.T


def _unsigned(side: Quantized) -> tuple[Tensor, Tensor]:
    """Codes from 0 on, and the (R, 1) or (1, 1) int64 zero points that go with them."""
    element = side.format.element
    if not isinstance(element, Integer) or element.kind == "bint" or side.format.group:
        raise FewstepError(
            f"{side.format}: bit planes are made of int, uint or zint codes with a scale a row or tensor"
        )
    zero = torch.zeros_like(side.scale) if side.zero is None else side.zero
    return (side.codes.short() - element.low).to(torch.uint8), zero.long() - element.low
