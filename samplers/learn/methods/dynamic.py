"""Grids as shortest paths: a cost for every pair of fine times, and the cheapest way through in so many steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.convert import conversion
from fewstep.samplers.grid import Grid
from fewstep.samplers.learn.teaching.problem import Problem, noisiest
from fewstep.samplers.schedule import f64

Metric = Literal["l1", "l2", "dev"]


def shortest(cost: Tensor, steps: int, discount: float = 1.0) -> list[int]:
    """The indices 0 = i_0 < ... < i_steps = M that make the sum of cost[i_k, i_{k+1}] least, in exactly so many steps.

    Bellman's recursion from the end, V(i) = min_j cost[i, j] + discount V(j); the minimisers are kept, not compared again.

    Args:
        cost: (M+1, M+1), of which the part above the diagonal counts.
        discount: above 1, later steps weigh more.

    Raises:
        FewstepError: more steps than times.
    """
    m = len(cost) - 1
    if not 1 <= steps <= m:
        raise FewstepError(f"{steps} steps do not fit on {m + 1} times; ask for 1 to {m}")
    forward = torch.ones_like(cost).triu(1).bool()
    cost = torch.where(forward, cost, torch.full_like(cost, math.inf))
    value, choices = cost[:, m], list[Tensor]()
    for _ in range(steps - 1):
        value, best = (cost + discount * value[None, :]).min(1)
        choices.append(best)
    path = [0]
    for best in reversed(choices):
        path.append(int(best[path[-1]]))
    if not math.isfinite(float(value[0])):
        raise FewstepError(f"no path of {steps} steps has a finite cost; is a teacher trajectory not finite?")
    return [*path, m]


def boss(problem: Problem, nfe: int) -> Grid:
    """The grid whose Euler steps, each from the teacher's own state, miss the teacher's next state least in mean square.

    Euler's method in rho = sigma / alpha on X / alpha is DDIM. The fine-tuning of weights that the paper goes on with is
    left out. Source: Bellman Optimal Stepsize Straightening, 2312.16414, section 3.
    """
    states, slopes, time = _slopes(problem)
    rows = [(arrivals - states).square().mean((1, 2)) for arrivals in _euler(states, slopes, time)]
    return _through(problem, problem.lam[shortest(torch.stack(rows), nfe)[:-1]], "boss")


def gits(problem: Problem, nfe: int, *, metric: Metric = "dev", coefficient: float = 1.15) -> Grid:
    """The grid whose Euler steps add least to the trajectory's own deviation from the straight line between its ends.

    ``dev`` compares distances from the chord of a trajectory, ``l1`` and ``l2`` points. A ``coefficient`` above 1 lets later
    errors weigh more. Source: On the Trajectory Regularity of ODE-based Diffusion Sampling, 2405.11326, section 5.
    """
    if metric not in ("l1", "l2", "dev"):
        raise FewstepError(unknown("metric of gits", metric, ("l1", "l2", "dev")))
    states, slopes, time = _slopes(problem)
    chord = states[-1] - states[0]
    unit = chord / chord.norm(dim=-1, keepdim=True)

    def deviation(x: Tensor) -> Tensor:
        along = x - states[0]
        across: Tensor = along - (along * unit).sum(-1, keepdim=True) * unit
        return across.square().sum(-1).sqrt()

    rows, own = [], deviation(states)
    for arrivals in _euler(states, slopes, time):
        if metric == "dev":
            rows.append((deviation(arrivals) - own).mean(1).abs())
        else:
            rows.append((arrivals - states).norm(p=1 if metric == "l1" else 2, dim=-1).mean(1))
    return _through(problem, problem.lam[shortest(torch.stack(rows), nfe, coefficient)[:-1]], "gits")


def ays(problem: Problem, nfe: int, *, fine: int = 64, seed: int = 0) -> Grid:
    """The grid that minimises the KL upper bound of a stochastic sampler that freezes its denoiser in every step.

        KLUB = sum_i int_{lambda_i}^{lambda_{i+1}} e^{2 lambda} E ||D(x_lambda) - D(x_{lambda_i})||^2 d lambda

    with D the predicted x0 and x on one path of noise over the teacher's samples. The bound is a sum over steps, so it is
    minimised exactly, over ``fine`` times, where the paper searches coordinate by coordinate. Published lists are
    ``Grid.ays``.

    Source: Align Your Steps, 2404.14507, theorem 3.1 and section 3.3.
    """
    schedule = problem.schedule
    clean = float(schedule.lam(f64(schedule.t_range[1])))
    lam = torch.linspace(noisiest(schedule), clean, fine + 1, dtype=torch.float64)
    weight = torch.exp(2 * lam)
    outputs = _denoised(problem, lam, torch.Generator().manual_seed(seed))
    distance = (outputs[:, None] - outputs[None]).square().sum(-1).mean(-1)  # (from, to)
    rate = distance * weight[None, :]
    width = lam.diff()
    pieces = 0.5 * (rate[:, 1:] + rate[:, :-1]) * width  # trapezoid rule on every piece, from every start
    before = torch.cat([torch.zeros(len(lam), 1, dtype=torch.float64), pieces.cumsum(1)], 1)
    cost = before - before.diagonal()[:, None]
    path = shortest(cost, nfe)
    return _through(problem, lam[path[:-1]], "ays")


def _denoised(problem: Problem, lam: Tensor, generator: torch.Generator) -> Tensor:
    """(times, n, d) float64: predicted x0 along paths of noise added to the teacher's samples."""
    schedule, clean = problem.schedule, problem.targets.double()
    found = []
    variance = torch.zeros((), dtype=torch.float64)
    path = torch.zeros_like(clean)
    with torch.no_grad():
        for at in lam.flip(0):  # from the cleanest on, adding noise
            rho2 = torch.exp(-2 * at)
            draw = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
            path = path + torch.sqrt(rho2 - variance) * draw
            variance = rho2
            alpha, _ = schedule.alpha_sigma(at)
            x = (alpha * (clean + path)).to(problem.targets.dtype)
            found.append(_x0(problem, x, at))
    return torch.stack(found[::-1]).flatten(2)


