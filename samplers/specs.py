"""Schedulers by name: ``DPMSolver``, ``UniPC(solver_order=3, grid='karras')``, ``diffusers:HeunDiscreteScheduler``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.config import normalised
from fewstep.samplers.spelling import parse_call


@dataclass(frozen=True)
class Spec:
    """A scheduler and the options it gets on top of the model's config."""

    library: str
    """``fewstep`` or ``diffusers``."""
    name: str
    """The class name."""
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        """The canonical spelling, which :func:`parse_spec` reads back."""
        prefix = "diffusers:" if self.library == "diffusers" else ""
        name = self.name if self.library == "diffusers" else self.name.removesuffix("Scheduler")
        options = ", ".join(f"{k}={v!r}" for k, v in self.options)
        return f"{prefix}{name}({options})" if options else f"{prefix}{name}"

    @property
    def scheduler_class(self) -> type[Any]:
        """The class itself; imports diffusers."""
        return _classes(self.library)[self.name]


def scheduler_names() -> list[str]:
    """The short names of fewstep's own schedulers."""
    return sorted(name.removesuffix("Scheduler") for name in _classes("fewstep") if name != "PlanScheduler")


def parse_spec(text: str) -> Spec:
    """Read a scheduler's name with options, ``NAME`` or ``NAME(key=value, ...)``; values are Python literals.

    A bare word is taken as a string, so ``grid=karras`` works.

    Raises:
        FewstepError: not of that form, an unknown class, or an option that the class does not have.
    """
    library, _, rest = (
        text.strip().rpartition(":") if text.strip().startswith("diffusers:") else ("fewstep", "", text.strip())
    )
    name, options = parse_call(rest, "scheduler")
    classes = _classes(library)
    if library == "fewstep" and f"{name}Scheduler" in classes:
        name = f"{name}Scheduler"
    if name not in classes:
        short = [n if library == "diffusers" else n.removesuffix("Scheduler") for n in classes]
        raise FewstepError(unknown(f"{library} scheduler", name, short))
    keys = set(inspect.signature(classes[name].__init__).parameters) - {"self"}
    for key in options:
        if key not in keys:
            raise FewstepError(unknown(f"option of {name}", key, keys))
    return Spec(library, name, tuple(options.items()))


def make_scheduler(spec: str | Spec, config: Mapping[str, Any]) -> Any:
    """The scheduler that ``spec`` names, for the model whose scheduler config is ``config``.

    diffusers' schedulers get the config with flow matching spelled as they understand it, so peers run at their best.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    source = normalised(config) if spec.library == "diffusers" else config
    return spec.scheduler_class.from_config(source, **dict(spec.options))


def _classes(library: str) -> dict[str, type[Any]]:
    from diffusers import schedulers as theirs
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from fewstep.samplers import schedulers as ours

    if library == "diffusers":
        found = {name: getattr(theirs, name, None) for name in dir(theirs)}
        return {
            name: c for name, c in found.items()
            if inspect.isclass(c) and issubclass(c, SchedulerMixin) and c is not SchedulerMixin
        }  # fmt: skip
    names = [name for name in dir(ours) if name.endswith("Scheduler") and name != "SolverScheduler"]
    return {name: getattr(ours, name) for name in names}
