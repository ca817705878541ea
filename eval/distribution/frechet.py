"""The Fréchet distance between two Gaussians, of so many samples and of infinitely many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.eval.distribution.moments import Moments

SAFE_PIVOT = 1e-10
"""Cholesky's smallest pivot over its largest. A null direction leaves a pivot of rounding noise, some 1e-16 times the dimension
and more where no single feature points along it."""


@dataclass(frozen=True)
class SqrtFactor:
    """F with F F^T = S.

    Attributes:
        values: float64 (d, r), r <= d.
        lower: whether it is lower triangular, with r = d.
    """

    values: Tensor
    lower: bool

    def congruent(self, covariance: Tensor) -> npt.NDArray[np.float64]:
        """F^T ``covariance`` F (r, r), of which only the lower triangle need be right.

        Where F is triangular by LAPACK's dsygst, in d^3 multiply-adds instead of the 2 d^3 of two products.
        """
        if not self.lower:
            return np.asarray((self.values.T @ covariance @ self.values).numpy())
        from scipy.linalg import lapack

        # Both transposed: Fortran's order of a symmetric matrix, and of an upper factor U = F^T, for which
        # itype 2 gives U S U^T. Its upper triangle in Fortran's order is the lower one in C's.
        product, info = getattr(lapack, "dsygst")(  # noqa: B009  (made at run time, so checkers do not know it)
            covariance.numpy().T, self.values.numpy().T, itype=2, lower=0
        )
        assert info == 0  # the arguments' shapes are right
        return np.asarray(product.T)


def sqrt_factor(covariance: Tensor) -> SqrtFactor:
    """A factor F of ``covariance`` S (d, d), r its numerical rank.

    Cholesky's where the covariance is safely positive definite, at a tenth of the cost. Else from S = V diag(w) V^T by
    ``eigh``: F = V diag(sqrt(w)), without the columns whose w is rounding noise, that is at most d eps max(w), the error
    of ``eigh`` itself.
    """
    lower, failed = torch.linalg.cholesky_ex(covariance)
    pivots = lower.diagonal().square()
    if not bool(failed) and bool(pivots.min() > SAFE_PIVOT * pivots.max()):
        return SqrtFactor(lower, lower=True)
    values, vectors = torch.linalg.eigh(covariance)
    noise = covariance.shape[0] * torch.finfo(torch.float64).eps
    kept = values > noise * values[-1].clamp(min=0)
    return SqrtFactor(vectors[:, kept] * values[kept].sqrt(), lower=False)


def frechet_distance(first: Moments, second: Moments, *, factor: SqrtFactor | None = None) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments, as FID means it.

        d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

    The last trace is taken through symmetric matrices only: with S_1 = F F^T, the eigenvalues of S_1 S_2 are those of
    F^T S_2 F, so it is sum sqrt(eigvalsh(F^T S_2 F)), negatives clipped to 0. Any factor will do, so no S_1^(1/2) is
    made; see :func:`sqrt_factor`. A general matrix square root is not used: on rank-deficient covariances it gives
    complex results, and its interface differs between SciPy versions.

    Args:
        first, second: moments of at least 2 samples each, of equal dimension; float64.
        factor: :func:`sqrt_factor` of the first covariance, where it is at hand.

    Returns:
        d^2 >= 0; rounding below 0 is clipped. Identical moments give 0 to about 1e-8 of tr S (the square root of
        float64's eps, which a null eigenvalue of the product costs), and to about 1e-14 of it at full rank.

    Raises:
        FewstepError: where the dimensions differ or a set has fewer than 2 samples.

    References:
        Dowson and Landau, "The Fréchet distance between multivariate normal distributions" (1982), eq. 4.
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule ...", arXiv:1706.08500, eq. 6.
    """
    if first.dim != second.dim:
        raise FewstepError(f"moments of dimension {first.dim} and {second.dim} have no Fréchet distance; use one net")
    delta = first.mean - second.mean
    s1, s2 = first.covariance, second.covariance
    factor = sqrt_factor(s1) if factor is None else factor
    cross = float(np.sqrt(_eigenvalues(factor.congruent(s2)).clip(min=0)).sum())
    distance = delta @ delta + s1.trace() + s2.trace() - 2 * cross
    return float(distance.clamp(min=0))


def _eigenvalues(symmetric: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of a matrix whose lower triangle is looked at alone."""
    from scipy.linalg import eigvalsh

    return np.asarray(eigvalsh(symmetric, lower=True, check_finite=False))


def extrapolated_distance(features: Tensor, reference: Moments, parts: int, seed: int = 2020) -> float:
    """The squared Fréchet distance of ``features`` (n, d) to a reference, extrapolated to infinitely many samples.

    The distance of N samples is biased by about b / N. The features, shuffled once, are cut into 1, 2, ... K parts of
    equal size; the mean distance of k parts stands for N = n / k, and the line a + b k / n through the K points is
    read at 0. All K points rest on the same samples, so that their errors of first order are one and the same, and the
    extrapolated value has the standard error of the plain distance, not a larger one.

    Args:
        features: of the images, float64.
        reference: moments of the reference, taken to be exact.
        parts: K, at least 2; see :func:`usual_parts`.
        seed: of NumPy's ``RandomState``, which shuffles.

    Returns:
        The intercept a; for two equal laws it may be slightly below 0.

    Raises:
        FewstepError: for too few samples: with n <= d in a part the covariance is rank deficient, the bias is far from
            b / n, and the line means nothing.

    References:
        Chong and Forsyth, "Effectively Unbiased FID and Inception Score and where to find them", arXiv:1911.07023.
    """
    count, dim = features.shape
    if not 2 <= parts <= count // (dim + 1):
        raise FewstepError(
            f"{count} images with {dim} features in {parts} parts: each part needs more images than there are "
            f"features, and there must be 2; give at least {max(parts, 2) * (dim + 1)} images"
        )
    shuffled = features[torch.from_numpy(np.random.RandomState(seed).permutation(count))]
    factor = sqrt_factor(reference.covariance)
    inverse, means = [], []
    for k in range(1, parts + 1):
        size = count // k
        cuts = [Moments.of(shuffled[i * size : (i + 1) * size]) for i in range(k)]
        inverse.append(1 / size)
        means.append(sum(frechet_distance(reference, cut, factor=factor) for cut in cuts) / k)
    return intercept(inverse, means)


def usual_parts(count: int, dim: int) -> int:
    """K for ``count`` samples of ``dim`` features: up to 8, as many as leave each part more samples than features."""
    return min(8, count // (dim + 1))


def intercept(x: Sequence[float], y: Sequence[float]) -> float:
    """The value at 0 of the least-squares line through the points (x_i, y_i)."""
    return float(np.polynomial.Polynomial.fit(x, y, 1)(0.0))
