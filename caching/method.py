"""Methods: what the user asks for, before the model and the number of steps are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Integral
from typing import Any, ClassVar, Protocol

import numpy as np

from fewstep.caching.actions import Action
from fewstep.caching.families import Family
from fewstep.caching.plan import Actions, CachePlan
from fewstep.caching.predictors import Hold, Predictor
from fewstep.caching.store import Value
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Entry:
    """What an online decision can look at: the first module of a site, about to be called.

    Attributes:
        step: position on the trajectory.
        total: length of the trajectory where known.
        site: index of the site.
        module: the first module of the site that was reached.
        args, kwargs: what it is called with.
        probes: what was recorded in this call at the modules that the method asked for.
        computed: the step at which the site was last computed; None where there is nothing to reuse.
        kept: the newest value that is kept of the site, where it has one value.
    """

    step: int
    total: int | None
    site: int
    module: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    probes: Mapping[str, Any]
    computed: int | None
    kept: Value | None = None


class Decider(Protocol):
    """Decides at every step and site of one trajectory and stream; may remember what it saw."""

    def __call__(self, entry: Entry) -> Action:
        """What to do at the site."""
        ...

    def keeps(self, step: int, site: int) -> bool:
        """Whether a value computed now may be wanted later."""
        ...


@dataclass(frozen=True)
class Planned:
    """Decides by a plan."""

    plan: CachePlan

    def __call__(self, entry: Entry) -> Action:
        if entry.step >= self.plan.steps:
            return Action.COMPUTE
        return Action(int(self.plan.actions[entry.step, entry.site]))

    def keeps(self, step: int, site: int) -> bool:
        return step < self.plan.steps and bool(self.plan.kept[step, site])


@dataclass(frozen=True)
class Method:
    """Base of all methods: names sites of a family, and decides there.

    A static method overrides :meth:`table`; it becomes a :class:`CachePlan` as soon as the number of steps is known. An
    online one overrides :meth:`decider`.

    Attributes:
        online: whether it decides while it runs.
        timed: whether it wants to know the run's timesteps, see :meth:`at_times`.
    """

    online: ClassVar[bool] = False
    knob: ClassVar[str | None] = None
    """The option that calibration turns: more of it is more reuse. A whole number is tried in turn, a float bisected."""
    timed: ClassVar[bool] = False

    def at_times(self, times: Sequence[float] | None) -> Method:
        """The method for a run with these timesteps; only those that are ``timed`` differ."""
        return self

    def sites(self, family: Family) -> list[str]:
        """Names of the sites that it works on.

        Raises:
            FewstepError: where the family has not what it needs.
        """
        raise NotImplementedError

    @property
    def predictor(self) -> Predictor:
        """Makes the value of a reused site."""
        return Hold()

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        """(steps, sites): what is done where."""
        raise NotImplementedError

    def probes(self, family: Family) -> dict[str, str]:
        """Modules whose input or output decisions look at: ``{"name": "path:input"}`` or ``"path:output"``."""
        return {}

    def compile(self, family: Family, steps: int) -> CachePlan:
        """The plan for ``steps`` steps of a model of this family."""
        sites = self.sites(family)
        return CachePlan(
            tuple(sites), self.table(steps, sites), self.predictor, {"class": family.name}, method=self.describe()
        )

    def decider(self, family: Family, steps: int | None) -> Decider:
        """Decides along one trajectory of one stream."""
        if steps is None:
            raise FewstepError(
                f"{type(self).__name__} has to know the number of steps, and the timesteps that the network is called with "
                "do not tell; give num_inference_steps="
            )
        return Planned(self.compile(family, steps))

    def describe(self) -> str:
        """How it would be written: its knob, and what differs from the defaults."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {f.name: f.default if f.default is not MISSING else None for f in fields(self)}
        shown = [f"{k}={v!r}" for k, v in given.items() if k == self.knob or v != plain[k]]
        return f"{type(self).__name__}({', '.join(shown)})"


def steps_table(computed: Sequence[bool], sites: int) -> Actions:
    """The table that computes all sites at the steps that are true, and reuses them at the others."""
    column = np.where(np.asarray(computed, dtype=bool), np.int8(Action.COMPUTE), np.int8(Action.REUSE))
    return np.repeat(column[:, None], sites, 1).astype(np.int8)


def check_count(count: int, name: str, of: str = ", at least 1") -> None:
    """Raises FewstepError where a count is no whole number of at least 1, numpy's included."""
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 1:
        raise FewstepError(f"{name} is {count!r}; give a whole number{of}")


def check_interval(interval: int, name: str = "interval") -> None:
    """Raises FewstepError where an interval is no whole number of at least 1."""
    check_count(interval, name, " of steps, 1 to compute always")
