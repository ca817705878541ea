"""Families of models, and which of them a model belongs to."""

from __future__ import annotations

from torch import nn

from fewstep.caching.families.family import OUTPUT as OUTPUT
from fewstep.caching.families.family import Family as Family
from fewstep.caching.families.family import Site as Site
from fewstep.caching.families.transformer import LISTS, TransformerFamily
from fewstep.caching.families.unet import UNetFamily
from fewstep.errors import FewstepError


def family_of(model: nn.Module) -> Family:
    """The family of a model, known by what it is made of.

    Raises:
        FewstepError: for what is no network, and for a whole model that ``torch.compile`` wrapped: its decisions would be
            compiled away.
    """
    if not isinstance(model, nn.Module):
        raise FewstepError(f"a {type(model).__name__} is no network; give one, such as pipe.unet or pipe.transformer")
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise FewstepError(
            f"{type(model).__name__} is compiled as a whole; compile its blocks instead "
            "(model.compile_repeated_blocks(), or block.compile() for each), then cache"
        )
    if all(hasattr(model, part) for part in ("conv_in", "down_blocks", "up_blocks")):
        return UNetFamily(model)
    if any(isinstance(getattr(model, name, None), nn.ModuleList) for name in LISTS):
        return TransformerFamily(model)
    return Family(model)
