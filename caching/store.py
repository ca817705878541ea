"""What a cache holds: for every stream and site the last few computed values."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from fewstep.errors import FewstepError


@dataclass
class Value:
    """The output of a site at a step: the leaves of a tree of tensors (and Nones), and the tree."""

    step: int
    leaves: list[Any]
    spec: TreeSpec
    versions: list[int | None]

    @classmethod
    def of(cls, step: int, tree: Any) -> Value:
        leaves, spec = tree_flatten(tree)
        return cls(step, leaves, spec, [_version(leaf) for leaf in leaves])

    def tree(self, leaves: list[Any] | None = None) -> Any:
        """The tree again, with other leaves where given."""
        return tree_unflatten(self.leaves if leaves is None else leaves, self.spec)

    def check(self, site: str) -> None:
        """Raises FewstepError where a tensor was written to since it was kept: what it holds is no longer the value."""
        for leaf, version in zip(self.leaves, self.versions, strict=True):
            if version is not None and leaf._version != version:
                raise FewstepError(f"the model writes in place into the value of site {site!r}, so it cannot be reused")

    def mapped(self, change: Callable[[Any], Any]) -> Value:
        """See :meth:`Cell.mapped`."""
        return Value.of(self.step, self.tree([change(leaf) for leaf in self.leaves]))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.leaves if isinstance(leaf, Tensor))


def _version(leaf: Any) -> int | None:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


@dataclass
class Cell:
    """The memory of one site in one stream.

    Attributes:
        site: its name.
        history: computed values, newest first, as many as the predictor reads.
        computed: the step at which it was last computed and kept; None while there is nothing to reuse.
        shapes: shape, dtype and device of what the site's other modules returned, by path: placeholders are made of it.
        parts: the memories of a site with several values, by the path of the module.
        scratch: what the members of the site tell each other within a call.
    """

    site: str
    history: deque[Value]
    computed: int | None = None
    shapes: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Cell] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls, site: str, depth: int) -> Cell:
        return cls(site, deque(maxlen=max(depth, 1)))

    def keep(self, step: int, tree: Any) -> None:
        """Remember a computed value. A second one of the same step replaces the first."""
        if self.history and self.history[0].step == step:
            self.history.popleft()
        self.history.appendleft(Value.of(step, tree))

    def part(self, path: str) -> Cell:
        """The memory of one of the site's values."""
        if path not in self.parts:
            self.parts[path] = Cell.empty(f"{self.site}:{path}", self.history.maxlen or 1)
        return self.parts[path]

    @property
    def newest(self) -> int:
        """The step of the last value that was kept, -1 where there is none."""
        own = self.history[0].step if self.history else -1
        return max(
            own, -1 if self.computed is None else self.computed, *(part.newest for part in self.parts.values()), -1
        )

    def mapped(self, change: Callable[[Any], Any]) -> Cell:
        """A cell that holds what ``change`` makes of every tensor: some rows of it, or it several times."""
        return Cell(
            self.site,
            deque((value.mapped(change) for value in self.history), maxlen=self.history.maxlen),
            self.computed,
            {
                path: tree_map(lambda s: s.mapped(change) if hasattr(s, "mapped") else s, t)
                for path, t in self.shapes.items()
            },
            {path: part.mapped(change) for path, part in self.parts.items()},
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(value.nbytes for value in self.history) + sum(part.nbytes for part in self.parts.values())
