"""Saved plans as a diffusers scheduler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fewstep.errors import FewstepError, GridError, unknown
from fewstep.samplers.grid import Grid
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scheduler import Numbers, SolverScheduler
from fewstep.samplers.solver import Solver


class PlanScheduler(SolverScheduler):
    """Runs saved or learned :class:`SolverPlan` s.

    ``plan`` is one of

    - a path ending in .json;
    - such a path with ``{nfe}`` where the number of calls stands, ``"boot-{nfe}.json"``: every plan there is, and
      ``set_timesteps`` chooses;
    - the name of an embedded model, for the learned plans that come with it;
    - a plan's own ``to_dict()``, or a dict of several by number of calls.

    The config keeps all that was found, so that a saved pipeline needs no other file. :meth:`from_plan` takes the object.
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
        self.register_to_config(plan=kept if len(kept) > 1 else next(iter(kept.values())))

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


def read_plans(source: str | Path | Mapping[str, Any]) -> dict[int, SolverPlan]:
    """The plans that ``plan=`` of :class:`PlanScheduler` stands for, by network calls, the fewest first.

    Raises:
        FewstepError: a name without learned plans, a pattern that no file has, or plans of one number of calls in two files.
        ArtifactError: a file that cannot be read.
    """
    if isinstance(source, Mapping):
        made = [
            SolverPlan.from_dict(p)
            for p in (source.values() if all(str(key).isdigit() for key in source) else [source])
        ]
    elif str(source).endswith(".json"):
        made = [SolverPlan.load(path) for path in _files(str(source))]
    else:
        from fewstep.samplers.learn.plans import load, shipped

        name = str(source)
        if name not in (there := shipped()):
            raise FewstepError(unknown("learned plans", name, (*there, "a path ending in .json")))
        made = [load(name, nfe) for nfe in there[name]]
    plans = {plan.nfe: plan for plan in sorted(made, key=lambda plan: plan.nfe)}
    if len(plans) < len(made):
        raise FewstepError(
            f"{source} stands for {len(made)} plans, some with the same number of calls; keep one of each"
        )
    return plans


def _files(pattern: str) -> list[Path]:
    folder, name = Path(pattern).parent, Path(pattern).name
    if "{nfe}" not in name:
        return [Path(pattern)]
    numbered = re.compile(re.escape(name).replace(re.escape("{nfe}"), r"\d+"))
    found = [path for path in folder.glob("*.json") if numbered.fullmatch(path.name)]
    if not found:
        raise FewstepError(f"no file is named {pattern} with a number in place of {{nfe}}")
    return found
