"""What the linear layers share: the input, quantised here or before, the low-rank branch, the bias, the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.quant.formats import Format
from fewstep.quant.kernels.triton.launch import FLOATS, need, padded_rank
from fewstep.quant.kernels.triton.rows import MixedRows, QuantizedRows, quantize_rows

BYTES = (torch.uint8, torch.int8)
SCALES = (torch.float32, torch.float16)


def rows_of(x: Tensor | QuantizedRows, format: str | Format, element: str, **options: Any) -> QuantizedRows:
    """``x`` quantised to ``format``, or as it is if it was quantised before.

    Raises:
        FewstepError: if it was quantised to another element, or ``options`` come too late for it.
    """
    if isinstance(x, QuantizedRows):
        late = [name for name, value in options.items() if isinstance(value, Tensor) or value]
        if late:
            raise FewstepError(f"{' and '.join(late)} given with an input that is quantised already; give them before")
        rows = x
    else:
        rows = quantize_rows(x, format, **options)
    if rows.format.element.name not in element.split(" or "):
        raise FewstepError(f"activations in {rows.format}; {element} is needed")
    return rows


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What is added to a product, and where it goes."""

    projected: Tensor | None
    up: Tensor | None
    bias: Tensor | None
    out: Tensor
    rank: int

    @property
    def constants(self) -> dict[str, Any]:
        return {"HAS_BIAS": self.bias is not None, "RANK": padded_rank(self.rank)}


def epilogue(
    rows: QuantizedRows | MixedRows,
    m: int,
    n: int,
    up: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    like: Tensor,
) -> Epilogue:
    """Check ``up`` (N, R) and ``bias`` (N,), and make room for the result (M, N).

    Raises:
        FewstepError: where only one half of the low-rank branch is there, or a shape, dtype or device differs.
    """
    projected = rows.projected
    if (up is None) != (projected is None):
        missing = "up without down" if projected is None else "down without up"
        raise FewstepError(f"a low-rank branch has two factors; got {missing}")
    rank = 0
    if up is not None and projected is not None:
        rank = projected.shape[1]
        up = need(up, "up", (n, rank), FLOATS, like).to(projected.dtype)
    if bias is not None:
        bias = need(bias, "bias", (n,), FLOATS, like)
    dtype = out_dtype or rows.dtype
    if dtype not in FLOATS:
        raise FewstepError(f"an output in {dtype}; float32, float16 or bfloat16 is made")
    return Epilogue(projected, up, bias, torch.empty(m, n, dtype=dtype, device=like.device), rank)


def shaped(result: Tensor, x: Tensor | QuantizedRows | MixedRows) -> Tensor:
    """(M, N) with the leading dimensions of ``x``, if it still has them."""
    return result.reshape(*x.shape[:-1], result.shape[1]) if isinstance(x, Tensor) else result


def weight_columns(codes: Tensor, bits: int, columns: int, like: Tensor) -> tuple[Tensor, int]:
    """Codes of a weight (N, K) as contiguous bytes, and N.

    Raises:
        FewstepError: if they are not bytes of ``columns`` codes of ``bits`` bits.
    """
    width = columns * bits // 8
    if codes.ndim != 2 or codes.shape[1] != width:
        raise FewstepError(
            f"weight codes have shape {tuple(codes.shape)}; (N, {width}) holds {columns} columns of {bits} bits"
        )
    return need(codes, "weight codes", (codes.shape[0], width), BYTES, like), codes.shape[0]
