"""What a plan costs before it runs: multiply-accumulates, counted on shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fewstep.caching.actions import Action
from fewstep.caching.families import family_of
from fewstep.caching.hooks import installed
from fewstep.caching.layers import Seen
from fewstep.caching.model_cache import ModelCache
from fewstep.caching.plan import CachePlan
from fewstep.caching.streams import on_meta
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class PlanCost:
    """Multiply-accumulates of a trajectory.

    Attributes:
        macs: of every step's call.
        full: of a call that computes everything.
    """

    macs: tuple[int, ...]
    full: int

    @property
    def total(self) -> int:
        """Of all steps."""
        return sum(self.macs)

    @property
    def share(self) -> float:
        """The plan's MACs as a share of computing everything."""
        return self.total / (self.full * len(self.macs))

    @property
    def speedup(self) -> float:
        """What the MACs allow at most; attention, norms and memory traffic decide how near one comes."""
        return 1 / self.share

    @property
    def effective_steps(self) -> float:
        """The number of full calls with as many MACs."""
        return self.total / self.full

    def __str__(self) -> str:
        from fewstep.eval.costs.mac_count import human

        return (
            f"{human(self.total)} MACs in {len(self.macs)} steps, {self.share:.1%} of computing everything: "
            f"at most {self.speedup:.2f} times as fast"
        )


def plan_cost(plan: CachePlan, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> PlanCost:
    """See :meth:`CachePlan.cost`."""
    rows, where = np.unique(plan.actions, axis=0, return_inverse=True)
    macs = row_macs(plan, model, rows, inputs)
    return PlanCost(tuple(macs[1 + int(i)] for i in where.reshape(-1)), macs[0])


def row_macs(
    plan: CachePlan, model: nn.Module, rows: np.ndarray[Any, Any], inputs: Mapping[str, Any] | None = None
) -> list[int]:
    """MACs of a call that computes everything, then of one with each row of actions.

    Args:
        plan: whose sites and predictor are meant.
        model: the network; it is not run.
        rows: (any number, sites) of actions.
        inputs: see :meth:`CachePlan.cost`.

    Raises:
        FewstepError: where the network cannot run on shapes alone.
    """
    from fewstep.eval.costs.mac_count import flop_counter

    family = family_of(model)
    halves = any(family.site(name).halves for name in plan.sites)
    arguments = on_meta(family.example(1 + halves) if inputs is None else dict(inputs))
    full = np.full((1, len(plan.sites)), Action.COMPUTE)
    lead = [full] * plan.predictor.depth  # the first of these is not kept, which may have a cost of its own
    # where a row runs half of the batch, the next one must not find what it kept
    pairs = [part for row in rows for part in (full, row[None])]
    table = np.concatenate([*lead, *(pairs if halves else (full, rows))])
    probe = CachePlan(plan.sites, table, plan.predictor, plan.model)
    shadow = meta_copy(model)
    cache = ModelCache(shadow, [probe], probe.steps)
    counts = []
    try:
        with torch.no_grad():
            for _ in range(probe.steps):
                with flop_counter() as counter:
                    shadow(**arguments)
                counts.append(int(counter.get_total_flops()) // 2)
    except (RuntimeError, NotImplementedError) as error:
        raise FewstepError(
            f"{type(model).__name__} cannot run on shapes alone ({str(error).splitlines()[0]}); "
            "count a real run with eval.MacCounter"
        ) from error
    finally:
        cache.remove()
    first = len(lead) + 1
    return counts[:1] + (counts[first::2] if halves else counts[first:])


def executed_macs(seen: Seen) -> tuple[int, int]:
    """MACs of calls that a cache has seen, and of the same calls with everything computed; see :func:`row_macs`.

    Raises:
        FewstepError: for a network that has no configuration to build it again from: a copy would share what hooks and plain
            callables remember.
    """
    if not hasattr(type(seen.model), "from_config"):
        raise FewstepError(f"{type(seen.model).__name__} has no configuration to build it again from")
    done = full = 0
    plan = CachePlan(seen.sites, np.zeros((1, len(seen.sites)), dtype=np.int8))
    for layout, inputs in seen.inputs.items():
        rows = {row: times for (at, row), times in seen.calls.items() if at == layout}
        if rows:
            whole, *macs = row_macs(plan, seen.model, np.array(list(rows), dtype=np.int8), inputs)
            full += whole * sum(rows.values())
            done += sum(each * times for each, times in zip(macs, rows.values(), strict=True))
    return done, full


def meta_copy(model: nn.Module) -> nn.Module:
    """The network on the meta device: shapes without numbers. The original's hooks and weights are left alone."""
    if hasattr(type(model), "from_config") and hasattr(model, "config"):
        with torch.device("meta"):
            made: nn.Module = type(model).from_config(model.config)  # type: ignore[attr-defined]
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)  # others are quantised
        # nn.Module's own: that of ModelMixin warns about modules kept in float32
        return nn.Module.to(made, dtype=dtype).eval()
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    made = copy.deepcopy(model, memo)
    if (hook := installed(made)) is not None:
        hook.cache.remove()
    return made


def shares(plan: CachePlan, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Sequence[float]:
    """Share of a full call's MACs that each site of a plan saves when it alone is reused."""
    rows = np.where(np.eye(len(plan.sites), dtype=bool), np.int8(Action.REUSE), np.int8(Action.COMPUTE))
    full, *reused = row_macs(plan, model, rows, inputs)
    return [1 - macs / full for macs in reused]
