"""Clock: at which position of which trajectory a call of the network is, without reading a tensor on a device.

Pipelines pass an element of ``scheduler.timesteps``. Iterating or indexing a tensor gives views, so where the element lies in
its storage *is* its position, and another storage is another trajectory: no value is read, nothing synchronises, repeated
times (Heun) and times that go up (restarts) are told apart, and a run that starts in the middle (image to image) starts at
the row of its noise level. Other callers pass numbers or fresh tensors; then a change of the value is a step, a rise a new
trajectory, and a stream that calls again at the same value a second evaluation of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Tick:
    """Where a call is.

    Attributes:
        step: its position, from 0.
        fresh: whether a new trajectory starts with it.
        total: length of the trajectory where the timesteps tell it.
    """

    step: int
    fresh: bool
    total: int | None


@dataclass
class Clock:
    """Follows the calls of one network."""

    _list: Tensor | None = None  # kept so that its memory is not given to the next list
    _last: Any = None
    _step: int = -1
    _seen: set[str] = field(default_factory=set)

    def reset(self) -> None:
        """The next call starts a trajectory."""
        self._list, self._last, self._step = None, None, -1
        self._seen = set()

    def tick(self, stream: str, timestep: Any, step_index: int | None = None, total: int | None = None) -> Tick:
        """The position of a call.

        Args:
            stream: which of the streams calls (conditional, unconditional).
            timestep: what the network is told: an element of a list, a number, a tensor of equal numbers.
            step_index: the position, where the pipeline's scheduler says it; asked only if the timestep is no element.
            total: length of the trajectory, likewise.
        """
        if (element := _element(timestep)) is not None:
            times, position, total = element
            same = self._list is not None and self._list.data_ptr() == times.data_ptr()
            self._list, self._last = times, timestep
            return self._at(stream, position, not same or self._passed(stream, position), total)
        if step_index is not None:
            self._last = timestep
            return self._at(stream, step_index, self._step < 0 or self._passed(stream, step_index), total)
        tick = self._by_value(stream, timestep)
        return Tick(tick.step, tick.fresh, total)

    def called(self, stream: str) -> bool:
        """Whether the stream called at the present step."""
        return stream in self._seen

    def _passed(self, stream: str, position: int) -> bool:
        """Whether the stream was at or beyond the position: a run comes by only once."""
        return position < self._step or (position == self._step and stream in self._seen)

    def _by_value(self, stream: str, timestep: Any) -> Tick:
        if self._step < 0:
            self._last = timestep
            return self._at(stream, 0, True, None)
        if timestep is self._last or not _later(timestep, self._last):
            again = stream in self._seen
            risen = timestep is not self._last and _later(self._last, timestep)
            self._last = timestep
            if risen:
                return self._at(stream, 0, True, None)
            return self._at(stream, self._step + again, False, None)
        self._last = timestep
        return self._at(stream, self._step + 1, False, None)

    def _at(self, stream: str, step: int, fresh: bool, total: int | None) -> Tick:
        if fresh or step != self._step:
            self._seen = set()
        self._seen.add(stream)
        self._step = step
        return Tick(step, fresh, total)


def _element(timestep: Any) -> tuple[Tensor, int, int] | None:
    """The list that a timestep is an element of (as one flat tensor), its index, and the list's length."""
    if not isinstance(timestep, Tensor) or timestep.is_meta:
        return None
    if any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True)):
        return None  # a tensor of its own values, not one element repeated
    length = timestep.untyped_storage().nbytes() // timestep.element_size()
    if length < 2:
        return None
    return timestep.as_strided((length,), (1,), 0), int(timestep.storage_offset()), length


def _later(timestep: Any, last: Any) -> bool:
    """Whether a timestep is nearer to the image than the last one. Reads one number of each where they are tensors."""
    return _number(timestep) < _number(last)


def _number(timestep: Any) -> float:
    if isinstance(timestep, Tensor):
        return float(timestep.reshape(-1)[0]) if not timestep.is_meta else 0.0
    return float(timestep)
