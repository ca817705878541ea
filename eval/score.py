"""One number and what is needed to know what it means."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Score:
    """A metric's value together with its recipe; ``float(score)`` is the value.

    Two values may be compared only where their recipes say the same net, rounding, N and reference.

    Attributes:
        value: the number, float64.
        recipe: how it was made, for example ``fid[fashion, u8=round, N=500, ref=sha256:abcd1234]``.
        n: how many images it was made from.
        per_sample: the values of the single images, float64 of shape (n,), where the metric has them.
    """

    value: float
    recipe: str
    n: int
    per_sample: npt.NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} {self.recipe}"


def recipe(metric: str, *parts: str) -> str:
    """The provenance string of a number: ``metric[part, part, ...]``, empty parts left out."""
    return f"{metric}[{', '.join(part for part in parts if part)}]"
