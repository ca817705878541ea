"""What the first attention of a block sees: its input, normalised and modulated by the time. A signal for online decisions.

A block computes it first and does not hand it out; the few lines by which each class of blocks makes it are repeated here,
for a norm's work a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from torch import Tensor

from fewstep.caching.roles import first_tensor

Arguments = Mapping[str, Any]


def _basic(block: Any, given: Arguments) -> Tensor | None:
    x, time = given["hidden_states"], given.get("timestep")
    if block.norm_type == "ada_norm_zero":
        out: Tensor = block.norm1(x, time, given.get("class_labels"), hidden_dtype=x.dtype)[0]
        return out
    if block.norm_type == "ada_norm_single" and time is not None:
        return _shifted(block, x, block.scale_shift_table[None] + time.reshape(len(x), 6, -1))
    return None  # its norm does not know the time


def _joint(block: Any, given: Arguments) -> Tensor:
    out: Tensor = block.norm1(given["hidden_states"], emb=given["temb"])[0]
    return out


def _cogvideox(block: Any, given: Arguments) -> Tensor:
    out: Tensor = block.norm1(given["hidden_states"], given["encoder_hidden_states"], given["temb"])[0]
    return out


def _wan(block: Any, given: Arguments) -> Tensor | None:
    if given["temb"].ndim != 3:
        return None  # a time for every token (Wan 2.2's 5B)
    return _shifted(block, given["hidden_states"].float(), block.scale_shift_table + given["temb"].float())


def _shifted(block: Any, x: Tensor, table: Tensor) -> Tensor | None:
    if table.is_meta and not x.is_meta:
        return None  # the block's own parameters are offloaded until it runs
    shift, scale = table.chunk(6, dim=1)[:2]
    out: Tensor = block.norm1(x) * (1 + scale) + shift
    return out


MODULATED: dict[str, Callable[[Any, Arguments], Tensor | None]] = {
    "BasicTransformerBlock": _basic,
    "JointTransformerBlock": _joint,
    "FluxTransformerBlock": _joint,
    "CogVideoXBlock": _cogvideox,
    "WanTransformerBlock": _wan,
}
TIMES = ("temb", "timestep", "emb")
"""Arguments of blocks that carry the embedded time."""


def arguments_of(block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A block's arguments by name."""
    names = list(signature(type(block).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def modulated_input(block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The modulated input of a block that is about to be called; its plain input where the class has no modulation."""
    make = MODULATED.get(type(block).__name__)
    made = make(block, arguments_of(block, args, kwargs)) if make else None
    return plain_input(block, args, kwargs) if made is None else made


def embedded_time(block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The embedding of the time that a block is given; its plain input where it is given none."""
    given = arguments_of(block, args, kwargs)
    found = next((given[name] for name in TIMES if isinstance(given.get(name), Tensor)), None)
    return plain_input(block, args, kwargs) if found is None or not found.is_floating_point() else found


def plain_input(block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor that a module is called with."""
    return first_tensor(args, kwargs)
