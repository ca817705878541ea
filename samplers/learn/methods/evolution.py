"""Searches by evolution: AutoDiffusion's times, and USF's solver schedules with a predictor of what they are worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.grid import Grid
from fewstep.samplers.learn.fitting.runner import error
from fewstep.samplers.learn.methods.untuned import untuned
from fewstep.samplers.learn.teaching.problem import Problem, teacher_grid
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.usf import USF, Decision

Objective = Callable[[SolverPlan], float]
"""What a plan costs: :func:`latent_error`, or any other number of its samples, FID for example."""
Genes = TypeVar("Genes")
Features = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evolution:
    """Options of a search."""

    evaluations: int = 60
    """Plans that the objective is asked about."""
    population: int = 12
    parents: int = 4
    crossover: float = 0.3
    """Share of children that have two parents."""
    mutation: float = 0.3
    """Chance of every gene to change in a child."""
    proposals: int = 8
    """Children from which a predictor picks the one that is evaluated."""
    seed: int = 0


@dataclass(frozen=True)
class Found(Generic[Genes]):
    """The best of a search, and every evaluation in order."""

    genes: tuple[Genes, ...]
    plan: SolverPlan
    cost: float
    history: tuple[float, ...]


def latent_error(problem: Problem) -> Objective:
    """The mean RMS distance to the teacher's ends."""
    return lambda plan: float(error(plan, problem).mean())


def evolve(
    starts: Sequence[tuple[Genes, ...]],
    mutate: Callable[[Genes, np.random.Generator], Genes],
    build: Callable[[tuple[Genes, ...]], SolverPlan | None],
    objective: Objective,
    options: Evolution,
    *,
    features: Callable[[tuple[Genes, ...]], Features] | None = None,
    report: Callable[[float, float], None] | None = None,
) -> Found[Genes]:
    """The cheapest list of genes that was met; children of the best so far are tried one after the other.

    Args:
        starts: the first generation; filled up with mutants of it.
        build: the plan of a list of genes; None where there is none.
        features: numbers of a list of genes. With them a ridge regression on what was evaluated so far predicts the costs of
            several children, and the most promising is evaluated.

    Raises:
        FewstepError: none of the lists gives a plan with a finite cost.
    """
    randomness = np.random.default_rng(options.seed)
    known: dict[tuple[Genes, ...], tuple[float, SolverPlan]] = {}
    history: list[float] = []

    def child() -> tuple[Genes, ...]:
        best = sorted(known, key=lambda g: known[g][0])[: options.parents]
        one = best[randomness.integers(len(best))]
        if len(best) > 1 and randomness.random() < options.crossover:
            other = best[randomness.integers(len(best))]
            one = tuple(a if randomness.random() < 0.5 else b for a, b in zip(one, other, strict=True))
        genes = tuple(mutate(g, randomness) if randomness.random() < options.mutation else g for g in one)
        return genes if genes not in known else tuple(mutate(g, randomness) for g in one)

    queue = list(dict.fromkeys(starts))[: options.population]
    tries = 0
    while len(history) < options.evaluations and tries < 50 * options.evaluations:
        tries += 1
        if queue:
            genes = queue.pop(0)
        elif len(known) < options.population or features is None:
            genes = child()
        else:
            predict = _ridge([features(g) for g in known], [math.log(c + 1e-12) for c, _ in known.values()])
            genes = min((child() for _ in range(options.proposals)), key=lambda g: predict(features(g)))
        plan = None if genes in known else build(genes)
        if plan is None:
            continue
        cost = objective(plan)
        if math.isfinite(cost):
            known[genes] = (cost, plan)
        history.append(cost)
        if report is not None:
            report(len(history) / options.evaluations, min((c for c, _ in known.values()), default=math.inf))
        if not known and not queue:
            break
    if not known:
        raise FewstepError(f"none of {len(history)} plans has a finite cost; start the search from other plans")
    best = min(known, key=lambda g: known[g][0])
    return Found(best, known[best][1], known[best][0], tuple(history))


def _ridge(rows: Sequence[Features], costs: Sequence[float]) -> Callable[[Features], float]:
    """Costs as a linear function of features, shrunk towards their mean."""
    a, y = np.stack(rows), np.asarray(costs)
    mean = y.mean()
    w = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ (y - mean))
    return lambda x: float(mean + x @ w)


