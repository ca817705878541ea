"""Tiny random networks of every family that caches know, and trajectories of calls as pipelines make them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep import caching
from fewstep.caching.families import family_of
from tests.eval_fixtures import tiny_unet

STEPS = 4
ROUNDING = 1e-5
"""Reuse of a range of blocks adds a residual to its input: x + (F(x) - x) is F(x) but for a rounding of 2^-24 of the larger
term, and the layers behind it may make that grow. This allows for a growth by a hundred; what reuse of a wrong value does on
these networks is 1e-2 and more."""


@dataclass(frozen=True)
class Tiny:
    """A network and how it is called.

    Attributes:
        name: for messages of tests.
        build: makes it; random weights of the current seed.
        shape: of one sample.
        conditions: shapes (or a number of classes) of the conditioning of one sample, by argument.
        fixed: arguments that are the same for all samples.
        unit_time: whether timesteps are handed over divided by 1000, as new tensors (Flux).
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    conditions: dict[str, Any]
    fixed: Callable[[int], dict[str, Any]] = lambda batch: {}
    unit_time: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().eval()

    def sample(self, batch: int = 2, seed: int = 1, shape: tuple[int, ...] | None = None) -> Tensor:
        return torch.randn(batch, *(shape or self.shape), generator=torch.Generator().manual_seed(seed))

    def conditioning(self, batch: int = 2, seed: int = 2) -> dict[str, Any]:
        """Arguments that tell what is drawn; made once a trajectory, as pipelines do."""
        generator = torch.Generator().manual_seed(seed)

        def made(shape: Any) -> Any:
            if isinstance(shape, dict):
                return {name: made(inner) for name, inner in shape.items()}
            if isinstance(shape, int):
                return torch.randint(shape, (batch,), generator=generator)
            return torch.randn(batch, *shape, generator=generator)

        return {**{name: made(shape) for name, shape in self.conditions.items()}, **self.fixed(batch)}

    def call(self, model: nn.Module, x: Tensor, t: Any, conditioning: dict[str, Any]) -> Tensor:
        if isinstance(t, Tensor):
            t = t.expand(len(x))
            t = t / 1000 if self.unit_time else t
        out: Tensor = model(x, timestep=t, return_dict=False, **conditioning)[0]
        return out


def timesteps(steps: int = STEPS) -> Tensor:
    """Falling, integer, on one storage, as ``scheduler.timesteps``."""
    return torch.linspace(900, 100, steps).round().to(torch.int64)


@torch.no_grad()
def trajectory(
    tiny: Tiny,
    model: nn.Module,
    streams: Sequence[dict[str, Any]],
    times: Sequence[Any] | Tensor | None = None,
    contexts: Sequence[str] | None = None,
    x: Tensor | None = None,
    move: float = 0.2,
) -> list[Tensor]:
    """Calls along a trajectory, one a stream and step; every output. The sample follows the mean of the streams.

    Args:
        streams: conditioning of each.
        contexts: names under which the streams' calls are announced, as pipelines with cache contexts do.
        move: how far the sample goes along the output.
    """
    x = tiny.sample() if x is None else x
    outputs = []
    for t in timesteps() if times is None else times:
        found = []
        for index, conditioning in enumerate(streams):
            with announced(model, contexts[index]) if contexts else nullcontext():
                found.append(tiny.call(model, x, t, conditioning))
        outputs += found
        mean = torch.stack(found).mean(0)
        channel = next(i for i in range(1, x.ndim) if mean.shape[i] != x.shape[i]) if mean.shape != x.shape else 1
        x = x - move * mean.narrow(channel, 0, x.shape[channel])
    return outputs


def announced(model: nn.Module, name: str) -> Any:
    """The cache context of the model; networks without one are told through diffusers' own function."""
    from contextlib import contextmanager

    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    @contextmanager
    def context():
        _set_cache_context(model, CacheContext(name=name))
        try:
            yield
        finally:
            _set_cache_context(model, None)

    return model.cache_context(name) if hasattr(model, "cache_context") else context()


