"""Roles: what a module of a site does when the site is computed, reused or skipped.

A site is a part of the network with one value. One or several modules lie on its way, and each plays a role: the module
whose output *is* the value, blocks that a residual leads past, modules that need not run because nothing reads them.
Roles are values without state; what they remember is in the site's :class:`~fewstep.caching.store.Cell`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fewstep.caching.actions import Action
from fewstep.caching.predictors import Predictor
from fewstep.caching.rows import Rows
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError


@dataclass
class Scene:
    """What holds for a whole call of the network.

    Attributes:
        stream: name of the stream that calls.
        sample: the noisy sample that the network was called with.
        rows: the samples that run now, where these are not all of the batch.
        shared: what the streams of a trajectory tell each other.
    """

    stream: str = ""
    sample: Any = None
    rows: Rows | None = None
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """What a role is told about the call it serves.

    Attributes:
        cell: the site's memory in the call's stream.
        step: position on the trajectory.
        keep: whether a computed value will be needed.
        predictor: makes the value of a step at which the site is reused.
        scene: the call.
    """

    cell: Cell
    step: int
    keep: bool
    predictor: Predictor
    scene: Scene = field(default_factory=Scene)

    def predict(self) -> Any:
        """The site's value now."""
        return self.predictor.predict(self.cell, self.step)


Forward = Callable[..., Any]
Fit = Callable[[Cell, int, Any], Any]
"""``fit(cell, step, true value)`` returns the prediction that stands for it."""


@dataclass(frozen=True)
class Role:
    """Base of all roles; ``path`` is the module's, for messages and memory.

    Attributes:
        wraps: whether it goes around another role of the same module.
        reads: the actions that need a value computed before.
    """

    path: str
    wraps: ClassVar[bool] = False
    reads: ClassVar[tuple[Action, ...]] = (Action.REUSE, Action.SPARSE)

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def teach(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], fit: Fit) -> Any:
        """Compute the true value, show it to ``fit``, and go on with the predicted one: how predictors are calibrated."""
        raise NotImplementedError

    def skip(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise FewstepError(f"site {at.cell.site!r} can be computed or reused, not left out")

    def sparse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise FewstepError(f"site {at.cell.site!r} has no cheaper form")


@dataclass(frozen=True)
class Output(Role):
    """The module's output is (a part of) the site's value."""

    several: bool = False
    """Whether the site has more such modules: each then keeps its output under its own path."""

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = forward(*args, **kwargs)
        if at.keep:
            self._cell(at).keep(at.step, out)
        return out

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return at.predictor.predict(self._cell(at), at.step)

    def teach(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], fit: Fit) -> Any:
        return fit(self._cell(at), at.step, forward(*args, **kwargs))

    def skip(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """As if the branch that the module is added nothing: zeros like its first input."""
        return torch.zeros_like(first_tensor(args, kwargs))

    def _cell(self, at: Moment) -> Cell:
        if not self.several:
            return at.cell
        return at.cell.part(self.path)


@dataclass(frozen=True)
class Ghost(Role):
    """Nothing that is read depends on the module: it returns placeholders of the right shapes when it does not run.

    Zeros of stride 0, so they cost no memory and what is done to them little.
    """

    written: bool = False
    """Whether the model may write into what it returns, which must have memory of its own then."""

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = forward(*args, **kwargs)
        if at.keep:
            at.cell.shapes[self.path] = tree_map(_shape_of, out)
        return out

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        def made(leaf: Any) -> Any:
            if not isinstance(leaf, _Shape):
                return leaf
            return leaf.placeholder().contiguous() if self.written else leaf.placeholder()

        return tree_map(made, at.cell.shapes[self.path])

    def teach(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], fit: Fit) -> Any:
        return forward(*args, **kwargs)  # the true value depends on it


