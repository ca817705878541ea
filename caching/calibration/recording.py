"""Watching uncached trajectories: everything is computed, and the values of all steps are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fewstep.caching.actions import Action
from fewstep.caching.families import Family
from fewstep.caching.method import Decider, Entry, Method
from fewstep.caching.predictors import Hold, Predictor
from fewstep.caching.store import Cell


@dataclass(frozen=True)
class Deep(Predictor):
    """Keeps so many values; who applies it does not ask for predictions."""

    values: int = 1

    @property
    def depth(self) -> int:
        return self.values


class _Computing:
    def __call__(self, entry: Entry) -> Action:
        return Action.COMPUTE

    def keeps(self, step: int, site: int) -> bool:
        return True


@dataclass(frozen=True)
class Recording(Method):
    """Computes everything and keeps the values of all steps at the named sites."""

    online = True
    at: tuple[str, ...] = ()
    steps: int = 1

    def sites(self, family: Family) -> list[str]:
        return list(self.at)

    @property
    def predictor(self) -> Predictor:
        return Deep(self.steps) if self.steps > 1 else Hold()

    def decider(self, family: Family, steps: int | None) -> Decider:
        return _Computing()


def whole_trajectories(cell: Cell) -> Iterator[Cell]:
    """The memories of a site that hold values: its own, or those of its parts."""
    for part in (cell, *cell.parts.values()):
        if part.history:
            yield part
