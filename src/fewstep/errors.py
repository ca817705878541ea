"""The errors that bad input raises: one sentence with the offending value and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FewstepError(ValueError):
    """Base of every error that a user's input can cause; the command line turns it into exit code 2."""


class GridError(FewstepError):
    """A time grid that no solver can run on."""


class PlanError(FewstepError):
    """A plan that contradicts itself, its model or its schedule."""


class ArtifactError(FewstepError):
    """A file that is missing, damaged, of another version, or made for something else."""


def unknown(what: str, value: object, known: Iterable[object]) -> str:
    """``unknown("grid", "karas", [...])`` -> a sentence that names the value, the nearest known ones, and all of them.

    Near is what is spelled alike, and what holds the value whole: ``order`` is short for ``solver_order``.
    """
    names = sorted(str(k) for k in known)
    folded = {name.casefold(): name for name in names}
    wanted = str(value).casefold()
    near = difflib.get_close_matches(wanted, folded, n=1)
    if len(wanted) > 2:
        near += [name for name in sorted(folded, key=len) if wanted in name and name not in near][:2]
    hint = f"; did you mean {' or '.join(repr(folded[name]) for name in near)}? Known" if near else "; known"
    return f"unknown {what} {value!r}{hint}: {', '.join(names)}"
