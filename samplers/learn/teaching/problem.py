"""What is learned on: a model as a plain callable, noise, and where that noise ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.grid import Grid
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule, f64

Network: TypeAlias = Callable[[Tensor, Any, Tensor], Tensor]
"""``network(x, t, which) -> raw``: x (batch, ...) already scaled where the family scales it, t the model time (a number or
a 0-d tensor that may carry a gradient), ``which`` (batch,) the samples that x are states of: each has its own conditioning.
"""


@dataclass(frozen=True, eq=False)
class Problem:
    """n teacher trajectories of one model, and the model that made them.

    Made by ``Teacher.problem()`` from a pipeline, or by :func:`~fewstep.samplers.learn.solve` from any callable.

    Raises:
        FewstepError: no trajectory, states that are not finite, or arrays that do not fit together.
    """

    network: Network
    schedule: NoiseSchedule
    noise: Tensor
    """(n, ...): standard normal; ``plan.init_scale`` times it is where a plan starts."""
    lam: Tensor
    """(M+1,) float64, increasing: lambda of the states that are kept; the last may be +inf (sigma = 0)."""
    states: Tensor
    """(M+1, n, ...): the teacher's states there. The first is the scaled noise, the last what a student should reach."""
    which: Tensor
    """(n,) int64: what the network is told about the samples."""
    checkpoint: bool = False
    """Whether gradients recompute every network call rather than keep its activations."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """JSON: the model, prompts, guidance and seeds, for the provenance of what is learned."""

    def __post_init__(self) -> None:
        n = len(self.noise)
        if n == 0 or self.states.shape[:2] != (len(self.lam), n) or self.which.shape != (n,):
            raise FewstepError(
                f"{n} noises, states of shape {tuple(self.states.shape)}, {len(self.lam)} lambdas and {len(self.which)} "
                "indices do not describe trajectories; states are (lambdas, samples, ...)"
            )
        finite = self.states.flatten(2).isfinite().all(2).all(0)
        if not bool(finite.all()):
            bad = (~finite).nonzero()[:, 0].tolist()
            raise FewstepError(
                f"{len(bad)} of {n} teacher trajectories are NaN or infinite, the first that of sample {bad[0]}: the model "
                "overflows (run it in float32) or the guidance is too strong for the teacher's steps"
            )

    @property
    def targets(self) -> Tensor:
        """(n, ...): where the trajectories end."""
        return self.states[-1]

    def __len__(self) -> int:
        return len(self.noise)

    def take(self, indices: slice | Tensor) -> Problem:
        """The trajectories at ``indices``."""
        return replace(
            self, noise=self.noise[indices], states=self.states[:, indices], which=self.which[indices], about=self.about
        )

    def split(self, held_out: int) -> tuple[Problem, Problem]:
        """(to learn from, to judge by): the last ``held_out`` trajectories are held out.

        Raises:
            FewstepError: fewer trajectories than that and one more.
        """
        if not 0 < held_out < len(self):
            raise FewstepError(
                f"{len(self)} trajectories cannot be split into {held_out} held out and at least one to learn from"
            )
        return self.take(slice(0, len(self) - held_out)), self.take(slice(len(self) - held_out, len(self)))

    def state_at(self, lam: float) -> Tensor:
        """The teacher's state at ``lam``, (n, ...): X / sqrt(alpha^2 + sigma^2) interpolated by cubics in lambda.

        Beyond the last finite lambda the trajectories are straight lines in sigma at this scale.
        """
        alpha, sigma = self.schedule.alpha_sigma(f64(lam))
        norm = torch.sqrt(alpha**2 + sigma**2)
        exact = (self.lam == lam).nonzero()
        if len(exact):
            return self.states[int(exact[0, 0])]
        known_alpha, known_sigma = self.schedule.alpha_sigma(self.lam)
        usable = self.lam.isfinite().nonzero()[:, 0]
        inner = self.lam[usable]
        if lam > inner[-1] or lam < inner[0]:
            # the two ends are known, and in between X is nearly linear in sigma
            a, b = (int(usable[-1]), len(self.lam) - 1) if lam > inner[-1] else (0, int(usable[0]))
            w = float((sigma - known_sigma[b]) / (known_sigma[a] - known_sigma[b])) if a != b else 1.0
            return w * self.states[a] + (1 - w) * self.states[b]
        right = int(torch.searchsorted(inner, f64(lam)))
        first = min(max(right - 2, 0), max(len(inner) - 4, 0))
        nodes = usable[first : first + 4].tolist()
        total = torch.zeros_like(self.states[0])
        for j in nodes:
            weight = 1.0
            for k in nodes:
                if k != j:
                    weight *= float((lam - self.lam[k]) / (self.lam[j] - self.lam[k]))
            scale = torch.sqrt(known_alpha[j] ** 2 + known_sigma[j] ** 2)
            total = total + (weight * float(norm / scale)) * self.states[j]
        return total

    def start(self, plan: SolverPlan) -> Tensor:
        """(n, ...): the plan's first states."""
        return self.noise * plan.init_scale


def noisiest(schedule: NoiseSchedule) -> float:
    """The smallest lambda that a step may be measured from: of the noisiest training time, or where that is pure noise, near."""
    hi, lo = schedule.t_range
    shares = f64(
        [1.0, 0.9995, 0.998, 0.99]
    )  # zero terminal SNR: a table has nothing between pure noise and its neighbour
    lam = schedule.lam(lo + shares * (hi - lo))
    return float(lam[lam.isfinite()][0])


def teacher_grid(schedule: NoiseSchedule, steps: int) -> Grid:
    """Where a teacher looks: half of its steps uniform in lambda, half in time, so that no part of the way is coarse.

    Time is EDM's sigma^(1/7) for variance exploding, whose sigma itself is nearly all noise.
    """
    hi, lo = schedule.t_range
    begin, end = schedule.lam(f64([hi, lo])).tolist()
    inner = noisiest(schedule)
    many = 16 * steps
    share = torch.linspace(0, 1, many + 1, dtype=torch.float64)
    if schedule.family == "ve":
        timed = schedule.lam((lo ** (1 / 7) + (1 - share) * (hi ** (1 / 7) - lo ** (1 / 7))) ** 7)
    else:
        timed = schedule.lam(lo + (1 - share) * (hi - lo))
    lam = torch.cat([inner + share * (end - inner), timed.clamp(inner, end)])
    quantiles = lam.sort().values
    first = [begin] if begin != inner else []
    count = steps - len(first)
    at = torch.linspace(0, len(quantiles) - 1, count, dtype=torch.float64).round().long()
    points = quantiles[at].unique()  # type: ignore[no-untyped-call]
    return Grid.lambdas(schedule, torch.cat([f64(first), points, f64([float("inf")])]), name="teacher")