def _x0(problem: Problem, x: Tensor, lam: Tensor) -> Tensor:
    schedule = problem.schedule
    alpha, sigma = schedule.alpha_sigma(lam)
    scale = float(schedule.in_scale(sigma))
    time = float(schedule.model_time(schedule.t(lam)))
    raw = problem.network(x * scale, time, problem.which)
    p, q = conversion(schedule.prediction, "data", alpha, sigma, schedule.sigma_data)
    return (float(p) * x + float(q) * raw).double()


def _slopes(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(states (M+1, n, d), slopes (M+1, n, d), times (M+1,)) of X / alpha in rho, or for flows of X in sigma; float64."""
    schedule, lam = problem.schedule, problem.lam
    alpha, sigma = schedule.alpha_sigma(lam)
    flow = schedule.family == "flow"
    time = sigma if flow else sigma / alpha
    scale = torch.ones_like(alpha) if flow else alpha
    states = problem.states.double().flatten(2) / scale[:, None, None]
    slopes = [torch.zeros_like(states[0])] * len(lam)
    with torch.no_grad():
        for i in range(len(lam) - 1):
            at = lam[i] if bool(lam[i].isfinite()) else f64(noisiest(schedule))
            # eps, and eps - x0 for flows: (X / alpha - x0) / rho and (X - x0) / sigma
            slopes[i] = (states[i] - _x0(problem, problem.states[i], at).flatten(1)) / time[i]
    return states, torch.stack(slopes), time


def _euler(states: Tensor, slopes: Tensor, time: Tensor) -> Iterator[Tensor]:
    """For every start i the arrivals (M+1, n, d): Euler's step from the teacher's state i to every time."""
    for i in range(len(time)):
        yield states[i] + (time - time[i])[:, None, None] * slopes[i]


def _through(problem: Problem, lam: Tensor, name: str) -> Grid:
    """From pure noise through these lambdas to sigma = 0."""
    start = problem.lam[:1]
    return Grid.lambdas(problem.schedule, torch.cat([start, lam[1:], f64([math.inf])]), name=name)
