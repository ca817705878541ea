"""Train a router's gates, inside the pipeline's own loop, and turn them into a plan that keeps a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fewstep.caching.actions import Action
from fewstep.caching.calibration.budget import Budget
from fewstep.caching.calibration.fitting import fit
from fewstep.caching.calibration.quality import Quality, measure
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.controller import applied
from fewstep.caching.cost import shares
from fewstep.caching.families import family_of
from fewstep.caching.methods.interval import every
from fewstep.caching.methods.router import Router
from fewstep.caching.model_cache import ModelCache
from fewstep.caching.plan import Actions, CachePlan
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError

Run = Callable[[], Any]
OPEN = 5.0
"""Logits stay within -OPEN and OPEN, where a gate is shut or open but for 0.7 %."""
HEAD_START = 0.5
"""Logit with which the gates of a uniform interval begin open, those of the steps between it shut."""
COLDEST = 0.1
"""Temperature of the gates at the end of the training, 1 at its beginning: soft gates become the hard ones of the plan, which
do not know that half of a value is nearly as good as all of it."""


@dataclass
class Gates:
    """The logits of all steps and branches, and their training.

    Attributes:
        logits: (steps, branches), learned; a gate is the sigmoid of one.
        learned: (steps,) bool: the other steps are always computed.
        sites: names of the branches.
        costs: (branches,) share of a full call's MACs of each.
        weights: (steps,) of the steps' losses.
        temperature: of the gates.
    """

    logits: Tensor
    learned: Tensor
    sites: tuple[str, ...]
    costs: Tensor
    weights: Tensor
    temperature: float = 1.0

    def gate(self, step: int, site: int) -> Tensor:
        """How much of a branch's value is computed, 0 to 1."""
        return (self.logits[step, site] / self.temperature).sigmoid()

    def share(self, step: int | None = None) -> Tensor:
        """Expected MACs of a step, or of all on average, as a share of computing everything."""
        gates = torch.where(self.learned[:, None], (self.logits / self.temperature).sigmoid(), 1.0)
        saved = ((1 - gates) * self.costs).sum(1)
        return 1 - (saved.mean() if step is None else saved[step])

    def actions(self, budget: float) -> Actions:
        """Compute the widest gates until the budget is used up; steps that are not learned are always computed.

        Raises:
            FewstepError: where even shutting all gates takes more.
        """
        actions = torch.where(self.learned[:, None].expand_as(self.logits), Action.REUSE, Action.COMPUTE)
        least = 1 - float((actions * self.costs).sum()) / len(self.logits)
        if least > budget:
            raise FewstepError(
                f"{budget:.0%} of the MACs cannot be kept: with all gates shut it is {least:.1%}; give at least that"
            )
        order = self.logits.flatten().argsort(descending=True)
        room = (budget - least) * len(self.logits)
        for index in order.tolist():
            step, site = divmod(index, len(self.sites))
            if bool(self.learned[step]) and float(self.costs[site]) <= room + 1e-9:
                actions[step, site] = Action.COMPUTE
                room -= float(self.costs[site])
        return np.asarray(actions.numpy(), dtype=np.int8)


