"""One decision of many: how the samples of a batch, and the ranks of a process group, agree on it.

A network is run or reused for the whole batch, so its samples have to agree; and ranks that share a network's weights or
tokens wait for each other inside it, so that ranks which decide apart never come back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown

VOTES = ("batch", "mean", "any")
"""``batch``: the change of the batch as a whole, as published; ``mean``: the mean of its samples' changes; ``any``: the largest
of these, so that one sample which has to be computed is enough."""


def check_vote(vote: str) -> None:
    """Raises FewstepError for a vote that there is not."""
    if vote not in VOTES:
        raise FewstepError(unknown("vote", vote, VOTES))


def relative_change(new: Tensor, old: Tensor, vote: str = "batch") -> Tensor:
    """|new - old|_1 / |old|_1, summed in float32 on the tensors' device; 0 / 0 is no change.

    Returns:
        0-d for the batch as a whole, else (samples,).
    """
    axes = None if vote == "batch" else tuple(range(1, new.ndim))
    change = (new - old).abs().sum(axes, dtype=torch.float32)
    norm = old.abs().sum(axes, dtype=torch.float32)
    return torch.where(change > 0, change / norm, change)


def on_host(changes: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Changes as numbers: what an online decision waits for."""
    return np.asarray(changes.tolist(), dtype=np.float64)


def decisive(changes: np.ndarray[Any, np.dtype[np.float64]], vote: str) -> float:
    """The one number that is held against the threshold."""
    return float(changes.mean() if vote == "mean" else changes.max())


def agreed(reuse: bool, device: torch.device, ranks: bool) -> bool:
    """Whether all ranks of the default process group would reuse; the own answer where there is no group, or none is asked.

    Args:
        reuse: the own answer.
        device: where the network's tensors are, which the group's backend reduces.
        ranks: whether others are asked. All have to be, at the same calls.
    """
    from torch import distributed

    if not ranks or not distributed.is_available() or not distributed.is_initialized():
        return reuse
    against = torch.tensor([not reuse], dtype=torch.int32, device=device)
    distributed.all_reduce(against, distributed.ReduceOp.MAX)
    return not against.item()