def autodiffusion(
    problem: Problem,
    nfe: int,
    *,
    solver: Solver | None = None,
    fine: int = 64,
    objective: Objective | None = None,
    options: Evolution | None = None,
    report: Callable[[float, float], None] | None = None,
) -> Grid:
    """The best subset of ``fine`` times, by evolution; the search over skipped layers is left out.

    Source: AutoDiffusion, 2309.10438, section 3.3, with the error of latents in place of FID as the objective unless
    another is given.
    """
    best = untuned(problem, nfe)
    solver = solver or best[0].solver
    grid = teacher_grid(problem.schedule, fine)
    lam = grid.lam[:-1]
    starts = [tuple(_nearest(lam, u.grid.lam[1:-1].tolist())) for u in best if u.solver == solver]

    def build(times: tuple[int, ...]) -> SolverPlan | None:
        chosen = sorted(set(times))
        if len(chosen) < nfe - 1 or chosen[:1] == [0]:
            return None
        points = Grid.lambdas(problem.schedule, [*lam[[0, *chosen]].tolist(), math.inf], name="autodiffusion")
        return solver.compile(problem.schedule, points)

    def mutate(i: int, randomness: np.random.Generator) -> int:
        return int(np.clip(i + randomness.integers(-3, 4), 1, len(lam) - 1))

    found = evolve(starts, mutate, build, objective or latent_error(problem), options or Evolution(), report=report)
    return Grid.lambdas(
        problem.schedule, [*lam[[0, *sorted(set(found.genes))]].tolist(), math.inf], name="autodiffusion"
    )


def _nearest(lam: Tensor, wanted: Sequence[float]) -> list[int]:
    """For each of ``wanted`` the index of the nearest of ``lam``, the first excepted."""
    return [1 + int((lam[1:] - w).abs().argmin()) for w in wanted]


ORDERS, SHARES = (1, 2, 3), (0.3, 0.45, 0.25)


def s3(
    problem: Problem,
    grid: Grid,
    *,
    objective: Objective | None = None,
    options: Evolution | None = None,
    report: Callable[[float, float], None] | None = None,
) -> Found[Decision]:
    """USF's decisions for every step of ``grid``: order, basis, relaxation and corrector, by evolution with a predictor.

    The predictor is a ridge regression on the decisions in place of the authors' network; it needs no more plans than the
    search evaluates anyway.

    Source: A Unified Sampling Framework for Solver Searching, 2312.07243, section 4 (S3).
    """
    n, flow = grid.steps, problem.schedule.family == "flow"
    starts = [(d,) * n for d in (
        Decision(2, relaxation="bh2", corrector=True), Decision(2, relaxation="bh2"), Decision(2), Decision(3),
        Decision(3, corrector=True), Decision(2, basis="velocity", variable="sigma") if flow else Decision(2, basis="noise"),
    )]  # fmt: skip

    def build(decisions: tuple[Decision, ...]) -> SolverPlan | None:
        try:
            return USF(decisions).compile(problem.schedule, grid)
        except FewstepError:
            return None

    def mutate(decision: Decision, randomness: np.random.Generator) -> Decision:
        what = randomness.integers(4)
        if what == 0:
            order = int(randomness.choice(ORDERS, p=SHARES))
            return replace(decision, order=order, relaxation=decision.relaxation if order <= 2 else "none")
        if what == 1:
            return replace(decision, corrector=not decision.corrector)
        if what == 2 and decision.variable == "lambda":
            return replace(decision, relaxation=str(randomness.choice(["none", "bh1", "bh2"])))  # type: ignore[arg-type]
        if flow and randomness.random() < 0.5:
            return replace(decision, basis="velocity", variable="sigma", relaxation="none")
        return replace(decision, basis="noise" if decision.basis == "data" else "data", variable="lambda")

    return evolve(
        starts,
        mutate,
        build,
        objective or latent_error(problem),
        options or Evolution(),
        features=_described,
        report=report,
    )


def _described(decisions: tuple[Decision, ...]) -> Features:
    """What is decided in every step, as zeros and ones."""
    return np.asarray([
        value
        for d in decisions
        for value in (
            d.order == 2, d.order == 3, d.corrector, d.basis == "noise", d.basis == "velocity", d.relaxation == "bh1",
            d.relaxation == "bh2",
        )
    ], dtype=np.float64)  # fmt: skip
