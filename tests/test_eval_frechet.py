"""The Fréchet distance against closed forms and against the unsymmetric formula it replaces."""

import math

import pytest
import torch

from fewstep.eval import Moments, frechet_distance
from fewstep.eval.distribution.frechet import sqrt_factor

EPS = torch.finfo(torch.float64).eps


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int = 1000) -> Moments:
    """Moments that have exactly this mean and covariance."""
    moments = Moments(len(mean))
    moments.count, moments.mean, moments.m2 = count, mean.double(), covariance.double() * (count - 1)
    return moments


def random_orthogonal(dim: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


def by_eigenvalues(a: Moments, b: Moments) -> float:
    """The textbook form: the eigenvalues of the unsymmetric product S1 S2, in complex float64."""
    roots = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
    delta = a.mean - b.mean
    return float(delta @ delta + a.covariance.trace() + b.covariance.trace() - 2 * roots)


def test_one_dimension():
    a = gaussian(torch.tensor([1.0]), torch.tensor([[4.0]]))
    b = gaussian(torch.tensor([4.0]), torch.tensor([[25.0]]))
    assert frechet_distance(a, b) == pytest.approx(3**2 + (2 - 5) ** 2, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_commuting_covariances(dim):
    """Common eigenvectors: |mu1 - mu2|^2 + sum (sqrt a_i - sqrt b_i)^2."""
    generator = torch.Generator().manual_seed(dim)
    a = torch.rand(dim, dtype=torch.float64, generator=generator) + 0.1
    b = torch.rand(dim, dtype=torch.float64, generator=generator) + 0.1
    delta = torch.randn(dim, dtype=torch.float64, generator=generator)
    q = random_orthogonal(dim, 5)
    expected = float(delta @ delta + ((a.sqrt() - b.sqrt()) ** 2).sum())
    got = frechet_distance(
        gaussian(torch.zeros(dim), q @ torch.diag(a) @ q.T), gaussian(delta, q @ torch.diag(b) @ q.T)
    )
    # Errors of dim eigenvalues of size up to about 1, well away from 0.
    assert got == pytest.approx(expected, abs=100 * dim * EPS * dim)


def test_general_covariances_agree_with_the_unsymmetric_form():
    generator = torch.Generator().manual_seed(2)
    a = Moments.of(torch.randn(500, 24, dtype=torch.float64, generator=generator))
    b = Moments.of(
        torch.randn(400, 24, dtype=torch.float64, generator=generator) @ random_orthogonal(24, 1).mul(1.5) + 0.3
    )
    assert frechet_distance(a, b) == pytest.approx(by_eigenvalues(a, b), rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_fewer_samples_than_dimensions():
    """Rank deficient: null eigenvalues of the product come out as up to d eps |S|, and are rooted then."""
    dim = 48
    generator = torch.Generator().manual_seed(3)
    a = Moments.of(torch.randn(20, dim, dtype=torch.float64, generator=generator))
    b = Moments.of(torch.randn(30, dim, dtype=torch.float64, generator=generator) + 1)
    scale = float(a.covariance.trace() + b.covariance.trace())
    assert frechet_distance(a, b) == pytest.approx(by_eigenvalues(a, b), abs=dim * math.sqrt(dim * EPS) * scale)


def test_covariances_of_disjoint_support():
    """Nothing in common: all of both traces counts."""
    a = gaussian(torch.zeros(4), torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0])))
    b = gaussian(torch.zeros(4), torch.diag(torch.tensor([0.0, 0.0, 3.0, 4.0])))
    assert frechet_distance(a, b) == pytest.approx(10, rel=1e-12)


@pytest.mark.parametrize("count", [300, 10])
def test_a_set_has_no_distance_to_itself(count):
    dim = 16
    x = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    moments = Moments.of(x)
    scale = float(moments.covariance.trace())
    assert 0 <= frechet_distance(moments, moments) <= dim * math.sqrt(dim * EPS) * scale
    if count > dim:
        assert frechet_distance(moments, moments) <= 1e-12 * scale


def test_equal_points_have_the_distance_of_their_means():
    """All samples equal: both covariances are 0."""
    a, b = Moments.of(torch.ones(5, 3)), Moments.of(torch.zeros(5, 3))
    assert frechet_distance(a, b) == 3.0


def test_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="dimension 3 and 4"):
        frechet_distance(Moments.of(torch.zeros(5, 3)), Moments.of(torch.zeros(5, 4)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(Moments.of(torch.zeros(1, 3)), Moments.of(torch.zeros(5, 3)))


@pytest.mark.parametrize(
    ("smallest", "rank"),
    [(1e-3, 12), (1e-10, 12), (1e-17, 11), (0.0, 11)],
    ids=["well conditioned", "badly", "beyond float64", "singular"],
)
def test_factors_multiply_back(smallest, rank):
    """F F^T = S to rounding, by Cholesky and by eigenvectors alike, and no more columns than the numerical rank."""
    q = random_orthogonal(12, 6)
    values = torch.linspace(1, 2, 12, dtype=torch.float64)
    values[0] = smallest
    covariance = q @ torch.diag(values) @ q.T
    factor = sqrt_factor((covariance + covariance.T) / 2).values
    assert factor.shape == (12, rank)
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=0, atol=10 * 12 * EPS * 2)


def test_which_factor_was_taken_does_not_show():
    """A dead feature turns Cholesky's way into eigenvectors'; the distance of the others stays what it was."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(300, 20, dtype=torch.float64, generator=generator)
    y = 1.5 * torch.randn(200, 20, dtype=torch.float64, generator=generator) + 0.2
    alive = frechet_distance(Moments.of(x), Moments.of(y))
    with_dead = (Moments.of(torch.nn.functional.pad(features, (0, 1))) for features in (x, y))
    assert frechet_distance(*with_dead) == pytest.approx(alive, rel=1e-12)


def test_a_factor_at_hand_is_used_and_changes_nothing():
    generator = torch.Generator().manual_seed(9)
    a, b = (Moments.of(torch.randn(100, 10, dtype=torch.float64, generator=generator)) for _ in range(2))
    assert frechet_distance(a, b, factor=sqrt_factor(a.covariance)) == frechet_distance(a, b)


@pytest.mark.parametrize("smallest", [1e-3, 0.0], ids=["triangular", "of eigenvectors"])
def test_congruent_is_the_product_of_three(smallest):
    """F^T S F; of a triangular factor LAPACK is asked for the lower half alone."""
    q = random_orthogonal(12, 7)
    values = torch.linspace(1, 2, 12, dtype=torch.float64)
    values[0] = smallest
    factor = sqrt_factor(q @ torch.diag(values) @ q.T)
    assert factor.lower is (smallest > 0)
    other = torch.diag(torch.linspace(3, 4, 12, dtype=torch.float64)) + 0.1
    expected = factor.values.T @ other @ factor.values
    found = torch.from_numpy(factor.congruent(other)).tril()
    torch.testing.assert_close(
        found, expected.tril(), rtol=0, atol=2 * 12**2 * EPS * 2 * 5
    )  # sums of 12 x 12, |F|^2 2, |S| 5
