"""What a quantised network remembers, and how layers are hung in and out of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from fewstep.errors import FewstepError
from fewstep.quant.attention.install import paused, remove
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import canonical, quantized_layers, sites

RECORD = "_fewstep_quant"


@dataclass
class Record:
    """What a quantised network remembers of itself.

    Attributes:
        plan: its formats.
        originals: the float layers by name, where they were kept.
    """

    plan: QuantPlan
    originals: dict[str, nn.Module]


def plan_of(module: nn.Module) -> QuantPlan | None:
    """The plan that a network was quantised by, None for a float one."""
    record: Record | None = getattr(unwrapped(module), RECORD, None)
    return None if record is None else record.plan


def unwrapped(module: Any) -> nn.Module:
    """The network within what ``torch.compile`` made of it; FewstepError for something that is no network."""
    model = getattr(module, "_orig_mod", module)
    if not isinstance(model, nn.Module):
        hint = "; give a component, such as pipe.unet or pipe.transformer" if hasattr(module, "components") else ""
        raise FewstepError(f"{type(module).__name__} is no network that could be quantised{hint}")
    return model


def check_untouched(model: nn.Module) -> None:
    """Raises FewstepError for a network that is quantised already, or whose layers are offloaded or cached one by one."""
    if layers := quantized_layers(model):
        raise FewstepError(f"{type(model).__name__} has {len(layers)} quantised layers already; dequantize_ it first")
    if getattr(model, RECORD, None) is not None:
        raise FewstepError(f"{type(model).__name__} has attentions in 8 bits already; dequantize_ it first")
    for site in sites(model):
        if getattr(site.module, "_hf_hook", None) is not None:
            raise FewstepError(f"{site.name} has an offload hook; quantise first, then enable offloading")
        if "forward" in vars(site.module):
            raise FewstepError(f"{site.name} has a hook around it, such as a cache's; quantise first, then put that on")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, as before after."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def swap(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Hang ``layers`` in by name; what hung there before is returned."""
    paths = {canonical(path): path for path, _ in model.named_modules()}
    before = {}
    for name, layer in layers.items():
        parent, _, last = paths[name].rpartition(".")
        holder = model.get_submodule(parent)
        before[name] = holder._modules[last]
        holder._modules[last] = layer
    return before  # type: ignore[return-value]


@contextmanager
def float_inside(model: nn.Module, record: Record) -> Iterator[None]:
    """The network itself is the float one inside: its layers, its attentions, no correction. Quantised again after."""
    from fewstep.quant.correction import without_correction

    with without_correction(model):
        layers = swap(model, record.originals)
        try:
            with paused(model):
                yield
        finally:
            swap(model, layers)


@contextmanager
def twin(model: nn.Module, record: Record) -> Iterator[nn.Module]:
    """The float network beside the quantised one: a copy of the modules' skeleton that shares every parameter."""
    memo: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    memo |= {id(layer): layer for layer in quantized_layers(model).values()}
    memo |= {id(record): None}
    original = copy.deepcopy(model, memo)
    remove(original)
    swap(original, record.originals)
    yield original
