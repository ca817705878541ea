"""Time-Shift sampler: tell the network the time that a state's variance indicates, against exposure bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.executor import sample
from fewstep.samplers.generators import Generators
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.schedule import NoiseSchedule, f64

Model = Callable[[Tensor, Any], Tensor]


@dataclass
class TimeShift:
    """A network that is told, for every sample, the time near the given one that fits the sample's variance.

    A predicted state is not distributed as the noise level that it should have; for each sample the time is replaced by

        argmin over tau' in [tau - window/2, tau + window/2] of |Var(x) - (alpha^2 v + sigma^2)(tau')|

    where tau > ``cutoff``; coefficients stay those of the plan. Use it in place of the network in
    :func:`fewstep.samplers.sample`; :func:`averaged_time_shift` makes a plan with the mean times, which any scheduler runs.

    Times are searched on 2 * ceil(window/2) + 1 or at least 33 even places and never leave the training range. The paper
    takes v = 0 (the data's variance left out) and every pixel and channel into the variance; guidance inflates it.

    Source: Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps, 2305.15583, algorithm 2.
    Its (window, cutoff): (5, 550) for PNDM, (30, 300) for DPM-Solver, (10, 900) for DEIS on CIFAR-10. The paper's window is
    the whole width, as here; the published 10 of DEIS is what its code takes on each side, hence ``window=20``. This is the
    paper's form. The authors' code compares the state before a step and lands the step on the time that it finds.

    Raises:
        FewstepError: a window that is negative, or a negative data variance.
    """

    network: Model
    """``network(x, tau)`` with tau a float or a (batch,) float64 tensor on the device of x."""
    schedule: NoiseSchedule
    window: float
    cutoff: float
    data_variance: float = 0.0
    told: list[Tensor] = field(default_factory=list)
    """The (batch,) times of every call so far."""

    def __post_init__(self) -> None:
        if not self.window >= 0 or not self.data_variance >= 0:
            raise FewstepError(
                f"window and data_variance are at least 0, got {self.window!r} and {self.data_variance!r}"
            )

    def __call__(self, x: Tensor, tau: float | Tensor) -> Tensor:
        times = self.times(x, float(tau))
        self.told.append(times)
        return self.network(x, times.to(x.device))

    def times(self, x: Tensor, tau: float) -> Tensor:
        """(batch,) float64: what to tell the network at states ``x`` (as the network sees them) whose time is ``tau``."""
        if tau <= self.cutoff or self.window == 0:
            return f64([tau]).expand(len(x))
        half = self.window / 2
        count = max(16, int(-(-half // 1)))
        ends = self.schedule.model_time(f64(self.schedule.t_range))
        places = (tau + half * torch.linspace(-1, 1, 2 * count + 1, dtype=torch.float64)).clamp(ends.min(), ends.max())
        lam = self.schedule.lam(self.schedule.t_from_model_time(torch.cat([f64([tau]), places])))
        alpha, sigma = self.schedule.alpha_sigma(lam)
        expected = alpha**2 * self.data_variance + sigma**2
        own = x.detach().double().flatten(1).var(1, unbiased=False).cpu() / self.schedule.in_scale(sigma[0]) ** 2
        # of equal fits the nearest to tau
        distance = (own[:, None] - expected[1:]).abs() + 1e-12 * (places - tau).abs() / (half * expected[0])
        return places[distance.argmin(1)]


def averaged_time_shift(
    network: Model,
    noise: Tensor,
    plan: SolverPlan,
    schedule: NoiseSchedule,
    *,
    window: float,
    cutoff: float,
    data_variance: float = 0.0,
    generator: Generators = None,
) -> SolverPlan:
    """``plan`` that tells the network the mean over the batch of what :class:`TimeShift` told it, step by step.

    ``noise`` is what :func:`fewstep.samplers.sample` takes, a few hundred samples; the network is called ``plan.nfe``
    times. With that the method is part of the plan: a row's model time.
    """
    plan.check_schedule(schedule)
    shifted = TimeShift(network, schedule, window, cutoff, data_variance)
    with torch.no_grad():
        sample(shifted, noise, plan, generator=generator)
    times = plan.model_time.clone()
    times[plan.evaluate] = torch.stack([told.mean() for told in shifted.told])
    return replace(plan, model_time=times, method=f"{plan.method}, time shifted")
