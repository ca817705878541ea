"""How well past values of a site predict a later one: from inner products, without keeping the features.

For every channel c of a site the products of its features at all pairs of steps, summed over samples and positions, and
their sums: G[c, s, t] = sum F_c(s) F_c(t), m[c, t] = sum F_c(t). From these follows the best affine prediction of any step
from any others, and how much it leaves, in closed form. float64 on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.caching.predictors import channel_axis

Array = np.ndarray[Any, np.dtype[np.float64]]
RIDGE = 1e-4
"""Pull of a fit towards its prior, as a share of the predictors' mean square: keeps channels that hardly vary from weights
that fit rounding."""


class Gram:
    """Sums over a calibration run of one site.

    Attributes:
        products: (channels, steps, steps).
        sums: (channels, steps).
        count: values summed in each.
    """

    def __init__(self) -> None:
        self.products: Array = np.zeros((0, 0, 0))
        self.sums: Array = np.zeros((0, 0))
        self.count = 0
        self._centered: tuple[int, Array] = (-1, np.zeros((0, 0, 0)))

    def add(self, features: Sequence[Tensor]) -> None:
        """Add a batch: the site's value at every step, all of one shape."""
        stacked = torch.stack([_by_channel(value) for value in features], 1).double()  # (C, T, values)
        products = torch.bmm(stacked, stacked.transpose(1, 2)).numpy()
        sums = stacked.sum(2).numpy()
        if self.count == 0:
            self.products, self.sums = products, sums
        else:
            self.products += products
            self.sums += sums
        self.count += stacked.shape[2]

    @property
    def steps(self) -> int:
        """Steps of the trajectory."""
        return int(self.sums.shape[1])

    def left(self, step: int, past: Sequence[int]) -> float:
        """Mean square that the best affine prediction of ``step`` from the steps ``past`` leaves, over all channels.

        With the mean square of the values it becomes relative, see :meth:`scale`.
        """
        centered = self._covariance()
        past = list(past)
        a = centered[:, past][:, :, past]
        b = centered[:, past, step]
        a = a + 1e-10 * np.trace(a, axis1=1, axis2=2)[:, None, None] * np.eye(len(past)) + 1e-300 * np.eye(len(past))
        explained = np.einsum("ck,ck->c", b, np.linalg.solve(a, b[..., None])[..., 0])
        return float(np.maximum(centered[:, step, step] - explained, 0).sum() / max(self.count, 1))

    def held(self, step: int, past: int) -> float:
        """Mean square that holding the value of ``past`` leaves at ``step``."""
        g = self.products
        return float(
            np.maximum(g[:, step, step] - 2 * g[:, step, past] + g[:, past, past], 0).sum() / max(self.count, 1)
        )

    def scale(self, step: int) -> float:
        """Mean square of the value at ``step`` about its channels' means."""
        return float(self._covariance()[:, step, step].sum() / max(self.count, 1))

    def _covariance(self) -> Array:
        if self._centered[0] != self.count:
            outer = np.einsum("cs,ct->cst", self.sums, self.sums) / max(self.count, 1)
            self._centered = (self.count, self.products - outer)
        return self._centered[1]


def _by_channel(value: Tensor) -> Tensor:
    """(channels, all else), on the host."""
    return value.detach().float().cpu().movedim(channel_axis(value), 0).flatten(1)


def solve(
    products: Array, sums: Array, targets: Array, target_sums: Array, count: int, prior: Array
) -> tuple[Array, Array]:
    """Per channel the weights and the shift that predict best, drawn a little towards a prior.

        min over w, b of  sum (y - w . x - b)^2 + r n |w - w0|^2,   r = RIDGE * mean variance of x

    Args:
        products: (C, D, D) sums of x x'.
        sums: (C, D) sums of x.
        targets: (C, D) sums of x y.
        target_sums: (C,) sums of y.
        count: n.
        prior: (D,) w0.

    Returns:
        (C, D) weights and (C,) shifts.
    """
    depth = sums.shape[1]
    a = products - sums[:, :, None] * sums[:, None, :] / count
    b = targets - sums * target_sums[:, None] / count
    ridge = RIDGE * np.trace(a, axis1=1, axis2=2) / depth + 1e-30 * count
    a = a + ridge[:, None, None] * np.eye(depth)
    weights = np.linalg.solve(a, (b + ridge[:, None] * prior)[..., None])[..., 0]
    return weights, (target_sums - (weights * sums).sum(1)) / count
