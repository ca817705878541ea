"""Removed modules: the identity in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fewstep.caching.actions import Action
from fewstep.caching.roles import Forward, Moment, Role, first_tensor
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Removed(Role):
    """A module that keeps its input's shape (a resnet, a UNet's stack of transformer blocks): skipped, it returns its input."""

    reads: ClassVar[tuple[Action, ...]] = ()

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return forward(*args, **kwargs)

    def skip(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        x = first_tensor(args, kwargs)
        return (x,) if kwargs.get("return_dict") is False else x

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        raise FewstepError(f"site {at.cell.site!r} is computed or left out; reuse site {self.path!r} itself")
