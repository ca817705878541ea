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
from fewstep.caching.calibration.keys import searched
from fewstep.caching.calibration.quality import Quality, measure, worst
from fewstep.caching.calibration.responses import Responses
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.calibration.schedule import affordable
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
"""Logits stay within -OPEN and OPEN."""
HEAD_START = 0.5
"""Logit with which the gates of the schedule that training starts from begin open; the others begin shut by as much."""
EXCHANGES = 4
"""Exchanges of an open gate for a shut one that are measured after every trajectory of the training."""
PATIENCE = 6
"""Trajectories without a gain after which training ends."""
TRIES = 8
"""Schedules of whole steps that are measured before training."""


@dataclass
class Gates:
    """The logits of all steps and branches, and their training.

    Attributes:
        logits: (steps, branches), learned; a gate is the sigmoid of one.
        learned: (steps,) bool: the other steps are always computed.
        sites: names of the branches.
        costs: (branches,) share of a full call's MACs of each.
        weights: (steps,) of the steps' losses.
    """

    logits: Tensor
    learned: Tensor
    sites: tuple[str, ...]
    costs: Tensor
    weights: Tensor

    def gate(self, step: int, site: int) -> Tensor:
        """How much of a branch's value is computed, 0 to 1."""
        return self.logits[step, site].sigmoid()

    def share(self, step: int | None = None) -> Tensor:
        """Expected MACs of a step, or of all on average, as a share of computing everything."""
        gates = torch.where(self.learned[:, None], self.logits.sigmoid(), 1.0)
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

    def exchange(self, table: Actions, budget: float) -> tuple[list[int], list[int]] | None:
        """The open and the shut cell of a table whose logits ask most to change places: their steps, and their sites.

        None where no exchange that keeps the budget is asked for.
        """
        drift = (self.logits.detach() - _logits(table == Action.COMPUTE, len(self.sites))).numpy()
        room = (budget - 1) * len(table) + float((table == Action.REUSE) @ self.costs.numpy() @ np.ones(len(table)))
        learned, costs = self.learned.numpy()[:, None], self.costs.numpy()
        shut = np.argwhere((table == Action.REUSE) & learned)
        opened = np.argwhere((table == Action.COMPUTE) & learned)
        if not len(shut) or not len(opened):
            return None
        gain = drift[tuple(shut.T)][:, None] - drift[tuple(opened.T)]
        fits = costs[shut[:, 1]][:, None] - costs[opened[:, 1]] <= room + 1e-9
        best = np.unravel_index(np.where(fits, gain, -np.inf).argmax(), gain.shape)
        if not fits[best] or gain[best] <= 0:
            return None
        a, b = shut[best[0]], opened[best[1]]
        return [int(a[0]), int(b[0])], [int(a[1]), int(b[1])]

    def settle(self, table: Actions, cells: tuple[list[int], list[int]]) -> None:
        """The cells' logits begin anew, as the table has them."""
        with torch.no_grad():
            self.logits[cells] = _logits(table == Action.COMPUTE, len(self.sites))[cells]


