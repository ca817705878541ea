"""What a cache did: decisions by step and site, hit rate, memory, and what should make one wonder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fewstep.caching.actions import NAMES, Action
from fewstep.caching.plan import CachePlan
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from fewstep.caching.layers import Seen
    from fewstep.caching.model_cache import ModelCache

FEW_STEPS = 8
"""At so few steps neighbouring ones differ too much: every published cache gains 1.3x or less there, some do damage."""
DISTILLED = ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", "SCMScheduler")


@dataclass(frozen=True)
class CacheReport:
    """Decisions of the calls since the cache was applied.

    Attributes:
        method: what decided.
        sites: the sites' names, of all networks.
        counts: how often each action was taken, by (step, index of the site).
        forced: reuses that had to be computed, since nothing fitting was kept (a changed batch, a start in the middle).
        held: most bytes held at a time.
        warnings: sentences.
        seen: the calls, by network.
    """

    method: str
    sites: tuple[str, ...]
    counts: Mapping[tuple[int, int], Counter[int]]
    forced: int
    held: int
    warnings: tuple[str, ...]
    seen: tuple[Seen, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, caches: Sequence[ModelCache]) -> CacheReport:
        """The report of some networks' caches."""
        sites: list[str] = []
        counts: dict[tuple[int, int], Counter[int]] = {}
        for cache in caches:
            for (step, site, action), times in cache.log.items():
                counts.setdefault((step, site + len(sites)), Counter())[action] += times
            prefix = f"{cache.family.name}:" if len(caches) > 1 else ""
            sites += [prefix + site.name for site in cache.sites]
        methods = [layer.described for cache in caches for layer in cache.layers]
        made = cls(
            method=" + ".join(dict.fromkeys(methods)),
            sites=tuple(sites),
            counts=counts,
            forced=sum(cache.forced for cache in caches),
            held=sum(cache.peak_bytes for cache in caches),
            warnings=(),
            seen=tuple(cache.seen() for cache in caches),
        )
        return cls(**{**vars(made), "warnings": tuple(made._doubts(caches))})

    @property
    def steps(self) -> int:
        """Steps of the longest trajectory seen."""
        return 1 + max((step for step, _ in self.counts), default=-1)

    @property
    def hit_rate(self) -> float:
        """Share of all decisions that were not to compute; 0 where nothing was decided."""
        total = sum(sum(counter.values()) for counter in self.counts.values())
        computed = sum(counter[Action.COMPUTE] for counter in self.counts.values())
        return 1 - computed / total if total else 0.0

    @cached_property
    def executed(self) -> tuple[int, int] | None:
        """MACs of the calls, and of the same calls with everything computed; None where the network cannot be counted.

        Counted when it is asked for, on the shapes of the calls, as :meth:`CachePlan.cost` counts, for diffusers' models.
        """
        from fewstep.caching.cost import executed_macs

        try:
            counted = [executed_macs(seen) for seen in self.seen]
        except FewstepError:
            return None
        return sum(done for done, _ in counted), sum(full for _, full in counted)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates that were executed, whole batches; None where the network cannot be counted."""
        return None if self.executed is None else self.executed[0]

    def decisions(self) -> dict[str, Any]:
        """The most frequent action at every step and site, as report pages draw it."""
        table = [
            [self.counts.get((step, site), Counter({0: 1})).most_common(1)[0][0] for site in range(len(self.sites))]
            for step in range(self.steps)
        ]
        return {"sites": list(self.sites), "decisions": table, "names": list(NAMES)}

    def _doubts(self, caches: Sequence[ModelCache]) -> list[str]:
        if not self.counts:
            return ["the network was not called since the cache was applied"]
        found = []
        if self.hit_rate == 0:
            found.append("nothing was reused: the cache only costs; a larger interval, threshold or budget is needed")
        if (
            all(set(+counter) == {Action.REUSE} for (step, _), counter in self.counts.items() if step > 0)
            and self.steps > 1
        ):
            found.append("everything after the first step was reused: the images hardly depend on the steps any more")
        if self.steps <= FEW_STEPS:
            found.append(f"{self.steps} steps leave little to reuse: caches gain little at {FEW_STEPS} steps or fewer")
        schedulers = {type(getattr(cache.pipe, "scheduler", None)).__name__ for cache in caches}
        if distilled := schedulers & set(DISTILLED):
            found.append(
                f"{distilled.pop()} drives a model distilled to few steps, whose features change too fast to reuse"
            )
        found += [note for cache in caches for note in _adapters_changed(cache)]
        if self.forced:
            found.append(f"{self.forced} reuses had to be computed, because nothing that fitted was kept")
        return found

    def _summary(self) -> str:
        from fewstep.eval.costs.mac_count import human

        done, full = self.executed or (0, 0)
        work = f", {human(done)} MACs ({done / full:.1%} of computing everything)" if full else ""
        return f"{self.hit_rate:.0%} not computed{work}, at most {self.held / 2**20:.1f} MiB held"

    def __str__(self) -> str:
        marks = ".#-~"
        table = self.decisions()["decisions"]
        width = max(map(len, self.sites), default=0)
        rows = [f"{self.method}: {self._summary()}"]
        rows += [f"  {site:<{width}} {''.join(marks[row[i]] for row in table)}" for i, site in enumerate(self.sites)]
        rows += [f"  note: {warning}" for warning in self.warnings]
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        from html import escape

        from fewstep.caching.heatmap import table_html

        notes = "".join(f"<li>{escape(warning)}</li>" for warning in self.warnings)
        head = f"<p>{self._summary()}</p>"
        picture = table_html(self.decisions(), self.method) if self.counts else ""
        return head + picture + (f"<ul>{notes}</ul>" if notes else "")


def _adapters_changed(cache: ModelCache) -> Iterator[str]:
    """A note for every plan that was calibrated with other adapters than are active now."""
    now = cache.family.adapters
    for layer in cache.layers:
        if isinstance(layer.method, CachePlan) and (then := layer.method.provenance.get("adapters", now)) != now:
            yield f"calibrated with {_listed(then)}, the network has {_listed(now)}: what was fitted does not fit them"


def _listed(adapters: Sequence[str]) -> str:
    return f"the adapters {', '.join(adapters)}" if adapters else "no adapters"
