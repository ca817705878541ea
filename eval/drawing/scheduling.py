"""Schedulers from specs, on the grids of a sweep, with every refusal as one clear error."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

from fewstep.errors import FewstepError, unknown

DEFAULT_GRID = "default"

# diffusers has no grid option: what is one name here is a flag or a spacing there, in the schedulers that have it.
_DIFFUSERS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}


def canonical(spec: Any) -> str:
    """One spelling a scheduler, so that the same one asked for in two ways is found out.

    Raises:
        FewstepError: for what is no spec, an unknown scheduler or an option that it does not have.
    """
    from fewstep.samplers import parse_spec

    if not isinstance(spec, str):
        raise FewstepError(f"a scheduler is {spec!r}; give a spec such as 'DPMSolver(solver_order=3)'")
    return str(parse_spec(spec))


@lru_cache(maxsize=4096)
def with_grid(spec: str, grid: str) -> str:
    """The spec of a scheduler on a named grid, ``karras`` or ``karras(low=0.1)``; ``default`` leaves it as it is.

    Raises:
        FewstepError: where the spec chooses a grid itself, or diffusers' scheduler has nothing that is this grid.
    """
    if grid == DEFAULT_GRID:
        return spec
    from fewstep.samplers import parse_spec
    from fewstep.samplers.grid import NAMES, parse_grid

    parsed = parse_spec(spec)
    if "(" in grid:
        parse_grid(grid)
    elif grid not in NAMES and grid not in _DIFFUSERS and not grid.endswith(".json"):
        raise FewstepError(unknown("grid", grid, (DEFAULT_GRID, *NAMES, "a path that ends in .json")))
    options = {"grid": grid}
    if parsed.library == "diffusers":
        if grid not in _DIFFUSERS:
            raise FewstepError(f"{spec}: {unknown('grid of diffusers schedulers', grid, (DEFAULT_GRID, *_DIFFUSERS))}")
        options = _DIFFUSERS[grid]
    given = dict(parsed.options)
    if chosen := [key for key in options if key in given]:
        raise FewstepError(f"{spec} chooses {chosen[0]} itself, and the grid {grid!r} would too; give it in one place")
    try:
        made = dataclasses.replace(parsed, options=tuple((given | options).items()))
        return str(parse_spec(str(made)))
    except FewstepError as error:
        raise FewstepError(
            f"{spec} cannot take the grid {grid!r} ({error}); leave the pair out with an exclude rule"
        ) from error


@lru_cache(maxsize=4096)
def step_counts(spec: str) -> tuple[int, ...] | None:
    """The numbers of steps that a scheduler of saved plans can make; None where any will do.

    Raises:
        FewstepError: for plans that are missing or cannot be read.
    """
    from fewstep.samplers import parse_spec
    from fewstep.samplers.schedulers.plan import read_plans

    parsed = parse_spec(spec)
    source = dict(parsed.options).get("plan") if parsed.name == "PlanScheduler" else None
    return None if source is None else tuple(read_plans(source))


def scheduler_for(spec: str, config: Any) -> Any:
    """The scheduler of ``spec`` for the model whose own scheduler has ``config``.

    Raises:
        FewstepError: for an unknown name or option, or a value that the scheduler's class refuses, whatever it raises.
    """
    from fewstep.samplers import make_scheduler

    try:
        return make_scheduler(spec, config)
    except FewstepError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise FewstepError(
            f"scheduler {spec!r} cannot be made: {reason[0] if reason else type(error).__name__}"
        ) from error
