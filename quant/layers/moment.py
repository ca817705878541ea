"""Moment: at which of the stored times a network is called, so that layers take the input scales of that time.

Source: EfficientDM, 2310.03270, sec. 4.3 (a step size for every time step); TFMQ-DM, 2311.16503, sec. 4.3 (times are a finite
set).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError

HANDLE = "_fewstep_moment"


class Moment:
    """A hook before the forward pass of a network, shared by its layers.

    Times are compared where the timestep lies, so nothing is read back from a device. Of a batch the first sample's time
    counts for all: samplers call a batch at one time.

    Attributes:
        times: (T,) ascending.
        row: (1,) int64, the nearest of them, on the device of the last call's timestep.
    """

    def __init__(self, times: Sequence[float]) -> None:
        self.times = torch.tensor(list(times), dtype=torch.float64)
        self.row: Tensor | None = None
        self._placed: dict[torch.device, Tensor] = {}

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if time is None:
            raise FewstepError("the network was not told its time, by which its input scales are stored; give timestep")
        self.row = self.nearest(time)

    def nearest(self, time: Any) -> Tensor:
        """(1,) the row of the time that is nearest."""
        at = time if isinstance(time, Tensor) else torch.tensor(float(time))
        if at.device not in self._placed:
            self._placed[at.device] = self.times.float().to(at.device)
        return (self._placed[at.device] - at.detach().reshape(-1)[:1].float()).abs().argmin(keepdim=True)

    def pick(self, table: Tensor) -> Tensor:
        """The row (1, G) of a table (T, G) for the call that is under way."""
        if self.row is None:
            raise FewstepError("a layer with input scales by time was called outside its network; call the network")
        return table.index_select(0, self.row.to(table.device))


def follow_times_(model: nn.Module) -> None:
    """Let every layer with scales by time know the time of each call; a network without such layers is left alone."""
    from fewstep.quant.layers.base import QuantLayer

    layers = [layer for layer in model.modules() if isinstance(layer, QuantLayer) and layer.plan.times]
    moments = {times: Moment(times) for times in dict.fromkeys(layer.plan.times for layer in layers)}
    for layer in layers:
        layer.moment = moments[layer.plan.times]
    if moments:
        handles = [model.register_forward_pre_hook(moment, with_kwargs=True) for moment in moments.values()]
        setattr(model, HANDLE, handles)


def forget_times_(model: nn.Module) -> None:
    """Take the hooks off again."""
    for handle in getattr(model, HANDLE, ()):
        handle.remove()
    if hasattr(model, HANDLE):
        delattr(model, HANDLE)
