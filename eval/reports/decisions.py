"""What a cache decided, as a table: one whole number for every step and every site of the network.

In a manifest an entry of ``cells`` may hold it as ``"decisions"``; other keys beside these are left alone:

    {"sites": ["down.0", "mid", "up.0"], "decisions": [[0, 0, 0], [1, 0, 2]], "names": ["computed", "reused", "forecast"]}

``decisions[i][j]`` is what was done at step i at site j: 0 computed, 1 reused, 2 forecast, or what ``names`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.errors import FewstepError

NAMES = ("computed", "reused", "forecast")
MOST = 9
"""As many kinds of decision as can be told apart by colour."""


@dataclass(frozen=True)
class Decisions:
    """A decision table.

    Attributes:
        sites: the places of the network that the cache decides about.
        table: ``table[i][j]`` at step i and site j.
        names: what the numbers mean.
    """

    sites: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] = NAMES

    @property
    def computed(self) -> float:
        """The share of all decisions that were to compute."""
        return sum(value == 0 for row in self.table for value in row) / (len(self.table) * len(self.sites))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Decisions:
        """Read and check a table.

        Raises:
            FewstepError: for a table that is empty, ragged, or holds what is no decision; the message says where.
        """
        sites, table = value.get("sites"), value.get("decisions")
        names = value.get("names", NAMES)
        if not isinstance(names, list | tuple) or not 1 <= len(names) <= MOST:
            raise FewstepError(f"a decision table's names are {names!r}; give a list of 1 to {MOST}")
        if not isinstance(sites, list) or not isinstance(table, list) or not sites or not table:
            raise FewstepError("a decision table needs sites and decisions, lists of at least one")
        for step, row in enumerate(table):
            if not isinstance(row, list) or len(row) != len(sites):
                found = len(row) if isinstance(row, list) else repr(row)
                raise FewstepError(f"step {step} of a decision table has {found} decisions for {len(sites)} sites")
            for decision in row:
                if type(decision) is not int or not 0 <= decision < len(names):
                    raise FewstepError(
                        f"step {step} of a decision table has {decision!r}; give a whole number from 0 to {len(names) - 1}"
                    )
        return cls(tuple(map(str, sites)), tuple(map(tuple, table)), tuple(map(str, names)))


def decisions(cell: Mapping[str, Any]) -> Decisions | None:
    """The table of a manifest's cell; None where it holds none.

    Raises:
        FewstepError: for one that is damaged.
    """
    table = cell.get("decisions")
    return Decisions.from_json(table) if isinstance(table, Mapping) else None
