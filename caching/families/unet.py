"""UNets: the encoder whose skips can be kept, and the deep branches below an outer one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fewstep.caching.families.family import Family, Site, check_indices
from fewstep.caching.roles import Ghost, Output, Role

ENCODER = "encoder"


class UNetFamily(Family):
    """``UNet2DModel``, ``UNet2DConditionModel`` and what is built like them.

    Sites:
        encoder: conv_in, the down blocks and the mid block; the value is all skips and the middle. A step that reuses it
            does not look at its own sample. Faster Diffusion, arXiv 2312.09608.
        branch.b: all but the outermost ``b + 1`` skips and the ``b + 1`` last layers of the decoder; the value is the one
            feature that enters the first of these. DeepCache's branch ids, arXiv 2312.00858.
    """

    def composite(self, name: str) -> Site | None:
        if name == ENCODER:
            return Site(name, tuple(Output(path, several=True) for path in self._encoder()))
        if name.startswith("branch.") and name[7:].isdigit():
            return self._branch(name, int(name[7:]))
        return None

    def offered(self) -> list[str]:
        return [*super().offered(), ENCODER, *(f"branch.{b}" for b in range(self.branch_count)), *self.branches("any")]

    def branches(self, kind: str) -> list[str]:
        ends = {
            "attention": ("attn1",), "cross_attention": ("attn2",), "feed_forward": ("ff",), "any": ("attn1", "attn2", "ff"),
        }.get(kind, ())  # fmt: skip
        return [name for name, _ in self.model.named_modules() if name.rsplit(".", 1)[-1] in ends]

    @property
    def branch_count(self) -> int:
        """How many branches there are: every layer of the decoder but the first starts one."""
        up: Any = self.model.up_blocks
        return sum(len(block.resnets) for block in up) - 1

    def _encoder(self) -> Iterator[str]:
        yield "conv_in"
        yield from (f"down_blocks.{i}" for i in range(len(self.model.down_blocks)))  # type: ignore[arg-type]
        if getattr(self.model, "mid_block", None) is not None:
            yield "mid_block"

    def _branch(self, name: str, branch: int) -> Site:
        check_indices(name, [branch], self.branch_count, "branch")
        kept = branch + 1  # decoder layers, and skips, that stay live
        roles: list[Role] = []
        index = 1  # in the list of skips; 0 is conv_in's, which is always live
        down: Any = self.model.down_blocks
        for i, block in enumerate(down):
            path = f"down_blocks.{i}"
            layers = [f"{path}.{part}" for part in _down_layers(block)]
            # To what a block without attention returns, the model itself adds a T2I-Adapter's features, in place.
            adapted = not hasattr(block, "attentions")
            if index >= kept:
                roles.append(Ghost(path, written=adapted))
            else:
                dead = [layer for j, layer in enumerate(layers) if index + j >= kept]
                roles += [Ghost(part, written=adapted) for layer in dead for part in _with_attention(self.model, layer)]
            index += len(layers)
        if getattr(self.model, "mid_block", None) is not None:
            roles.append(Ghost("mid_block"))
        up: Any = self.model.up_blocks
        before = sum(len(block.resnets) for block in up) - kept  # decoder layers that do not run
        for i, block in enumerate(up):
            count = len(block.resnets)
            if before >= count:
                roles.append(Ghost(f"up_blocks.{i}"))
            else:
                parts = [p for j in range(before) for p in _with_attention(self.model, f"up_blocks.{i}.resnets.{j}")]
                roles += [Ghost(part) for part in parts]
            before -= count
            if before <= 0:
                break
        roles[-1] = Output(roles[-1].path)  # what it returns enters the first live layer
        return Site(name, tuple(roles))

    def example(self, batch: int = 1) -> dict[str, Any]:
        config: Any = self.model.config
        device = next(self.model.parameters()).device
        dtype = next(self.model.parameters()).dtype
        size = config.sample_size or 64
        height, width = (size, size) if isinstance(size, int) else size

        def zeros(*shape: int) -> Any:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        arguments: dict[str, Any] = {
            "sample": zeros(config.in_channels, height, width),
            "timestep": torch.zeros((), device=device, dtype=torch.int64),
        }
        if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
            arguments["class_labels"] = torch.zeros(batch, device=device, dtype=torch.int64)
        if config.get("cross_attention_dim") is not None:
            width_ = config.get("encoder_hid_dim") or config.cross_attention_dim
            arguments["encoder_hidden_states"] = zeros(77, width_ if isinstance(width_, int) else width_[0])
        if config.get("addition_embed_type") == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            arguments["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
        return arguments


def _down_layers(block: Any) -> list[str]:
    """The parts of a down block that add a skip each."""
    layers = [f"resnets.{j}" for j in range(len(block.resnets))]
    return layers + (["downsamplers.0"] if getattr(block, "downsamplers", None) else [])


def _with_attention(model: nn.Module, layer: str) -> list[str]:
    """A resnet and the attention that follows it."""
    block, kind, index = layer.rsplit(".", 2)
    attentions = getattr(model.get_submodule(block), "attentions", None)
    paired = kind == "resnets" and attentions is not None and int(index) < len(attentions)
    return [layer, f"{block}.attentions.{index}"] if paired else [layer]
