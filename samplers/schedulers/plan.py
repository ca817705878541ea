"""Saved plans as a diffusers scheduler."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fewstep.errors import FewstepError, GridError, unknown
from fewstep.samplers.grid import Grid
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scheduler import Numbers, SolverScheduler
from fewstep.samplers.solver import Solver


class _Kept(dict[str, Any]):
    """Plans in a config: saved whole, but short where diffusers prints the keys that another class does not know."""

    def __repr__(self) -> str:
        return "<the plans of a PlanScheduler>"


class PlanScheduler(SolverScheduler):
    """Runs saved or learned :class:`SolverPlan` s.

    ``plan`` is one of

    - a path ending in .json;
    - such a path with ``{nfe}`` where the number of calls stands, ``"boot-{nfe}.json"``: every plan there is, and
      ``set_timesteps`` chooses;
    - the name of an embedded model, for the learned plans that come with it;
    - a plan, as the object or its ``to_dict()``, or a dict of several by number of calls.

    The config keeps all that was found, so that a saved pipeline needs no other file.
    """

    options: ClassVar[dict[str, Any]] = {"plan": None}

    @classmethod
    def from_plan(cls, plan: SolverPlan, config: Mapping[str, Any], **kwargs: Any) -> PlanScheduler:
        """A scheduler that runs ``plan`` on the model of ``config``; refuses a plan made for another schedule."""
        scheduler: PlanScheduler = cls.from_config(config, plan=plan.to_dict(), **kwargs)
        return scheduler

    def _configure(self) -> None:
        super()._configure()
        source = self.config.plan
        if source is None:
            raise FewstepError(
                "PlanScheduler needs plan=: a path ending in .json, or use PlanScheduler.from_plan(plan, config)"
            )
        self.plans = read_plans(source)
        for plan in self.plans.values():
            plan.check_schedule(self.schedule)
        kept = {str(nfe): plan.to_dict() for nfe, plan in self.plans.items()}
        self.register_to_config(plan=_Kept(kept if len(kept) > 1 else next(iter(kept.values()))))

    def __repr__(self) -> str:
        plans = {str(nfe): plan.method for nfe, plan in self.plans.items()}
        return f"{type(self).__name__} {json.dumps({**json.loads(self.to_json_string()), 'plan': plans}, indent=2)}"

    def solver(self) -> Solver:
        raise FewstepError("a PlanScheduler runs a finished plan; it has no solver to compile")

    def _compile(
        self, n: int | None, timesteps: Numbers | None, sigmas: Numbers | Grid | None
    ) -> tuple[Grid | None, SolverPlan]:
        there = " or ".join(map(str, self.plans))
        own = sigmas is None or (not isinstance(sigmas, Grid) and self._is_placeholder(sigmas))
        if timesteps is not None or not own:
            method = next(iter(self.plans.values())).method
            raise GridError(f"plan {method} has its own grid; call set_timesteps({there}) without timesteps or sigmas")
        asked = n if sigmas is None else len(sigmas)
        if asked not in self.plans:
            raise GridError(f"this scheduler's plans have {there} network calls, {asked} steps were asked for")
        return None, self.plans[asked]


def read_plans(source: Any) -> dict[int, SolverPlan]:
    """The plans that ``plan=`` of :class:`PlanScheduler` stands for, by network calls, the fewest first.

    Raises:
        FewstepError: nothing that stands for plans, a name without learned ones, a pattern that no file has, plans of one
            number of calls in two files, or a plan of another number than its file or key says.
        ArtifactError: a file that cannot be read.
        PlanError: a dict that is no plan.
    """
    if isinstance(source, SolverPlan):
        made = [source]
    elif isinstance(source, Mapping):
        made = _of_mapping(source)
    elif not isinstance(source, str | Path):
        raise FewstepError(f"plan is of type {type(source).__name__}; give a path, a name, a plan, or a dict of plans")
    elif str(source).endswith(".json"):
        made = _of_files(str(source))
    else:
        made = _shipped(str(source))
    plans = {plan.nfe: plan for plan in sorted(made, key=lambda plan: plan.nfe)}
    if len(plans) < len(made):
        raise FewstepError(
            f"{source} stands for {len(made)} plans, some with the same number of calls; keep one of each"
        )
    return plans


def _of_mapping(source: Mapping[Any, Any]) -> list[SolverPlan]:
    if not source:
        raise FewstepError("plan is an empty dict; give plans by their numbers of calls")
    if not all(str(key).isdecimal() for key in source):
        return [SolverPlan.from_dict(source)]
    made = []
    for key, given in source.items():
        if not isinstance(given, SolverPlan | Mapping):
            raise FewstepError(f"plan has a {type(given).__name__} for {key} calls; give a plan or its to_dict()")
        plan = given if isinstance(given, SolverPlan) else SolverPlan.from_dict(given)
        made.append(_of_calls(int(key), plan, f"the plan for {key} calls"))
    return made


def _of_files(pattern: str) -> list[SolverPlan]:
    folder, name = Path(pattern).parent, Path(pattern).name
    if "{nfe}" not in name:
        return [SolverPlan.load(pattern)]
    before, _, after = name.partition("{nfe}")
    numbered = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    found = [(path, match) for path in folder.glob("*.json") if (match := numbered.fullmatch(path.name))]
    if not found:
        raise FewstepError(f"no file is named {pattern} with a number in place of {{nfe}}")
    return [_of_calls(int(match[1]), SolverPlan.load(path), str(path)) for path, match in found]


def _shipped(name: str) -> list[SolverPlan]:
    from fewstep.samplers.learn.plans import load, shipped

    if name not in (there := shipped()):
        raise FewstepError(unknown("learned plans", name, (*there, "a path ending in .json")))
    return [load(name, nfe) for nfe in there[name]]


def _of_calls(said: int, plan: SolverPlan, what: str) -> SolverPlan:
    if plan.nfe != said:
        raise FewstepError(f"{what} has {plan.nfe} network calls; name it by that number")
    return plan
