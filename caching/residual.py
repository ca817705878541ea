"""The site ``residual``: the network's output minus the sample, kept and put on the sample of a later step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fewstep.caching.roles import Fit, Forward, Moment, Role
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError

RESIDUAL = "residual"


@dataclass(frozen=True)
class OutputResidual(Role):
    """r = F(x, t) - x on the sample's channels; reused as x + r, which the predictor may then correct.

    Further channels of the output (a learned variance) are kept as they are.
    """

    path: str = ""

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = forward(*args, **kwargs)
        if at.keep:
            at.cell.keep(at.step, _moved(out, at.scene.sample, -1))
        return out

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return at.predictor.predict(_on_sample(at), at.step)

    def teach(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], fit: Fit) -> Any:
        return fit(_on_sample(at), at.step, forward(*args, **kwargs))


def _on_sample(at: Moment) -> Cell:
    """The cell as if outputs had been kept: the kept residuals on the sample of now."""
    moved = Cell.empty(at.cell.site, at.cell.history.maxlen or 1)
    for value in reversed(at.cell.history):
        value.check(at.cell.site)
        moved.keep(value.step, _moved(value.tree(), at.scene.sample, 1))
    return moved


def _moved(out: Any, sample: Tensor, sign: int) -> Any:
    """The output with the sample added to, or taken from, its first channels.

    Raises:
        FewstepError: where output and sample do not lie on one grid.
    """
    leaves, spec = tree_flatten(out)
    value = leaves[0]
    if value.ndim != sample.ndim or value.shape[0] != sample.shape[0] or value.shape[2:] != sample.shape[2:]:
        raise FewstepError(
            f"the output has shape {tuple(value.shape)} and the sample {tuple(sample.shape)}; site {RESIDUAL!r} needs one grid"
        )
    channels = min(sample.shape[1], value.shape[1])
    first = torch.add(value[:, :channels], sample[:, :channels], alpha=sign)
    leaves[0] = first if channels == value.shape[1] else torch.cat([first, value[:, channels:]], 1)
    return tree_unflatten(leaves, spec)
