"""Exact models: data whose score, and whose whole flow, is known in closed form. For tests, demos and notebooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.schedule import NoiseSchedule, f64


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Isotropic Gaussian mixture p(x0) = sum_k w_k N(mu_k, s_k^2 I) in d dimensions, with its exact denoiser.

        p(x_t) = sum_k w_k N(alpha mu_k, (alpha^2 s_k^2 + sigma^2) I)
        E[x0 | x_t] = sum_k pi_k(x_t) [mu_k + alpha s_k^2 / (alpha^2 s_k^2 + sigma^2) (x_t - alpha mu_k)]

    With one component the probability flow has a closed form, :meth:`flow`.
    """

    means: Tensor
    """(K, d) float64."""
    stds: Tensor
    """(K,) float64, positive."""
    weights: Tensor
    """(K,) float64, summing to 1."""

    @staticmethod
    def random(components: int, dim: int, seed: int, *, spread: float = 1.0) -> GaussianMixture:
        """A reproducible mixture with means of standard deviation ``spread`` and component widths of 0.2 to 0.6."""
        g = torch.Generator().manual_seed(seed)
        means = spread * torch.randn(components, dim, generator=g, dtype=torch.float64)
        stds = 0.2 + 0.4 * torch.rand(components, generator=g, dtype=torch.float64)
        weights = torch.rand(components, generator=g, dtype=torch.float64) + 0.5
        return GaussianMixture(means, stds, weights / weights.sum())

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t = x], shape (n, d); alpha and sigma are numbers or, one a row of x, of shape (n, 1)."""
        variance = alpha**2 * self.stds**2 + sigma**2
        offset = x[:, None, :] - alpha[..., None] * self.means
        log_p = self.weights.log() - offset.square().sum(-1) / (2 * variance) - 0.5 * x.shape[1] * variance.log()
        gain = alpha * self.stds**2 / variance
        return (torch.softmax(log_p, 1)[..., None] * (self.means + gain[..., None] * offset)).sum(1)

    def model(self, schedule: NoiseSchedule) -> Callable[[Tensor, float | Tensor], Tensor]:
        """A network for this data: ``model(x, model_time)`` returns what ``schedule.prediction`` names.

        model_time is a number, or a vector with one for each row of x.
        """

        def network(x: Tensor, tau: float | Tensor) -> Tensor:
            lam = schedule.lam(schedule.t_from_model_time(f64(tau)))
            alpha, sigma = schedule.alpha_sigma(lam if lam.ndim == 0 else lam[:, None])
            x = x.double() / schedule.in_scale(sigma)
            x0 = self.x0(x, alpha, sigma)
            if schedule.prediction == "sample":
                return x0
            if schedule.prediction == "epsilon":
                return (x - alpha * x0) / sigma
            if schedule.prediction == "v_prediction":
                return (alpha * x - x0) / sigma
            if schedule.prediction == "flow_prediction":
                return (x - x0) / sigma
            if schedule.prediction == "edm":
                s = schedule.sigma_data
                return (x0 - s**2 / (sigma**2 + s**2) * x) * torch.sqrt(sigma**2 + s**2) / (sigma * s)
            raise FewstepError(unknown("prediction type of an exact model", schedule.prediction, ("epsilon", "sample")))

        return network

    def guided(
        self, schedule: NoiseSchedule, components: Sequence[int], scale: float
    ) -> Callable[[Tensor, float | Tensor], Tensor]:
        """A network with classifier-free guidance, u + ``scale`` (c - u): u of this mixture, c of some of its components.

        Guidance makes the flow much harder to follow than a scale of 1, and no closed form of it is known.
        """
        kept = torch.tensor(list(components))
        weights = self.weights[kept] / self.weights[kept].sum()
        part = GaussianMixture(self.means[kept], self.stds[kept], weights).model(schedule)
        whole = self.model(schedule)

        def network(x: Tensor, tau: float | Tensor) -> Tensor:
            unconditional = whole(x, tau)
            return unconditional + scale * (part(x, tau) - unconditional)

        return network

    def flow(self, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
        """The probability flow from (alpha, sigma) = ``start`` to ``end``, in closed form, for one component.

        (x_t - alpha_t mu) / sqrt(alpha_t^2 s^2 + sigma_t^2) is constant along it.
        """
        if len(self.weights) != 1:
            raise FewstepError(
                f"the flow has a closed form for one component only, this mixture has {len(self.weights)}"
            )
        mu, s = self.means[0], self.stds[0]
        scale = [torch.sqrt(a**2 * s**2 + b**2) for a, b in (start, end)]
        return end[0] * mu + scale[1] / scale[0] * (x - start[0] * mu)

    def sample(self, n: int, seed: int) -> Tensor:
        """n draws of x0, (n, d)."""
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=g)
        z = torch.randn(n, self.means.shape[1], generator=g, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * z