def train(
    method: Router, budget: Budget, train: Runs, test: Runs, tick: Callable[[str], None]
) -> tuple[CachePlan, Quality]:
    """The router's plan, and its quality on samples that it was not trained on.

    Of three tables the one that errs least on these: a uniform interval, the best schedule of whole steps, and what training
    made of the better one of the two. Which it is, and all errors, are in the plan's ``provenance``.

    Raises:
        FewstepError: for a budget that is no share of the MACs, or that cannot be kept.
    """
    from fewstep.eval.costs.calls import denoisers

    if budget.name != "macs":
        raise FewstepError(f"a router is trained to a share of the MACs, not to {budget.name}; give Budget(macs=...)")
    model = denoisers(train.pipe)[0]
    sites = tuple(method.gates(family_of(model)))
    costs = shares(CachePlan(sites, np.zeros((1, len(sites)), dtype=np.int8)), model)
    bench = _Bench(method, sites, train, train.uncached(), tick)
    interval = every(train.positions, max(round(1 / budget.value), 1))
    gates = _fresh(method, sites, costs, interval)
    tables = {"uniform": gates.actions(budget.value)}  # refuses a budget that cannot be kept, before the training
    tick("uncached runs")
    if method.scheme == "harmonica" and (count := affordable(budget.value, 1 - sum(costs), train.positions)) > 0:
        tables["searched"] = _whole_steps(bench, count, gates, budget.value)
    start = min(tables, key=lambda name: bench.error(tables[name]))
    gates = _fresh(method, sites, costs, tables[start])
    with _frozen(model):
        tables["trained"] = _trained(bench, gates, budget.value)
    uncached, found = test.uncached(), dict[str, tuple[CachePlan, Quality]]()
    for name, table in tables.items():
        plan = bench.plan(table)
        found[name] = plan, measure(plan, test, uncached, plan.cost(model).share)
        tick("comparing on samples held out")
    best = min(found, key=lambda name: found[name][1].latent_rms)
    told = {f"{name}_error": round(judged[1].latent_rms, 6) for name, judged in found.items()}
    return replace(found[best][0], provenance={**told, "schedule": best}), found[best][1]


@dataclass
class _Bench:
    """Measures tables on the samples of the training."""

    method: Router
    sites: tuple[str, ...]
    runs: Runs
    uncached: Tensor
    tick: Callable[[str], None]

    def plan(self, table: Actions) -> CachePlan:
        """As one applies it; with the correction that was asked for."""
        plan = CachePlan(self.sites, table, method=self.method.describe())
        if self.method.depth:
            plan = replace(plan, predictor=fit(self.runs, self.sites, table, self.method.depth)[0])
        return plan

    def error(self, table: Actions) -> float:
        """Mean RMS change of the final latents, without a correction."""
        with applied(self.runs.pipe, CachePlan(self.sites, table)):
            latents = self.runs.latents()
        self.tick("measuring gates")
        return worst(float((latents - self.uncached).double().flatten(1).square().mean(1).sqrt().mean()))


def _whole_steps(bench: _Bench, count: int, gates: Gates, budget: float) -> Actions:
    """All branches computed at the best steps for that, and what the budget leaves besides."""
    responses = Responses.measured(bench.runs, bench.sites, lambda: bench.tick("responses"))

    def table(keys: Sequence[int]) -> Actions:
        computed = [step in keys for step in range(bench.runs.positions)]
        return replace(gates, logits=_logits(computed, len(gates.sites))).actions(budget)

    return table(searched(responses, count, (0,), TRIES, lambda order, keys: bench.error(table(keys)))[1])


def _fresh(method: Router, sites: tuple[str, ...], costs: Sequence[float], start: Sequence[bool] | Actions) -> Gates:
    """Gates that begin as a schedule: which steps are computed, or a table of actions."""
    steps = len(start)
    learned = torch.arange(steps) % 2 == 1 if method.scheme == "l2c" else torch.arange(steps) > 0
    computed = start == Action.COMPUTE if isinstance(start, np.ndarray) else start
    logits = _logits(computed, len(sites)).requires_grad_(True)
    return Gates(logits, learned, sites, torch.tensor(costs, dtype=torch.float64), torch.ones(steps))


def _logits(computed: Any, sites: int) -> Tensor:
    begun = torch.where(torch.as_tensor(computed), HEAD_START, -HEAD_START)
    return begun if begun.ndim == 2 else begun[:, None].repeat(1, sites)