class _Shape:
    """Shape, dtype and device of a tensor that is not kept; a leaf of trees."""

    def __init__(self, value: Tensor) -> None:
        self.shape, self.dtype, self.device = value.shape, value.dtype, value.device

    def placeholder(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)

    def mapped(self, change: Callable[[Any], Any]) -> _Shape:
        return _Shape(change(self.placeholder()))


def _shape_of(leaf: Any) -> Any:
    return _Shape(leaf) if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Streams:
    """How a transformer block takes and returns its streams of tokens.

    Attributes:
        names: the arguments that carry them.
        positions: where these stand among positional arguments.
        returns: index of each in the returned tuple; () where the block returns the first stream alone, as a tensor.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...]
    returns: tuple[int, ...]

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The streams that go in."""
        return [
            kwargs[name] if name in kwargs else args[position] if position < len(args) else None
            for name, position in zip(self.names, self.positions, strict=True)
        ]

    def unpack(self, out: Any) -> list[Any]:
        """The streams in a block's output."""
        return [out[i] for i in self.returns] if self.returns else [out]

    def pack(self, streams: Sequence[Any]) -> Any:
        """An output as the block would return it."""
        if not self.returns:
            return streams[0]
        out = [None] * (max(self.returns) + 1)
        for stream, index in zip(streams, self.returns, strict=True):
            out[index] = stream
        return tuple(out)


@dataclass(frozen=True)
class Block(Role):
    """A block of a range a..b; the site's value is the residual of the whole range, F_{a..b}(x) - x, for every stream.

    Reused, every block passes its input on, and the last one adds the residual to it. A stream that ends in the range
    (the text of SD3's last block) has no residual: None is returned for it again.
    """

    streams: Streams
    first: bool
    last: bool

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not at.keep:
            return forward(*args, **kwargs)
        self._enter(at, self.streams.read(args, kwargs))
        out = forward(*args, **kwargs)
        if (residual := self._leave(at, self.streams.unpack(out))) is not None:
            at.cell.keep(at.step, residual)
        return out

    def _enter(self, at: Moment, streams: list[Any]) -> None:
        """Remember where the range began, moved by what the model itself adds between its blocks (ControlNets do)."""
        scratch = at.cell.scratch
        if self.first:
            scratch["begin"] = streams
        elif "begin" in scratch:
            if any(
                old is not None and new.shape != old.shape for old, new in zip(scratch["end"], streams, strict=False)
            ):
                raise FewstepError(
                    f"the model rearranges its tokens between the blocks of site {at.cell.site!r}, so it has no residual; "
                    "cache single blocks, or what is inside them"
                )
            scratch["begin"] = [
                a if new is old or old is None else a + (new - old)
                for a, old, new in zip(scratch["begin"], scratch["end"], streams, strict=False)
            ]

    def _leave(self, at: Moment, streams: list[Any]) -> list[Any] | None:
        """The range's residual where it ends here, else None."""
        scratch = at.cell.scratch
        scratch["end"] = streams
        if not self.last:
            return None
        begin, end = scratch.pop("begin", None), scratch.pop("end")
        if begin is None:  # the model left the first block out
            at.cell.computed = None
            return None
        return [b - a if b is not None else None for a, b in zip(begin, end, strict=False)]

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        streams = self.streams.read(args, kwargs)
        if self.last:
            residual = at.predict()
            streams = [x + r if r is not None else None for x, r in zip(streams, residual, strict=False)]
        return self.streams.pack(streams)

    def teach(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], fit: Fit) -> Any:
        self._enter(at, self.streams.read(args, kwargs))
        out = forward(*args, **kwargs)
        end = self.streams.unpack(out)
        true = self._leave(at, end)
        if true is None:
            return out
        predicted = fit(at.cell, at.step, true)
        moved = [x + (p - t) if t is not None else None for x, p, t in zip(end, predicted, true, strict=False)]
        return self.streams.pack(moved)

    def skip(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self.streams.pack(self.streams.read(args, kwargs))


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor among the arguments; the hidden states where they are named."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise FewstepError("a module of a site was called without any tensor")
