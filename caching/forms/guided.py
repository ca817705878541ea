"""Guidance as a site: the unconditional half of a call is computed, made of the conditional one, or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fewstep.caching.roles import Fit, Forward, Moment, Role, first_tensor
from fewstep.caching.rows import Rows
from fewstep.errors import FewstepError

SEPARATE = ("cond", "uncond")
"""Names of diffusers' cache contexts where guidance is two calls."""


@dataclass(frozen=True)
class Guided(Role):
    """A module whose batch is [uncond, cond], or the other way round; the value is the difference d = cond - uncond.

    Computed, all rows run. Reused, the conditional rows run and the others are cond - d. Skipped, the conditional rows run
    and stand for both. Modules inside see the smaller batch, and what is kept of them is cut to it.

    Where a pipeline makes two calls, in contexts named ``cond`` and ``uncond``, the first is remembered, and the second
    does not run unless it is computed.

    Attributes:
        first: whether the conditional half is the first one.
    """

    first: bool = False
    wraps: ClassVar[bool] = True

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = forward(*args, **kwargs)
        if at.scene.stream in SEPARATE:
            if at.scene.stream == "cond":
                at.scene.shared[self.path] = (at.step, out)
            elif at.keep:
                at.cell.keep(at.step, _difference(self._conditional(at), out))
        elif at.scene.rows is None:
            rows, other = self._halves(at, args, kwargs)
            if at.keep:
                at.cell.keep(at.step, _difference(_take(rows, out), _take(other, out)))
        return out

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self._conditional_only(at, forward, args, kwargs, at.predict)

    def skip(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self._conditional_only(at, forward, args, kwargs, lambda: None)

    def teach(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], fit: Fit) -> Any:
        out = forward(*args, **kwargs)
        if at.scene.stream == "cond" or at.scene.rows is not None:
            at.scene.shared[self.path] = (at.step, out)
            return out
        if at.scene.stream == "uncond":
            given = self._conditional(at)
            return _minus(given, fit(at.cell, at.step, _difference(given, out)))
        rows, other = self._halves(at, args, kwargs)
        given = _take(rows, out)
        return self._join(given, _minus(given, fit(at.cell, at.step, _difference(given, _take(other, out)))))

    def _conditional_only(
        self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], delta: Any
    ) -> Any:
        if at.scene.stream == "uncond":
            return _minus(self._conditional(at), delta())
        if at.scene.stream == "cond" or at.scene.rows is not None:  # there is but the conditional half
            out = forward(*args, **kwargs)
            at.scene.shared[self.path] = (at.step, out)
            return out
        rows, _ = self._halves(at, args, kwargs)
        part_args, part_kwargs = rows.arguments(args, kwargs)
        at.scene.rows = rows
        try:
            given = forward(*part_args, **part_kwargs)
        finally:
            at.scene.rows = None
        return self._join(given, _minus(given, delta()))

    def _join(self, given: Any, other: Any) -> Any:
        a, spec = tree_flatten(given)
        b, _ = tree_flatten(other)
        pairs = zip(a, b, strict=True)
        return tree_unflatten(
            [torch.cat((x, y) if self.first else (y, x)) if isinstance(x, Tensor) else x for x, y in pairs], spec
        )

    def _conditional(self, at: Moment) -> Any:
        """This step's conditional output."""
        step, out = at.scene.shared.get(self.path, (None, None))
        if step != at.step:
            raise FewstepError(
                f"site {at.cell.site!r} makes the unconditional output of the conditional one, which has to be called "
                "first at every step; this pipeline calls them in another order"
            )
        return out

    def _halves(self, at: Moment, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Rows, Rows]:
        """The conditional rows and the others."""
        value = first_tensor(args, kwargs)
        batch = value.shape[0]
        problem = None
        if batch % 2:
            problem = f"a batch of {batch}"
        elif not self.path and "guided" not in at.scene.shared and not value.is_meta:
            if not torch.equal(value[: batch // 2], value[batch // 2 :]):  # one look a trajectory
                problem = f"a batch of {batch} whose halves are different samples"
            at.scene.shared["guided"] = True
        if problem:
            raise FewstepError(
                f"site {at.cell.site!r} needs guidance in one call, every sample twice; the network was called with {problem}"
            )
        halves = Rows(0, batch // 2, batch), Rows(batch // 2, batch, batch)
        return halves if self.first else (halves[1], halves[0])


def _take(rows: Rows, out: Any) -> Any:
    leaves, spec = tree_flatten(out)
    return tree_unflatten([rows.of(leaf) for leaf in leaves], spec)


def _difference(given: Any, other: Any) -> list[Any]:
    """Leaf by leaf; None for what is no tensor."""
    pairs = zip(tree_flatten(given)[0], tree_flatten(other)[0], strict=True)
    return [a - b if isinstance(a, Tensor) else None for a, b in pairs]


def _minus(given: Any, delta: Sequence[Any] | None) -> Any:
    if delta is None:
        return given
    leaves, spec = tree_flatten(given)
    return tree_unflatten([a - d if isinstance(a, Tensor) else a for a, d in zip(leaves, delta, strict=True)], spec)
