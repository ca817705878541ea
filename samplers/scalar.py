"""Numbers that are either plain floats or 0-d float64 tensors: one way to write a coefficient, learned or not.

Rows are made of a few hundred scalars. As floats they cost microseconds; as tensors they carry gradients. The formulas
are the same, so they are written once, with these functions in place of those of ``math`` or ``torch``.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = float | Tensor


def value(x: Scalar) -> float:
    """The number itself, without its gradient."""
    return float(x.detach()) if isinstance(x, Tensor) else x


def exp(x: Scalar) -> Scalar:
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def expm1(x: Scalar) -> Scalar:
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def sqrt(x: Scalar) -> Scalar:
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def stack(values: list[Scalar]) -> Tensor:
    """A float64 vector of ``values``; it carries gradients if one of them does."""
    if any(isinstance(v, Tensor) for v in values):
        return torch.stack([v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")
