"""Streams: whose features a call makes. Conditional and unconditional calls never share what they keep.

A pipeline that opens a cache context names the stream. Where none is open the conditioning tells: pipelines pass the same
tensors at every step, so their identity is enough; tensors made anew are compared by value, once each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fewstep.caching.rows import Rows

Signature = tuple[Tensor, ...]


@dataclass
class Streams:
    """The streams of one trajectory, by their conditioning."""

    _known: list[tuple[str, Signature]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget all streams."""
        self._known = []

    def name(self, conditioning: Signature) -> str:
        """The stream of a call with this conditioning: the known one, or a new one."""
        for name, known in self._known:
            if _identical(known, conditioning):
                return name
        for index, (name, known) in enumerate(self._known):
            if _equal(known, conditioning):
                self._known[index] = (name, conditioning)  # recognised without a comparison from now on
                return name
        name = f"stream {len(self._known)}"
        self._known.append((name, conditioning))
        return name

    def part(self, conditioning: Signature) -> tuple[str, Rows] | None:
        """A known stream, and the half of its batch that this conditioning is: what is left where guidance was ended."""
        for name, known in self._known:
            for last in (True, False):
                rows = _half(known, conditioning, last)
                if rows and _equal(tuple(rows.of(x) for x in known), conditioning):
                    return name, rows
        return None


def _half(known: Signature, conditioning: Signature, last: bool) -> Rows | None:
    if not known or len(known) != len(conditioning):
        return None
    batch = known[0].shape[0] if known[0].ndim else 0
    sizes = {x.shape[0] if x.ndim else 0 for x in known}, {x.shape[0] if x.ndim else 0 for x in conditioning}
    if not batch or sizes != ({batch}, {batch // 2}) or batch % 2:
        return None
    return Rows(batch // 2, batch, batch) if last else Rows(0, batch // 2, batch)


def layout(tensors: Sequence[Any]) -> tuple[Any, ...]:
    """Shapes, dtypes and devices: what has to stay the same for kept features to fit."""
    return tuple((t.shape, t.dtype, t.device) for t in tensors if isinstance(t, Tensor))


def on_meta(values: Any) -> Any:
    """Tensors in a tree as shapes without numbers."""
    return tree_map(lambda v: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v, values)


def _identical(a: Signature, b: Signature) -> bool:
    return len(a) == len(b) and all(
        x is y or (x.data_ptr() == y.data_ptr() and layout([x]) == layout([y]) and not x.is_meta)
        for x, y in zip(a, b, strict=True)
    )


def _equal(a: Signature, b: Signature) -> bool:
    if len(a) != len(b) or layout(a) != layout(b):
        return False
    return all(x.is_meta or torch.equal(x, y) for x, y in zip(a, b, strict=True))
