"""Weights and activations as the matrices that formats encode: channels last, so that a group lies within one pixel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def weight_matrix(weight: Tensor) -> Tensor:
    """(N, K) of a linear weight (N, K), or (N, h w C) of a convolution's (N, C, h, w)."""
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def weight_tensor(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """What :func:`weight_matrix` was given, of ``shape``."""
    if len(shape) == 2:
        return matrix
    n, c, h, w = shape
    return matrix.reshape(n, h, w, c).permute(0, 3, 1, 2)


def pixels(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, H W C) of a convolution's inputs (B, C, H, W): one row a sample, so that no sample's scale depends on another's.

    A 1 x 1 convolution sums within a pixel, as a linear layer within a token: there it is (B H W, C), one row a pixel.

    Args:
        shape: of the convolution's weight, (N, C, h, w).
    """
    alone = tuple(shape[2:]) == (1, 1)
    return x.permute(0, 2, 3, 1).reshape(-1 if alone else x.shape[0], x.shape[1] if alone else x[0].numel())


def images(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """What :func:`pixels` was given, of ``shape``, in channels-last memory."""
    b, c, h, w = shape
    return matrix.reshape(b, h, w, c).permute(0, 3, 1, 2)
