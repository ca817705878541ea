"""EasyCache: how fast the output changed with the input last time says when it has changed too far to be reused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.caching.families import Family
from fewstep.caching.method import Entry
from fewstep.caching.methods.online import OnlineMethod, Watch, positive
from fewstep.caching.methods.voting import decisive, on_host
from fewstep.caching.residual import RESIDUAL
from fewstep.caching.roles import first_tensor


@dataclass(frozen=True)
class EasyCache(OnlineMethod):
    """The network's output minus its sample is reused until its expected changes have added up to a threshold.

        k = (|v_i - v_j|_1 / |v_i|_1) / |x_i - x_j|_1,    i, j: the last two steps that were computed
        acc += k |x_t - x_{t-1}|_1,    compute and acc = 0 where acc >= threshold, else v_t = x_t + (v_i - x_i)

    x is the sample and v the output, so it fits any network, as a plain callable too, and nothing has to be fitted. It was
    made for flows, whose v - x changes slowly; where the output is noise, :class:`TeaCache` on inner features is the better
    choice. It holds two samples and an output beside the residual, and reads one number from the device a step. Less is
    Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching, arXiv 2507.02860.

    Attributes:
        threshold: of the accumulated relative change; the authors take 0.05 to 0.06 on Wan 2.2.
        warmup: the authors compute 7 of 50 steps first.
        cooldown: and the last one.
    """

    knob: ClassVar[str | None] = "threshold"
    threshold: float = 0.05
    warmup: int = field(default=7, kw_only=True)
    cooldown: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.threshold, "threshold")

    def sites(self, family: Family) -> list[str]:
        return [family.site(RESIDUAL).name]

    def watch(self, family: Family, steps: int | None) -> Watch:
        return _OutputChange(self)


class _OutputChange(Watch):
    """Adds up the changes of the output that those of the input let expect."""

    def __init__(self, method: EasyCache) -> None:
        super().__init__(method)
        self.threshold, self.vote = method.threshold, method.vote
        self.sample: Tensor | None = None
        """Of the last step."""
        self.known: tuple[int, Tensor, Tensor] | None = None
        """Step, sample and output of the last computed step that is known."""
        self.entered: Tensor | None = None
        """The sample of the last computed step."""
        self.rate: Tensor | None = None
        self.expected: Tensor | None = None
        self.accumulated: Any = 0.0

    def observe(self, entry: Entry) -> None:
        x, last = first_tensor(entry.args, entry.kwargs), self.sample
        if last is not None and last.shape != x.shape:  # another batch: nothing that was seen compares
            self.known = self.rate = last = None
        elif (
            entry.kept is not None and self.entered is not None and (not self.known or entry.kept.step > self.known[0])
        ):
            self._learn(entry.kept.step, self.entered, entry.kept.leaves[0][:, : x.shape[1]] + self.entered)
        self.sample = x
        self.expected = None if self.rate is None or last is None else self.rate * self._size(x - last)

    def _learn(self, step: int, sample: Tensor, output: Tensor) -> None:
        """The rate between this computed step and the one before it."""
        if self.known is not None:
            _, other, before = self.known
            change = self._size(output - before) / self._size(output)
            # a sample that stands still says nothing about the rate, and its output is the same
            self.rate = torch.where(change > 0, change / self._size(sample - other), change)
        self.known = step, sample, output

    def _size(self, x: Tensor) -> Tensor:
        return x.abs().sum(None if self.vote == "batch" else tuple(range(1, x.ndim)), dtype=torch.float32)

    def admits(self, entry: Entry) -> bool:
        if self.expected is None:
            return False
        self.accumulated = self.accumulated + on_host(self.expected)
        return decisive(np.asarray(self.accumulated), self.vote) < self.threshold

    def recompute(self, entry: Entry) -> None:
        self.accumulated, self.entered = 0.0, self.sample
