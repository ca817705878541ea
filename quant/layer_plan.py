"""LayerPlan: what one layer's numbers are stored and multiplied as."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.errors import PlanError
from fewstep.quant.formats import Format, Log


@dataclass(frozen=True)
class LayerPlan:
    """One row of a :class:`~fewstep.quant.QuantPlan`.

    Attributes:
        weight: of the weight matrix (N, K); of a convolution (N, h w C).
        activation: of the inputs, None to leave them as they are. A convolution's ``row`` is a sample, its groups are of
            channels at one pixel.
        rank: of the full-precision low-rank branch beside the quantised weight, 0 for none (SVDQuant, 2411.05007, eq. 5).
        smooth: whether inputs are divided by a factor a channel, which the weight was multiplied with.
        shift: what is added to the inputs before they are quantised, undone in the bias; with an unsigned activation.
        static: whether activation scales are stored; else every call computes its own.
        times: ascending times that the network can be told, with an activation scale stored for each; a call takes those of
            the nearest. With ``static``; none for one scale at all times.
        splits: input channels at which the layer is cut into parts with formats' scales of their own (Q-Diffusion,
            2302.04304, sec. 4.2).
        first_token: whether the output of token 0 is stored, and token 0 kept out of quantisation (MixDQ, 2405.17873).
    """

    weight: Format
    activation: Format | None = None
    rank: int = 0
    smooth: bool = False
    shift: float = 0.0
    static: bool = False
    times: tuple[float, ...] = ()
    splits: tuple[int, ...] = ()
    first_token: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", Format.parse(self.weight))
        if self.activation is not None:
            object.__setattr__(self, "activation", Format.parse(self.activation))
        object.__setattr__(self, "splits", tuple(self.splits))
        object.__setattr__(self, "times", tuple(float(time) for time in self.times))
        if isinstance(self.weight.element, Log):
            raise PlanError(f"weights have signs, {self.weight} has none; it is for inputs behind a shift")
        if self.rank < 0:
            raise PlanError(f"rank is {self.rank}; give 0 or more")
        if self.activation is None and (self.static or self.shift or self.smooth):
            raise PlanError(
                "static, shift and smooth change how activations are quantised; this plan leaves them as they are"
            )
        if self.times and not self.static:
            raise PlanError("times are of stored activation scales; they need static=True")
        if any(b <= a for a, b in itertools.pairwise(self.times)):
            raise PlanError(f"times are {self.times}; give ascending numbers")
        if any(b <= a for a, b in zip((0, *self.splits), self.splits, strict=False)):
            raise PlanError(f"splits are {self.splits}; give ascending channel numbers above 0")

    def __str__(self) -> str:
        said = f"{self.weight} x {self.activation}" if self.activation else str(self.weight)
        extra = [f"rank {self.rank}"] if self.rank else []
        extra += [name for name in ("smooth", "static") if getattr(self, name)]
        extra += [f"scales at {len(self.times)} times"] if self.times else []
        extra += [f"shift {self.shift:g}"] if self.shift else []
        extra += [f"split at {', '.join(map(str, self.splits))}"] if self.splits else []
        extra += ["first token kept"] if self.first_token else []
        return ", ".join([said, *extra])

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of the weight, (rows, columns), with its scales, and of a float16 low-rank branch and smoothing factors."""
        branch = 2 * self.rank * (rows + columns)
        return self.weight.nbytes(rows, columns) + branch + 2 * columns * self.smooth

    def to_json(self) -> dict[str, Any]:
        """Only what differs from a layer with nothing but a weight format."""
        body: dict[str, Any] = {"weight": str(self.weight)}
        if self.activation is not None:
            body["activation"] = str(self.activation)
        for name, plain in _PLAIN.items():
            value = getattr(self, name)
            if value != plain:
                body[name] = list(value) if isinstance(value, tuple) else value
        return body

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> LayerPlan:
        """Read :meth:`to_json`; PlanError for unknown keys or values that cannot be."""
        if not isinstance(body, Mapping) or "weight" not in body:
            raise PlanError(f"a layer's plan is {body!r}; it needs at least a weight format")
        if unknown := sorted(set(body) - {"weight", "activation", *_PLAIN}):
            raise PlanError(f"a layer's plan has the unknown keys {', '.join(unknown)}")
        return cls(**body)


_PLAIN: dict[str, Any] = {
    "rank": 0, "smooth": False, "shift": 0.0, "static": False, "times": (), "splits": (), "first_token": False,
}  # fmt: skip