def train(
    method: Router, budget: Budget, train: Runs, test: Runs, tick: Callable[[str], None]
) -> tuple[CachePlan, Quality]:
    """The router's plan, and its quality on samples that it was not trained on.

    Raises:
        FewstepError: for a budget that is no share of the MACs, or that cannot be kept.
    """
    from fewstep.eval.costs.calls import denoisers

    if budget.name != "macs":
        raise FewstepError(f"a router is trained to a share of the MACs, not to {budget.name}; give Budget(macs=...)")
    model = denoisers(train.pipe)[0]
    sites = tuple(method.gates(family_of(model)))
    costs = shares(CachePlan(sites, np.zeros((1, len(sites)), dtype=np.int8)), model)
    gates = _fresh(method, sites, costs, train.steps, budget.value)
    uniform = gates.actions(budget.value)  # refuses a budget that cannot be kept, before the training
    uncached = test.latents()
    tick("uncached runs")
    lesson = _Lesson(gates, method, budget.value)
    first = -(-method.iterations // 2) if method.scheme == "harmonica" else method.iterations
    with _frozen(model):
        _practise(train, lesson, range(first), tick)
        if first < method.iterations:
            gates.weights = _weights(
                _moved(train, gates, budget.value), lesson.errors if method.proxy == "sensitivity" else None
            )
            tick("weighing steps")
            _practise(train, lesson, range(first, method.iterations), tick)
    plan = _better(method, train, sites, (gates.actions(budget.value), uniform), tick)
    return plan, measure(plan, test, uncached, plan.cost(model).share)


def _better(
    method: Router, train: Runs, sites: tuple[str, ...], tables: Sequence[Actions], tick: Callable[[str], None]
) -> CachePlan:
    """Of the trained gates and the uniform interval that they began as, what errs less where they were trained.

    Which of the two it is, and both errors, are in the plan's ``provenance``.
    """
    uncached, plans, errors = train.latents(), [], []
    for actions in tables:
        plan = CachePlan(sites, actions, method=method.describe())
        if method.depth:
            plan = replace(plan, predictor=fit(train, sites, actions, method.depth)[0])
        with applied(train.pipe, plan):
            errors.append(float((train.latents() - uncached).double().flatten(1).square().mean(1).sqrt().mean()))
        plans.append(plan)
        tick("comparing with the uniform interval")
    trained = errors[0] < errors[1]
    told = {"trained_error": errors[0], "uniform_error": errors[1], "schedule": "trained" if trained else "uniform"}
    return replace(plans[0 if trained else 1], provenance=told)


def _fresh(method: Router, sites: tuple[str, ...], costs: Sequence[float], steps: int, share: float) -> Gates:
    learned = torch.arange(steps) % 2 == 1 if method.scheme == "l2c" else torch.arange(steps) > 0
    interval = every(steps, max(round(1 / share), 1))
    start = torch.tensor([HEAD_START if computed else -HEAD_START for computed in interval])
    logits = start[:, None].repeat(1, len(sites)).requires_grad_(True)
    return Gates(logits, learned, sites, torch.tensor(costs, dtype=torch.float64), torch.ones(steps))


def _practise(runs: Runs, lesson: _Lesson, iterations: Sequence[int], tick: Callable[[str], None]) -> None:
    """One trajectory an iteration, the batches in turn."""
    starts = range(0, len(runs), runs.batch)
    with _gated(runs, lesson):
        for iteration in iterations:
            lesson.gates.temperature = COLDEST ** (iteration / max(lesson.method.iterations - 1, 1))
            runs.batch_latents(starts[iteration % len(starts)])
            lesson.steer()
            tick("training gates")


class _Lesson:
    """What happens at every call of the network in training: teacher, gated student, a step of the optimiser."""

    def __init__(self, gates: Gates, method: Router, budget: float) -> None:
        self.gates, self.method, self.budget = gates, method, budget
        self.optimizer = torch.optim.Adam([gates.logits], lr=method.rate)
        self.price = 1e-3  # of the MACs' share, in units of the relative error of a call
        self.cache: ModelCache | None = None
        self.errors: dict[int, float] = {}

    def __call__(self, student: Run, teacher: Run) -> Any:
        if self.cache is None or self.cache.call is None:
            return student()
        step = self.cache.call.step
        if not bool(self.gates.learned[step]):
            return student()  # computed in full
        true = teacher()
        with torch.enable_grad():
            made = student()
            error = _relative(made, true)
            self.errors[step] = float(error.detach())
            loss = self.gates.weights[step] * error + self.price * self.gates.share(step)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
        with torch.no_grad():
            self.gates.logits.clamp_(-OPEN, OPEN)
        return true if self.method.scheme == "l2c" else tree_map(_detached, made)

    def fit(self, cell: Cell, step: int, true: Any) -> Any:
        """A branch's value through its gate. What is kept is the mixture, as the student has it."""
        gate = self.gates.gate(step, self.gates.sites.index(cell.site))
        kept = cell.history[0]
        leaves = tree_leaves(true)
        mixed = [
            t * gate + k * (1 - gate) if isinstance(t, Tensor) else t for t, k in zip(leaves, kept.leaves, strict=True)
        ]
        cell.keep(step, kept.tree([_detached(m) for m in mixed]))
        return kept.tree(mixed)

    def steer(self) -> None:
        """Dual ascent: a share above the budget makes MACs dearer, one below it cheaper."""
        self.price *= float(np.exp(np.clip(4 * (float(self.gates.share().detach()) - self.budget), -0.5, 0.5)))


def _relative(made: Any, true: Any) -> Tensor:
    pairs = [(m, t) for m, t in zip(tree_leaves(made), tree_leaves(true), strict=True) if isinstance(m, Tensor)]
    total = sum(((m - t).float().square().mean() for m, t in pairs), torch.zeros(()))
    return total / sum((t.float().square().mean() for _, t in pairs), torch.zeros(()))


def _moved(runs: Runs, gates: Gates, budget: float) -> Tensor:
    """(steps,) mean square change of the final latents as each step's gates are switched on, one after the other."""
    actions = gates.actions(budget)
    few = replace(runs, prompts=runs.prompts[: runs.batch], seeds=runs.seeds[: runs.batch])
    rows, before, moved = np.zeros_like(actions), few.latents(), [0.0]
    for step in range(1, len(actions)):
        rows[step] = actions[step]
        with applied(runs.pipe, CachePlan(gates.sites, rows)):
            after = few.latents()
        moved.append(float((after - before).double().square().mean()))
        before = after
    return torch.tensor(moved)


def _weights(moved: Tensor, errors: Mapping[int, float] | None) -> Tensor:
    """Weights of the steps' losses of mean 1, each within 0.1 and 10, so that no step is forgotten.

    Args:
        moved: what each step does to the end.
        errors: the steps' own errors in training, to which that is then related; HarmoniCa does not.
    """
    if errors is not None:
        moved = torch.tensor([float(m) / max(errors.get(i, 0.0), 1e-12) if m else 0.0 for i, m in enumerate(moved)])
    return (moved / moved.mean().clamp(min=1e-30)).clamp(0.1, 10)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Weights take no gradients inside."""
    learnable = [p for p in model.parameters() if p.requires_grad]
    for parameter in learnable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learnable:
            parameter.requires_grad_(True)


@contextmanager
def _gated(runs: Runs, lesson: _Lesson) -> Iterator[None]:
    gates = lesson.gates
    actions = torch.where(gates.learned[:, None].expand_as(gates.logits), Action.REUSE, Action.COMPUTE)
    with applied(runs.pipe, CachePlan(gates.sites, np.asarray(actions.numpy(), dtype=np.int8))) as controller:
        lesson.cache = controller.caches[0]
        lesson.cache.teacher, lesson.cache.lesson = lesson.fit, lesson
        yield
    lesson.cache = None


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
