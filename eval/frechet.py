"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.eval.moments import Moments


def sqrt_factor(covariance: Tensor) -> Tensor:
    """A factor F of shape (d, r) with F F^T = ``covariance`` (d, d), float64, r <= d its numerical rank.

    From S = V diag(w) V^T by ``eigh``: F = V diag(sqrt(w)), without the columns whose w is rounding noise, that is at
    most d eps max(w), the error of ``eigh`` itself.
    """
    values, vectors = torch.linalg.eigh(covariance)
    noise = covariance.shape[0] * torch.finfo(torch.float64).eps * values[-1].clamp(min=0)
    kept = values > noise
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians with these moments, as FID means it.

        d^2 = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)

    The last trace is taken through symmetric matrices only: with S_1 = F F^T, the eigenvalues of S_1 S_2 are those of
    F^T S_2 F, so it is sum sqrt(eigvalsh(F^T S_2 F)), negatives clipped to 0. This is R S_2 R with R = S_1^(1/2) turned
    into S_1's eigenvectors, which leaves the spectrum as it is and saves a product. A general matrix square root is
    not used: on rank-deficient covariances it gives complex results, and its interface differs between SciPy versions.

    Args:
        first, second: moments of at least 2 samples each, of equal dimension; float64.

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
    factor = sqrt_factor(s1)
    product = factor.T @ s2 @ factor
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = delta @ delta + s1.trace() + s2.trace() - 2 * cross
    return float(distance.clamp(min=0))
