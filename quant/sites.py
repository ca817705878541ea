"""The layers of a model that can be quantised, and what part each plays: told from diffusers' names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.eval import fingerprint
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.layers.split import QuantSplit

Role = Literal[
    "edge", "embedding", "modulation", "attention", "cross", "feedforward", "shortcut", "convolution", "projection"
]

_EDGES = (
    "conv_in",
    "conv_out",
    "proj_out",
    "proj_out_1",
    "proj_out_2",
    "x_embedder",
    "context_embedder",
    "pos_embed",
    "norm_out",
)
"""First and last layers, where they stand at the top of a model. They see and make the sample itself."""
_EMBEDDINGS = (
    "time_embedding", "time_emb_proj", "time_embed", "time_proj", "time_text_embed", "timestep_embedder", "add_embedding",
    "class_embedding", "class_embedder", "emb", "embedder", "caption_projection", "adaln_single", "text_embedder",
    "guidance_embedder", "encoder_hid_proj", "time_projection", "label_emb",
)  # fmt: skip
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class Site:
    """One layer: its name without LoRA's wrapping, where it really hangs, and its role."""

    name: str
    path: str
    module: nn.Linear | nn.Conv2d
    role: Role

    @property
    def weight(self) -> Tensor:
        """As it is, without gradient."""
        return self.module.weight.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return tuple(self.module.weight.shape)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        count = 1
        for size in self.shape[1:]:
            count *= size
        return count

    @property
    def is_conv(self) -> bool:
        return len(self.shape) == 4


def role_of(name: str, is_conv: bool) -> Role:
    """What part a layer plays, by the segments of its dotted name.

    ``edge``: first and last layers. ``embedding``: of times, classes and texts. ``modulation``: AdaLN's linear layers.
    ``cross``: attention to the text. ``shortcut``: a residual's 1 x 1 convolution. ``projection``: into and out of a
    transformer within a UNet.
    """
    parts = name.split(".")
    if parts[0] in _EDGES:
        return "edge"
    if any(part in _EMBEDDINGS for part in parts):
        return "embedding"
    if any(part.startswith("norm") for part in parts):
        return "modulation"
    if "attn2" in parts:
        return "cross"
    if any(part.startswith("attn") or part in ("to_q", "to_k", "to_v", "to_out", *_ADDED) for part in parts):
        return "attention"
    if any(part.startswith("ff") or part in ("proj_mlp", "mlp") for part in parts):
        return "feedforward"
    if parts[-1] in ("conv_shortcut", "conv_skip"):
        return "shortcut"
    if parts[-1] in ("proj_in", "proj_out"):
        return "projection"
    return "convolution" if is_conv else "feedforward"


def canonical(path: str) -> str:
    """A layer's name whether or not LoRA or torch.compile wraps it."""
    return path.replace(".base_layer", "").replace("._orig_mod", "")


def sites(model: nn.Module) -> list[Site]:
    """Every float linear layer and 2-d convolution, in the order of the modules; LoRA's own layers are none.

    Raises:
        FewstepError: for something that is no module, or a whole pipeline.
    """
    if not isinstance(model, nn.Module):
        hint = "; give a component, such as pipe.unet or pipe.transformer" if hasattr(model, "components") else ""
        raise FewstepError(f"{type(model).__name__} is no module that could be quantised{hint}")
    found = []
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, QuantLayer | QuantSplit):
            inside.append(path + ".")
        elif isinstance(module, nn.Linear | nn.Conv2d) and "lora_" not in path and not path.startswith(tuple(inside)):
            name = canonical(path)
            found.append(Site(name, path, module, role_of(name, isinstance(module, nn.Conv2d))))
    return found


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Quantised layers by their name without LoRA's wrapping; of a split one the whole, not its parts."""
    found: dict[str, nn.Module] = {}
    inside: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(inside)):
            continue
        if isinstance(module, QuantLayer | QuantSplit):
            found[canonical(path)] = module
            inside.append(path + ".")
    return found


def architecture(model: nn.Module) -> str:
    """Fingerprint of a float model's class, and of the names and shapes of its parameters; LoRA's are not in it."""
    shapes = sorted(
        [canonical(name), list(value.shape)] for name, value in model.named_parameters() if "lora_" not in name
    )
    return fingerprint.of_json([type(model).__name__, shapes])[: fingerprint.SHORT]