def _trained(bench: _Bench, gates: Gates, budget: float) -> Actions:
    """Train gates, one trajectory an iteration and the batches in turn, and follow them as far as that helps.

    After every iteration the plan's cells whose logits moved most are exchanged, an open one for a shut one; an exchange stays if
    the measured error falls, and is forgotten otherwise.
    """
    method, runs = bench.method, bench.runs
    lesson, starts = _Lesson(gates, method, budget), range(0, len(runs), runs.batch)
    table, waited = gates.actions(budget), 0
    least = bench.error(table)
    for iteration in range(method.iterations):
        lesson.table = table
        with _gated(runs, lesson):
            runs.batch_latents(starts[iteration % len(starts)])
        lesson.steer()
        bench.tick("training gates")
        if iteration == 0:  # from now on by what a step does to the end
            moved = _moved(runs, bench.sites, table)
            gates.weights = _weights(moved, lesson.errors if method.proxy == "sensitivity" else None)
            bench.tick("weighing steps")
        waited += 1
        for _ in range(EXCHANGES):
            cells = gates.exchange(table, budget)
            if cells is None:
                break
            tried = table.copy()
            tried[cells] = tried[cells][::-1]
            if (error := bench.error(tried)) < least:
                table, least, waited = tried, error, 0
            gates.settle(table, cells)
        if waited >= PATIENCE:
            break
    return table


class _Lesson:
    """What happens at every call of the network in training: teacher, gated student, a step downhill.

    The student runs the plan that the gates stand for at present, open or shut, and learns as if they were half open
    (straight-through): what it sees are the states that the plan leads to.
    """

    def __init__(self, gates: Gates, method: Router, budget: float) -> None:
        self.gates, self.method, self.budget = gates, method, budget
        self.table = gates.actions(budget)
        self.price = 1e-3  # of the MACs' share, in units of the relative error of a call
        self.cache: ModelCache | None = None
        self.errors: dict[int, float] = {}
        self.power = 0.0

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
            (slope,) = torch.autograd.grad(loss, self.gates.logits)
        self._descend(slope, step)
        return true if self.method.scheme == "l2c" else tree_map(_detached, made)

    def _descend(self, slope: Tensor, step: int) -> None:
        """Gradients of all steps and gates are scaled alike: how much larger one is than another is what there is to learn."""
        power = float(slope[step].square().mean())
        self.power = power if self.power == 0 else 0.95 * self.power + 0.05 * power
        with torch.no_grad():
            self.gates.logits -= self.method.rate * slope / max(self.power, 1e-30) ** 0.5
            self.gates.logits.clamp_(-OPEN, OPEN)

    def fit(self, cell: Cell, step: int, true: Any) -> Any:
        """A branch's value through its gate. What is kept is what the plan keeps."""
        site = self.gates.sites.index(cell.site)
        soft, kept = self.gates.gate(step, site), cell.history[0]
        is_open = bool(self.table[step, site] == Action.COMPUTE)
        gate = soft - soft.detach() + float(is_open)
        mixed = [
            t * gate + k * (1 - gate) if isinstance(t, Tensor) else t
            for t, k in zip(tree_leaves(true), kept.leaves, strict=True)
        ]
        if is_open:
            cell.keep(step, tree_map(_detached, true))
        return kept.tree(mixed)

    def steer(self) -> None:
        """Dual ascent: a share above the budget makes MACs dearer, one below it cheaper."""
        self.price *= float(np.exp(np.clip(4 * (float(self.gates.share().detach()) - self.budget), -0.5, 0.5)))


def _relative(made: Any, true: Any) -> Tensor:
    pairs = [(m, t) for m, t in zip(tree_leaves(made), tree_leaves(true), strict=True) if isinstance(m, Tensor)]
    total = sum(((m - t).float().square().mean() for m, t in pairs), torch.zeros(()))
    return total / sum((t.float().square().mean() for _, t in pairs), torch.zeros(()))


def _moved(runs: Runs, sites: tuple[str, ...], actions: Actions) -> Tensor:
    """(steps,) mean square change of the final latents as each step's gates are switched on, one after the other."""
    few = replace(runs, prompts=runs.prompts[: runs.batch], seeds=runs.seeds[: runs.batch])
    rows, before, moved = np.zeros_like(actions), few.latents(), [0.0]
    for step in range(1, len(actions)):
        rows[step] = actions[step]
        with applied(runs.pipe, CachePlan(sites, rows)):
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
