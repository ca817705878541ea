"""Rows: which samples of a batch a call runs, where it does not run all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

POSITIONS = ("image_rotary_emb", "rotary_emb", "freqs_cis", "img_ids", "txt_ids")
"""Arguments that belong to tokens; their first axis is no batch."""


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a batch of ``total``."""

    start: int
    stop: int
    total: int

    def of(self, value: Any) -> Any:
        """A tensor's part for these rows; frames folded into the batch follow. What has no batch axis is returned as it is."""
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] % self.total:
            return value
        times = value.shape[0] // self.total
        return value[times * self.start : times * self.stop]

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """A call's arguments for these rows."""
        return (
            [tree_map(self._argument, value) for value in args],
            {name: v if name in POSITIONS else tree_map(self._argument, v) for name, v in kwargs.items()},
        )

    def _argument(self, value: Any) -> Any:
        # a vector or a table with a multiple of the batch's length is something else than frames
        whole = not isinstance(value, Tensor) or value.ndim > 2 or value.shape[:1] == (self.total,)
        return self.of(value) if whole else value


def repeated(value: Any, times: int) -> Any:
    """A tensor with its batch ``times`` times over, one copy after the other."""
    return value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
