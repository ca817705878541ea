"""CachePlan: a cache as data. For every step and every site of a network what is done there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewstep.artifact import read_json, read_tensors, write_with_tensors
from fewstep.caching.actions import NAMES, Action
from fewstep.caching.predictors import Hold, Predictor, from_spec
from fewstep.errors import ArtifactError, FewstepError, PlanError

if TYPE_CHECKING:
    from torch import nn

    from fewstep.caching.cost import PlanCost
    from fewstep.caching.families import Family

KIND = "CachePlan"
Actions = np.ndarray[Any, np.dtype[np.int8]]


@dataclass(frozen=True, eq=False)
class CachePlan:
    """Which sites of a network are computed at which step. Immutable; the state of a run is elsewhere.

    A plan is a method too: ``caching.apply_(pipe, plan)``. At steps beyond its last everything is computed.

    Attributes:
        sites: names of the sites, as the model's family knows them.
        actions: (steps, sites) int8, :class:`~fewstep.caching.Action` as numbers.
        predictor: makes the value of a reused site from those computed before.
        model: what it was made for: ``class`` and, where calibration tied it to one, ``config`` (hash of the
            configuration). Empty: any model with these sites.
        scheduler: class of the scheduler that it was calibrated with; None where it does not matter.
        method: what made it.
        provenance: how: calibration data, errors measured, expected MACs.
    """

    sites: tuple[str, ...]
    actions: Actions
    predictor: Predictor = field(default_factory=Hold)
    model: Mapping[str, str] = field(default_factory=dict)
    scheduler: str | None = None
    method: str = "custom"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = np.array(self.actions, dtype=np.int8)  # a copy that nobody else writes to
        table.setflags(write=False)
        object.__setattr__(self, "actions", table)
        object.__setattr__(self, "sites", tuple(self.sites))
        self.validate()

    def validate(self) -> None:
        """Raises PlanError where the table contradicts itself; made by every constructor."""
        if self.actions.ndim != 2 or self.actions.shape[1] != len(self.sites) or not self.actions.size:
            raise PlanError(
                f"actions have shape {self.actions.shape}; (steps, {len(self.sites)}) is needed, one or more"
            )
        if len(set(self.sites)) != len(self.sites):
            raise PlanError(f"a plan names each site once, not {', '.join(self.sites)}")
        if (self.actions < 0).any() or (self.actions >= len(Action)).any():
            raise PlanError(f"actions are numbers from 0 to {len(Action) - 1} ({', '.join(NAMES)})")
        for column, site in enumerate(self.sites):
            reused = np.flatnonzero(self.actions[:, column] == Action.REUSE)
            computed = np.flatnonzero(self.actions[:, column] == Action.COMPUTE)
            if len(reused) and (not len(computed) or computed[0] > reused[0]):
                raise PlanError(f"site {site!r} is reused at step {reused[0]} before it is computed")

    @property
    def steps(self) -> int:
        """Calls of the network along the trajectory."""
        return len(self.actions)

    @property
    def num_inference_steps(self) -> int:
        """What a pipeline is called with; less than :attr:`steps` where the scheduler calls the network twice a step."""
        return int(self.provenance.get("steps", self.steps))

    @property
    def reuse(self) -> float:
        """Share of (step, site) that is not computed in full."""
        return float((self.actions != Action.COMPUTE).mean())

    @cached_property
    def kept(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(steps, sites): whether a value computed there is read later."""
        kept = np.zeros(self.actions.shape, dtype=bool)
        for column in range(len(self.sites)):
            wanted, reused = 0, False
            for step in range(self.steps - 1, -1, -1):
                action = self.actions[step, column]
                if action == Action.COMPUTE:
                    kept[step, column] = wanted > 0
                    wanted, reused = wanted - 1, False
                elif action == Action.REUSE:
                    wanted, reused = self.predictor.depth, True
                elif action == Action.SPARSE:
                    wanted = self.predictor.depth
                    kept[step, column] = reused
        return kept

    @cached_property
    def digest(self) -> str:
        """sha256 of what is done, shortened to 16 hexadecimal digits."""
        h = hashlib.sha256(repr((self.sites, self.actions.shape, self.predictor.spec())).encode())
        h.update(self.actions.tobytes())
        for name, tensor in sorted(self.predictor.tensors().items()):
            h.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return h.hexdigest()[:16]

    def check_model(self, family: Family) -> None:
        """Raises PlanError where the plan was made for a model of another class, or was calibrated on another configuration."""
        made_for = self.model.get("class", family.name)
        if made_for != family.name:
            raise PlanError(f"the cache plan was made for {made_for}, the model is {family.name}")
        if self.model.get("config", family.config_hash) != family.config_hash:
            raise PlanError(
                f"the cache plan was calibrated on a {family.name} of another configuration; calibrate it for this one"
            )

    def check_scheduler(self, scheduler: Any) -> None:
        """Raises PlanError where the plan was calibrated with a scheduler of another class."""
        name = type(scheduler).__name__
        if self.scheduler not in (None, name):
            raise PlanError(
                f"the cache plan was calibrated with {self.scheduler}, the pipeline has {name}; calibrate it with that one, "
                "or dataclasses.replace(plan, scheduler=None) to use it all the same"
            )

    def compile(self, steps: int | None) -> CachePlan:
        """Itself, as methods are compiled.

        Raises:
            PlanError: for another number of steps.
        """
        if steps is not None and steps != self.steps:
            raise PlanError(
                f"the cache plan is for {self.steps} steps, the run has {steps}; make one for {steps} steps"
            )
        return self

    def __or__(self, other: CachePlan) -> CachePlan:
        """Both plans at once, on disjoint sites and with one predictor."""
        if self.steps != other.steps:
            raise PlanError(f"a plan of {self.steps} steps and one of {other.steps} cannot be joined")
        if self.predictor.spec() != other.predictor.spec():
            raise PlanError("plans with different predictors cannot be joined; apply them as a list")
        return replace(
            self,
            sites=self.sites + other.sites,
            actions=np.concatenate([self.actions, other.actions], 1),
            method=f"{self.method} | {other.method}",
        )

    def decisions(self) -> dict[str, Any]:
        """The table as reports draw it."""
        return {"sites": list(self.sites), "decisions": self.actions.tolist(), "names": list(NAMES)}

    def cost(self, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> PlanCost:
        """Multiply-accumulates of a trajectory, counted on the meta device before anything runs.

        Args:
            model: the network; its weights are not touched.
            inputs: arguments of one call; where left out those of the model's usual size, with one sample.

        Raises:
            FewstepError: where the model has not the plan's sites, or no example inputs are known.
        """
        from fewstep.caching.cost import plan_cost

        return plan_cost(self, model, inputs)

    def __str__(self) -> str:
        marks = np.array(list(".#-~"))
        width = max(map(len, self.sites))
        rows = [
            f"CachePlan {self.method}: {self.steps} steps, {len(self.sites)} sites, {self.reuse:.0%} not computed "
            f"(. computed, # reused, - skipped, ~ sparse), predictor {self.predictor.kind}"
        ]
        rows += [f"  {site:<{width}} {''.join(marks[self.actions[:, i]])}" for i, site in enumerate(self.sites)]
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        from fewstep.caching.heatmap import plan_svg

        return plan_svg(self)

    # -- files --------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, its predictor's arrays as safetensors beside it."""
        if Path(path).suffix != ".json":
            raise ArtifactError(f"a plan's path must end in .json (its arrays lie beside it), got {str(path)!r}")
        body = {
            "sites": list(self.sites),
            "actions": self.actions.tolist(),
            "predictor": self.predictor.spec(),
            "arrays_named": sorted(self.predictor.tensors()),
            "model": dict(self.model),
            "scheduler": self.scheduler,
            "method": self.method,
            "provenance": dict(self.provenance),
            "digest": self.digest,
        }
        write_with_tensors(path, KIND, body, self.predictor.tensors())

    @classmethod
    def load(cls, path: str | Path) -> CachePlan:
        """Read what :meth:`save` wrote.

        Raises:
            ArtifactError: for a file that is missing, damaged, of another kind or version, or no sound plan.
        """
        keys = (
            "sites", "actions", "predictor", "arrays_named", "model", "scheduler", "method", "provenance", "digest",
            "arrays", "arrays_sha256",
        )  # fmt: skip
        body = read_json(path, KIND, keys)
        name = str(body["arrays"])
        if Path(name).name != name:
            raise ArtifactError(f"{path} names its arrays {name!r}; they lie beside it")
        if not isinstance(body["arrays_named"], list):
            raise ArtifactError(f"{path}: arrays_named is {body['arrays_named']!r}; it is a list")
        tensors = read_tensors(Path(path).with_name(name), body["arrays_sha256"], body["arrays_named"])
        try:
            plan = cls(
                sites=tuple(body["sites"]),
                actions=_table(body["actions"]),
                predictor=from_spec(body["predictor"], tensors),
                model=body["model"],
                scheduler=body["scheduler"],
                method=body["method"],
                provenance=body["provenance"],
            )
        except (FewstepError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} holds no sound cache plan: {error}") from error
        if plan.digest != body["digest"]:
            raise ArtifactError(f"{path} was changed: its numbers are not those that were saved")
        return plan


def _table(rows: Sequence[Sequence[int]]) -> Actions:
    if not all(isinstance(a, int) and -128 <= a < 128 for row in rows for a in row):
        raise PlanError("actions are rows of small whole numbers")
    return np.array(rows, dtype=np.int8)
