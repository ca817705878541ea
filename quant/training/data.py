"""Which rows of which calls are trained on, and which are only judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fewstep.quant.calibration.calls import Call


def samples_apart(calls: Sequence[Call]) -> set[int]:
    """The last quarter of the recorded samples, at least one of two; none where rows are not known to belong to any."""
    if any(call.samples is None for call in calls):
        return set()
    found = sorted({sample for call in calls for sample in call.samples or ()})
    return set(found[-max(1, len(found) // 4) :]) if len(found) > 1 else set()


def split(calls: Sequence[Call]) -> tuple[list[tuple[int, list[int]]], list[tuple[int, list[int]]]]:
    """Rows to train on and rows to judge by, as (call, rows): whole samples, so that nothing of one is on both sides.

    Where rows are not known to belong to samples: of every call the last quarter of its batch; of single ones every fourth
    call. Where there is nothing to set apart both are everything.
    """
    apart = samples_apart(calls)
    seen: list[tuple[int, list[int]]] = []
    unseen: list[tuple[int, list[int]]] = []
    for i, call in enumerate(calls):
        rows = list(range(call.batch))
        if apart:
            assert call.samples is not None
            judged = [r for r in rows if call.samples[r] in apart]
        elif call.batch >= 4:
            judged = rows[-(call.batch // 4) :]
        else:
            judged = rows if i % 4 == 3 else []
        trained = [r for r in rows if r not in judged]
        seen += [(i, trained)] if trained else []
        unseen += [(i, judged)] if judged else []
    return (seen, unseen) if seen and unseen else (_all(calls), _all(calls))


def _all(calls: Sequence[Call]) -> list[tuple[int, list[int]]]:
    return [(i, list(range(call.batch))) for i, call in enumerate(calls)]


@dataclass
class Feed:
    """Draws for training: every call as often as its chance says, the same samples at several calls together.

    Attributes:
        calls: everything that was recorded.
        part: what of it is trained on.
        rows: of one draw at most, in whole samples.
        together: calls of one draw.
        chance: how likely a call of relative time u in [0, 1] is.
    """

    calls: Sequence[Call]
    part: Sequence[tuple[int, list[int]]]
    rows: int = 16
    together: int = 1
    chance: Callable[[float], float] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, list[int]]]]:
        generator = torch.Generator().manual_seed(0)
        count = min(self.together, len(self.part))
        chances = self._chances()
        order: list[int] = []
        while True:
            if chances is not None:
                chosen = torch.multinomial(chances, count, generator=generator).tolist()
            else:  # every call equally often
                if len(order) < count:
                    order = torch.randperm(len(self.part), generator=generator).tolist()
                chosen, order = order[:count], order[count:]
            yield self._rows(chosen, generator)

    def _chances(self) -> torch.Tensor | None:
        if self.chance is None:
            return None
        times = [self.calls[i].timestep for i, _ in self.part]
        top = max((t for t in times if t == t), default=0.0)
        return torch.tensor([self.chance(t / top) if top > 0 and t == t else 1.0 for t in times]).double()

    def _rows(self, chosen: Sequence[int], generator: torch.Generator) -> list[tuple[int, list[int]]]:
        """The same samples of every chosen call, in the same order; of the first call alone where they have none in common."""
        owned = [self._owned(place) for place in chosen]
        common = sorted(s for s, rows in owned[0].items() if all(len(o.get(s, ())) == len(rows) for o in owned))
        if not common:
            return self._rows(chosen[:1], generator)
        picked: list[int] = []
        count = 0
        for j in torch.randperm(len(common), generator=generator).tolist():
            more = len(owned[0][common[j]])
            if picked and count + more > self.rows:
                break
            picked.append(common[j])
            count += more
        return [
            (self.part[place][0], [r for s in picked for r in o[s]]) for place, o in zip(chosen, owned, strict=True)
        ]

    def _owned(self, place: int) -> dict[int, list[int]]:
        """The rows of each sample; where nothing is known of samples each row is one."""
        call, rows = self.part[place]
        samples = self.calls[call].samples
        found: dict[int, list[int]] = {}
        for row in rows:
            found.setdefault(row if samples is None else samples[row], []).append(row)
        return found
