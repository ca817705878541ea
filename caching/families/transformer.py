"""Transformers: ranges of their blocks, and the branches inside each."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from fewstep.caching.families.family import Family, Site
from fewstep.caching.roles import Block, Ghost, Output, Role, Streams
from fewstep.errors import FewstepError

LISTS = (
    "transformer_blocks", "single_transformer_blocks", "blocks", "layers", "visual_transformer_blocks",
    "temporal_transformer_blocks",
)  # fmt: skip
"""Diffusers' names for lists of blocks, in the order in which they run."""
BRANCHES = {
    "attention": ("attn1", "attn", "self_attn"),
    "cross_attention": ("attn2", "cross_attn"),
    "feed_forward": ("ff", "ffn", "ff_context", "mlp"),
    "fused": ("proj_out",),
}
_RANGE = re.compile(r"blocks(?:\[(-?\d*):(-?\d*)\])?")


class TransformerFamily(Family):
    """DiT, PixArt, SD3, Flux, CogVideoX, Wan, and any model with a list of blocks whose streams diffusers knows.

    Sites:
        blocks[a:b]: a range of the blocks, all lists of them counted as one, in Python's notation (``blocks`` for all).
            The value is the residual of every stream.
        path of a module in a block: its output, which is taken before the block's gate; that of a single-stream block's
            ``proj_out`` stands for the attention and the perceptron which it merges.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.paths = [f"{name}.{i}" for name in LISTS if (blocks := _list(model, name)) for i in range(len(blocks))]
        if not self.paths:
            raise FewstepError(
                f"{type(model).__name__} has no list of blocks ({', '.join(LISTS)}); only its site 'output' can be cached"
            )

    @property
    def _in_turns(self) -> bool:
        """Whether a block of one list follows on each of another, as in Latte, and not a whole list on another."""
        return any(path.startswith("temporal_") for path in self.paths)

    def composite(self, name: str) -> Site | None:
        match = _RANGE.fullmatch(name)
        if match:
            return self._range(name, match)
        head, _, tail = name.rpartition(".")
        if tail == "proj_out" and head in self.paths and hasattr(self.model.get_submodule(head), "proj_mlp"):
            parts = [p for p in ("attn", "proj_mlp", "act_mlp") if hasattr(self.model.get_submodule(head), p)]
            return Site(name, (*(Ghost(f"{head}.{part}") for part in parts), Output(name)))
        return None

    def offered(self) -> list[str]:
        return [
            *super().offered(),
            *([] if self._in_turns else [f"blocks[0:{len(self.paths)}]"]),
            *(b for kind in BRANCHES for b in self.branches(kind)),
        ]

    def branches(self, kind: str) -> list[str]:
        """Paths of one kind of branch, in order; ``fused`` are the single-stream blocks that merge two."""
        found = []
        for path in self.paths:
            block = self.model.get_submodule(path)
            fused = hasattr(block, "proj_mlp")
            if fused and kind != "fused":
                continue
            found += [
                f"{path}.{name}"
                for name in BRANCHES[kind]
                if isinstance(getattr(block, name, None), nn.Module) and (kind != "fused" or fused)
            ]
        return found

    def _range(self, name: str, match: re.Match[str]) -> Site:
        if self._in_turns:
            raise FewstepError(
                f"blocks of {self.name} for space and for time take turns, with tokens rearranged between: {name!r} has no "
                "residual; cache what is inside the blocks (FORA, TaylorSeer, PyramidBroadcast), or one by its path"
            )
        count = len(self.paths)
        begin, end, _ = slice(*(int(text) if text else None for text in match.groups())).indices(count)
        if not begin < end:
            raise FewstepError(f"site {name!r} is empty; {self.name} has blocks[0:{count}]")
        paths = self.paths[begin:end]
        roles: list[Role] = [
            Block(path, streams_of(self.model.get_submodule(path)), path == paths[0], path == paths[-1])
            for path in paths
        ]
        return Site(name, tuple(roles))

    def example(self, batch: int = 1) -> dict[str, Any]:
        from fewstep.caching.families.examples import EXAMPLES

        if self.name not in EXAMPLES:
            return super().example(batch)
        parameter = next(self.model.parameters())

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, device=parameter.device, dtype=parameter.dtype)

        return EXAMPLES[self.name](self.model.config, batch, zeros)


def streams_of(block: nn.Module) -> Streams:
    """How a block takes and returns its streams, from diffusers' registry of block classes.

    Raises:
        FewstepError: for a class that is not registered.
    """
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        known = TransformerBlockRegistry.get(type(block))
    except ValueError:
        raise FewstepError(
            f"blocks of class {type(block).__name__} are not known to diffusers' TransformerBlockRegistry; register "
            "what they return there, or cache the modules inside them by path"
        ) from None
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    pairs = [
        (known.hidden_states_argument_name, known.return_hidden_states_index),
        (known.encoder_hidden_states_argument_name, known.return_encoder_hidden_states_index),
    ]
    present = [(name, index) for name, index in pairs if index is not None and name in names]
    single = len(present) == 1  # such a block returns the tensor itself
    return Streams(
        tuple(name for name, _ in present),
        tuple(names.index(name) for name, _ in present),
        () if single else tuple(index for _, index in present),
    )


def _list(model: nn.Module, name: str) -> nn.ModuleList | None:
    found = getattr(model, name, None)
    return found if isinstance(found, nn.ModuleList) and len(found) else None
