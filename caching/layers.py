"""What a cache is made of: methods on their sites, what is kept for a stream, a call in progress."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fewstep.caching.actions import Action
from fewstep.caching.families import Family
from fewstep.caching.method import Decider, Method, Planned
from fewstep.caching.plan import CachePlan
from fewstep.caching.predictors import Predictor
from fewstep.caching.roles import Scene
from fewstep.caching.rows import Rows
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError


class Layer:
    """One method or plan on its sites; a cache may have several, on disjoint ones."""

    def __init__(self, method: Method | CachePlan, family: Family) -> None:
        self.method = method
        if isinstance(method, CachePlan):
            method.check_model(family)
        names = list(method.sites) if isinstance(method, CachePlan) else method.sites(family)
        if not names:
            raise FewstepError(f"{self.described} found no site in {family.name}; it has {', '.join(family.offered())}")
        self.sites = [family.site(name) for name in names]
        self.probes = {} if isinstance(method, CachePlan) else method.probes(family)
        self._plans: dict[Any, CachePlan] = {}

    @property
    def described(self) -> str:
        """The method in words."""
        return self.method.method if isinstance(self.method, CachePlan) else self.method.describe()

    @property
    def timed(self) -> bool:
        """Whether the timesteps are asked for."""
        return isinstance(self.method, Method) and self.method.timed

    def predictor(self, decider: Decider) -> Predictor:
        """That of the plan, which may be the method's for a number of steps."""
        return decider.plan.predictor if isinstance(decider, Planned) else self.method.predictor

    def decider(self, family: Family, steps: int | None, times: tuple[float, ...] | None) -> Decider:
        """For one trajectory of one stream."""
        if isinstance(self.method, CachePlan):
            return Planned(self.method.compile(steps))
        if self.method.online or steps is None:
            return self.method.decider(family, steps)
        if (steps, times) not in self._plans:
            self._plans[steps, times] = self.method.at_times(times).compile(family, steps)
        return Planned(self._plans[steps, times])


@dataclass
class Stream:
    """What is kept for one stream of a trajectory."""

    deciders: list[Decider]
    predictors: list[Predictor]
    cells: list[Cell]
    layout: Any
    cut: dict[int, Cell] = field(default_factory=dict)

    def cell(self, index: int, rows: Rows | None) -> Cell:
        """The memory of a site for the samples that run. What part of the batch computed last is of no use to all of it."""
        whole, cut = self.cells[index], self.cut.get(index)
        newer = cut is not None and cut.newest > whole.newest
        if rows is None:
            if newer:
                whole.computed = None  # earlier values of all samples may still serve an extrapolation
                del self.cut[index]
            return whole
        if cut is None or not newer:
            cut = self.cut[index] = whole.mapped(rows.of)
        return cut

    @property
    def nbytes(self) -> int:
        """Bytes held; what is but a view of a whole value is not counted twice."""
        own = [cut for index, cut in self.cut.items() if cut.newest > self.cells[index].newest]
        return sum(cell.nbytes for cell in (*self.cells, *own))

    def half(self, rows: Rows, layout: Any) -> Stream:
        """The stream of a part of the batch, from now on alone."""
        deciders = [d if isinstance(d, Planned) else copy.deepcopy(d) for d in self.deciders]
        return Stream(deciders, self.predictors, [cell.mapped(rows.of) for cell in self.cells], layout)


@dataclass
class Call:
    """One call of the network in progress."""

    stream: Stream
    name: str
    step: int
    total: int | None
    scene: Scene
    forced: set[int] = field(default_factory=set)
    actions: dict[int, Action] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """The calls of a network up to now, for what they cost.

    Attributes:
        model: the network.
        sites: names of its sites.
        inputs: arguments of a call as shapes, by the layout of its sample.
        calls: how often there was what: layout, and an action for every site.
    """

    model: nn.Module
    sites: tuple[str, ...]
    inputs: Mapping[Any, Mapping[str, Any]]
    calls: Counter[tuple[Any, tuple[int, ...]]]
