"""Configs by name, for the command line: ``"SVDQuant(rank=16)"`` -> the method."""

from __future__ import annotations

import inspect
from pathlib import Path

from fewstep.errors import FewstepError, unknown
from fewstep.quant.methods.base import Method
from fewstep.quant.plan import QuantPlan


def configs() -> dict[str, type[Method]]:
    """The methods that quantize_ takes, by name."""
    from fewstep import quant

    found = {name: getattr(quant, name) for name in quant.__all__}
    return {name: value for name, value in found.items() if inspect.isclass(value) and issubclass(value, Method)}


def make_config(text: str) -> Method | QuantPlan:
    """``"Int8"``, ``"SVDQuant(rank=16)"``, or the path of a saved plan.

    Raises:
        FewstepError: an unknown name, or options that the method refuses.
    """
    if text.endswith(".json"):
        return QuantPlan.load(Path(text))
    from fewstep.eval.sweeps.specs import call_spec

    name, options = call_spec(text, "config")
    known = configs()
    if name not in known:
        raise FewstepError(unknown("config", name, known))
    try:
        return known[name](**options)
    except TypeError as error:
        raise FewstepError(f"config {text!r} cannot be made: {error}") from None
