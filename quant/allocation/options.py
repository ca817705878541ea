"""What there is to choose from: a few formats for each layer, with bytes, bits and damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewstep.errors import FewstepError
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.methods.base import fit
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site

KEEP = "float"
"""The choice to leave a layer in 16 bits."""


@dataclass(frozen=True)
class Option:
    """One layer in one format.

    Attributes:
        plan: of the layer; None to keep it as it is.
        bits: of a weight, scales included.
        damage: what it does to the network alone; of one unit over all layers, added up over them.
        cost: time or whatever else is limited, in the caller's unit.
    """

    plan: LayerPlan | None
    bits: float
    damage: float
    cost: float = 0.0


Table = Mapping[str, Sequence[Option]]
"""The options of every layer that has a choice."""


def parse(choice: str) -> tuple[str, str | None]:
    """``"int4:g64 x int8:row"`` -> weight and activation format; without an x activations stay as they are."""
    weight, _, activation = (part.strip() for part in choice.partition(" x "))
    if not weight:
        raise FewstepError(f"{choice!r} is no pair of formats; write 'int4:g64 x int8:row' or 'int8:row'")
    return weight, activation or None


def layer_options(site: Site, choices: Sequence[str]) -> dict[str, LayerPlan]:
    """The choices that a layer can take, groups fitted to its channels."""
    found = {}
    for choice in choices:
        weight, activation = parse(choice)
        fitted = fit(weight, site.shape[1])
        inputs = None if activation is None or site.role == "modulation" else fit(activation, site.shape[1])
        if fitted is not None and (inputs is not None or activation is None or site.role == "modulation"):
            found[choice] = LayerPlan(fitted, inputs)
    return found


def chosen_plan(base: QuantPlan, table: Table, choice: Mapping[str, int], method: str) -> QuantPlan:
    """``base`` with the chosen option of every layer."""
    return base.with_layers({name: options[choice[name]].plan for name, options in table.items()}, method)


def mean_bits(base: QuantPlan, table: Table, choice: Mapping[str, int]) -> float:
    """Mean bits a weight over the layers of the table."""
    total = sum(base.numel(name) for name in table)
    return sum(base.numel(name) * options[choice[name]].bits for name, options in table.items()) / total