def _unet2d() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def unet_condition(**options: Any) -> nn.Module:
    """UNet2DConditionModel as in Stable Diffusion: attention where the maps are large, none below."""
    given = {
        "cross_attention_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return tiny_unet(**{**given, **options})


def _sdxl() -> nn.Module:
    return unet_condition(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
    )


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=3, num_attention_heads=2,
        attention_head_dim=8, num_embeds_ada_norm=1000,
    )  # fmt: skip


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=3, num_attention_heads=2,
        attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
    )  # fmt: skip


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=8,
    )  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _flux_ids(batch: int) -> dict[str, Any]:
    rows = torch.arange(16)
    return {"img_ids": torch.stack([0 * rows, rows // 4, rows % 4], 1).float(), "txt_ids": torch.zeros(3, 3)}


def _cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4, text_embed_dim=8,
        num_layers=3, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=3,
    )  # fmt: skip


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32,
        num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip


NO_SIZE = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
TEXT = {"encoder_hidden_states": (3, 8)}
POOLED = {"encoder_hidden_states": (3, 16), "pooled_projections": (8,)}
TINY = {
    tiny.name: tiny
    for tiny in (
        Tiny("unet2d", _unet2d, (3, 8, 8), {}),
        Tiny("sd", unet_condition, (4, 8, 8), TEXT),
        Tiny("sdxl", _sdxl, (4, 8, 8), {**TEXT, "added_cond_kwargs": {"text_embeds": (8,), "time_ids": (6,)}}),
        Tiny("dit", _dit, (4, 8, 8), {"class_labels": 1000}),
        Tiny("pixart", _pixart, (4, 8, 8), TEXT, lambda batch: NO_SIZE),
        Tiny("sd3", _sd3, (4, 8, 8), POOLED),
        Tiny("flux", _flux, (16, 4), POOLED, _flux_ids, unit_time=True),
        Tiny("cogvideox", _cogvideox, (2, 4, 8, 8), TEXT),
        Tiny("wan", _wan, (4, 2, 8, 8), TEXT),
    )
}
UNETS = ("unet2d", "sd", "sdxl")
TRANSFORMERS = tuple(name for name in TINY if name not in UNETS)


def decided(controller: Any, site: int = 0) -> str:
    """What was done at a site, a letter a step: Computed, Reused, Skipped."""
    rows = controller.report().decisions()["decisions"]
    return "".join("CRS~"[row[site]] for row in rows)


@torch.no_grad()
def inputs_along(tiny: Tiny, model: nn.Module, conditioning: dict[str, Any], times: Any) -> list[Tensor]:
    """The samples at which :func:`trajectory` calls the model as it is now."""
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trajectory(tiny, model, [conditioning], times)
    handle.remove()
    return seen


@torch.no_grad()
def seen_by(module: nn.Module, tiny: Tiny, model: nn.Module, conditioning: dict[str, Any], x: Tensor, t: Any) -> Tensor:
    """The first tensor that goes into a module, on a call of the model without a cache."""
    found: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    tiny.call(model, x, t, conditioning)
    handle.remove()
    return found[0]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """All blocks of a transformer in order."""
    names = ("transformer_blocks", "single_transformer_blocks", "blocks")
    return [block for name in names for block in getattr(model, name, ())]


def site_names(model: Any) -> list[str]:
    """One of each kind of site that the model's family offers."""
    family = family_of(model)
    kinds = ("attention", "cross_attention", "feed_forward", "fused")
    branches = [branches[-1] for kind in kinds if (branches := family.branches(kind))]
    whole = (
        ["encoder", "branch.0", "branch.1"]
        if hasattr(model, "down_blocks")
        else ["blocks", "blocks[1:]", "blocks[:-1]"]
    )
    return ["output", *whole, *branches]


def plan_of(site: str, actions: str = "CR" * 10, steps: int = STEPS) -> caching.CachePlan:
    """A plan of one site, a letter a step."""
    numbers = {"C": caching.Action.COMPUTE, "R": caching.Action.REUSE}
    return caching.CachePlan((site,), np.array([[numbers[a]] for a in actions[:steps]]))


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all are equal, bit for bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
