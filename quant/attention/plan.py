"""AttentionPlan: what the two products of one attention are computed in, and by whom."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fewstep.errors import PlanError, unknown

Scores = Literal["int8", "fp8"]
Values = Literal["float16", "fp8", "float", "log4", "log4s8"]


@dataclass(frozen=True)
class AttentionPlan:
    """Formats of softmax(Q K^T) V.

    Attributes:
        qk: of queries and keys, ``int8`` or ``fp8`` (E4M3), a scale a block of tokens.
        pv: of probabilities and values: ``float16``, ``fp8`` (probabilities times 448, values with a scale a channel), or
            ``float``, as they come; ``log4`` or ``log4s8``, probabilities as powers of 2 or of its root in 4 bits and values as
            they come (RepQ-ViT, 2212.08254, sec. 3.4), which only the reference computes.
        smooth: whether the mean over the tokens is taken off the keys first, which the softmax does not see.
        blocks: tokens of queries and of keys that share a scale.
        backend: ``reference``; ``triton``; ``auto``, which is Triton on NVIDIA GPUs and the reference elsewhere; or one of
            diffusers' attention backends (``sage``, ``sage_hub``, ...), which have formats of their own.

    Source: SageAttention, 2410.02367, sec. 4; SageAttention2, 2411.10958, sec. 3.
    """

    qk: Scores = "int8"
    pv: Values = "float16"
    smooth: bool = True
    blocks: tuple[int, int] = (128, 64)
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.blocks, Sequence):  # lists come from files
            object.__setattr__(self, "blocks", tuple(self.blocks))
        for what, value, known in (("qk", self.qk, get_args(Scores)), ("pv", self.pv, get_args(Values))):
            if value not in known:
                raise PlanError(unknown(what, value, known))
        if (
            not isinstance(self.blocks, tuple)
            or len(self.blocks) != 2
            or any(not isinstance(size, int) or size < 1 for size in self.blocks)
        ):
            raise PlanError(f"blocks are {self.blocks}; give the tokens of queries and of keys that share a scale")

    def __str__(self) -> str:
        if self.backend not in ("auto", "reference", "triton"):
            return f"attention by {self.backend}"
        return f"{self.qk} QK, {self.pv} PV" + ("" if self.smooth else ", not smoothed")

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
            if value != getattr(AttentionPlan, name)
        }

    @classmethod
    def from_json(cls, body: Any) -> AttentionPlan:
        """Read :meth:`to_json`; PlanError for unknown keys or values that cannot be."""
        if not isinstance(body, Mapping):
            raise PlanError(f"an attention's plan is {body!r}; it is a table")
        if extra := sorted(set(body) - set(cls.__dataclass_fields__)):
            raise PlanError(f"an attention's plan has the unknown keys {', '.join(extra)}")
        try:
            return cls(**body)
        except TypeError as error:
            raise PlanError(f"an attention's plan is malformed: {error}") from None


def by_name(wanted: AttentionPlan | Mapping[str, AttentionPlan], names: Iterable[str]) -> dict[str, AttentionPlan]:
    """The plan of each attention: one for all, or by name or pattern (``*``), of which the first that matches counts.

    Raises:
        PlanError: for a name or pattern that no attention has.
    """
    there = list(names)
    if isinstance(wanted, AttentionPlan):
        wanted = {"*": wanted}
    if not isinstance(wanted, Mapping):
        raise PlanError(f"attention is {wanted!r:.60}; give an AttentionPlan, or some by name or pattern")
    for pattern in wanted:
        if not fnmatch.filter(there, pattern):
            raise PlanError(unknown("attention", pattern, there))
    found = {}
    for name in there:
        match = next((pattern for pattern in wanted if fnmatch.fnmatchcase(name, pattern)), None)
        if match is not None:
            found[name] = wanted[match]
    return found
