"""Methods that train what rounding starts: one trainer, and a choice of what is trained, how fast, and on which steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.formats import Format, Quantized
from fewstep.quant.formats.blocks import blocks
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.base import FLAT
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.methods.ranges import restorable
from fewstep.quant.methods.temporal import is_temporal, temporal_plan, train_temporal, with_temporal
from fewstep.quant.methods.times import input_scales, stored, with_times
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site, canonical
from fewstep.quant.views import weight_matrix

if TYPE_CHECKING:
    from fewstep.quant.training.distil import Layers, Schedule

BLOCKS = (
    "BasicTransformerBlock",
    "ResnetBlock2D",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)


@dataclass(frozen=True)
class Distilled(Nearest):
    """Start from rounded weights, then train against the float network on calibration calls.

    A quarter of the recorded samples is set apart; where what the sampler makes of them is not nearer to the float network's
    than from the start, beyond chance, the start is kept. Training needs samples: ``record(samples=32)`` without ``keep``.

    Attributes:
        iterations: of Adam. 0 leaves the start as it is.
        rate: of weights, in steps of their grid an iteration.
        trained: what of a weight is trained.
        rank: of a low-rank change.
        only: parts of layer names whose weights are trained; all where empty.
        rows: of a call's batch that an iteration looks at.
        together: calls of one iteration, of the same samples, whose errors are added up as a sampler adds them.
        late: exponent p of the chance u^p with which a call at relative time u is drawn; 0 for all alike.
        mimic: weight of the blocks' errors in the float network's principal directions.
        times: how many times have stored and trained input scales, in place of scales made at every call; 0 for the latter.
    """

    weight: str = "int4:g64"
    activation: str | None = "int4:g64"
    iterations: int = 300
    rate: float = 0.02
    trained: Literal["full", "low rank"] = "full"
    rank: int = 32
    only: tuple[str, ...] = ()
    rows: int = 8
    together: int = 4
    late: float = 0.0
    mimic: float = 0.0
    times: int = field(default=0, kw_only=True)
    inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_shortcuts:
            raise FewstepError("split layers are not trained; give split_shortcuts=False")
        for what, value, least in (
            ("iterations", self.iterations, 0), ("rows", self.rows, 1), ("together", self.together, 1),
            ("rank", self.rank, 1), ("times", self.times, 0),
        ):  # fmt: skip
            if value < least:
                raise FewstepError(f"{what} is {value}; give {least} or more")
        if self.times and self.activation is None:
            raise FewstepError("times are of input scales; give an activation format")

    # -- start --------------------------------------------------------------------------------------------------------
    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        return with_times(super().plan(model, calls), calls, self.times)

    def decide(self, site: Site) -> LayerPlan | str:
        plan = super().decide(site)
        return stored(plan) if self.times and isinstance(plan, LayerPlan) else plan

    def reads(self, site: Site) -> bool:
        return bool(self.times) and site.role not in FLAT

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        extra = input_scales(site, plan, inputs, clip=True) if plan.static else None
        return layer_arrays(site.module, plan, quantized=self.codes(site, plan), extra=extra)

    def codes(self, site: Site, plan: LayerPlan) -> Quantized | None:
        """Where training starts; None for the nearest codes."""
        return None

    # -- training -----------------------------------------------------------------------------------------------------
    def finish(self, model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> dict[str, Any]:
        if not self.iterations:
            return {}
        from fewstep.quant.training.distil import distil

        return distil(model, original, self.layers(model, original), calls, self.schedule(model))

    def schedule(self, model: nn.Module) -> Schedule:
        """How the network is trained."""
        from fewstep.quant.training.distil import Schedule

        blocks = [path for path, module in model.named_modules() if type(module).__name__ in BLOCKS]
        return Schedule(
            self.iterations, self.rate, rows=self.rows, together=self.together,
            chance=self._chance if self.late else None, features=blocks if self.mimic else (), share=0.25, mimic=self.mimic,
        )  # fmt: skip

    def layers(self, model: nn.Module, original: nn.Module) -> Layers:
        """What is trained: of the layers named by ``only`` everything, of the others their stored input scales."""
        from fewstep.quant.training.layers import Trainable

        whole, scales = Trainable(self.trained, self.rank), Trainable("none", scales=False, bias=False)
        found = {}
        trains = False
        for path, layer in model.named_modules():
            if isinstance(layer, QuantLayer):
                mine = not self.only or any(part in canonical(path) for part in self.only)
                trains |= mine
                if mine or (self.times and layer.plan.static):
                    found[path] = (original.get_submodule(path), whole if mine else scales)
        if not trains:
            raise FewstepError(f"no quantised layer has any of {', '.join(self.only)} in its name")
        return found

    def _chance(self, u: float) -> float:
        return float(max(u, 1e-3) ** self.late)


@dataclass(frozen=True)
class EfficientDM(Distilled):
    """W4A4 by a low-rank change of each weight that merges into its codes, at a rate that follows the steps of the grid.

    With ``times`` inputs have one stored scale for every so many time steps, trained too (the paper's temporal step sizes);
    without, inputs keep a scale a group and a token, made at every call, which costs a pass over them and has less error.

    Source: EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models, 2310.03270.
    """

    trained: Literal["full", "low rank"] = "low rank"
    rate: float = 0.005


@dataclass(frozen=True)
class QuEST(Distilled):
    """W4A4 by training only the layers that low bits hurt most: feed-forward, queries, and keys and values of self-attention.

    Attributes:
        embeddings: whether time embeddings are quantised too, with an input scale for every time, and trained by themselves
            first: to give back their own outputs and the network's.

    With ``times`` the stored input scales of all layers are trained. Source: QuEST: Low-bit Diffusion Model Quantization via
    Efficient Selective Finetuning, 2402.03666, sec. 4.3.
    """

    only: tuple[str, ...] = ("ff", "to_q", "attn1.to_k", "attn1.to_v", "attn.to_k", "attn.to_v")
    rate: float = 0.005
    embeddings: bool = field(default=False, kw_only=True)

    def kept(self, site: Site) -> str | None:
        return None if self.embeddings and is_temporal(site) else super().kept(site)

    def decide(self, site: Site) -> LayerPlan | str:
        return temporal_plan(self, site) if self.embeddings and is_temporal(site) else super().decide(site)

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        plan = super().plan(model, calls)
        return with_temporal(plan, calls) if self.embeddings else plan

    def reads(self, site: Site) -> bool:
        return (self.embeddings and is_temporal(site)) or super().reads(site)

    def finish(self, model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> dict[str, Any]:
        if not self.embeddings or not self.iterations:
            return super().finish(model, original, calls)
        first = train_temporal(model, original, calls, self.iterations, self.rate, with_output=True)
        return {"embeddings": first, **super().finish(model, original, calls)}


@dataclass(frozen=True)
class BinaryDM(Distilled):
    """Weights as two signs with trained scales, features mimicked in the float network's principal directions.

    Source: BinaryDM: Accurate Weight Binarization for Efficient Diffusion Models, 2404.05662. Its second basis is driven out
    of most blocks during training; here ``weight`` says how many there are.
    """

    weight: str = "bin2:g64"
    activation: str | None = "int8:row"
    mimic: float = 0.1


@dataclass(frozen=True)
class BitsFusion(Distilled):
    """Weights of 2 bits and one more level that makes the grid even, scales by alternating least squares, late steps often.

    Attributes:
        second: iterations of stage II, in which the noise that was added is the target and not the float network's guess.
            The paper adds it to images; here it is added to what the float network draws.

    Source: BitsFusion: 1.99 bits Weight Quantization of Diffusion Model, 2406.04333: balance integers and initialisation of
    sec. 4.1, both stages of sec. 4.2 with their Beta(3, 1) times. Both branches of guidance are trained, as the dropped
    texts of its stage I do. For its choice of bits see ``allocate_bits``.
    """

    weight: str = "bint2:g64"
    activation: str | None = None
    late: float = 2.0
    """The density of Beta(3, 1) is 3 u^2."""
    second: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.second < 0:
            raise FewstepError(f"second is {self.second}; give 0 or more iterations")

    def codes(self, site: Site, plan: LayerPlan) -> Quantized | None:
        return least_squares(weight_matrix(site.weight).float(), plan.weight)

    def finish(self, model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> dict[str, Any]:
        found = super().finish(model, original, calls)
        if not self.second:
            return found
        from fewstep.quant.training.distil import distil
        from fewstep.quant.training.noised import noised

        again, targets = noised(model, original, calls)
        schedule = replace(self.schedule(model), iterations=self.second, together=1)
        stage = distil(model, original, self.layers(model, original), again, schedule, targets=targets)
        return {**found, "second": stage}


def least_squares(matrix: Tensor, format: Format, rounds: int = 10) -> Quantized:
    """Codes and scales by turns, each the best for the other: s = <W, Q> / <Q, Q>. Source: 2406.04333, algorithm 1."""
    groups = format.groups(matrix.shape[1])
    scale, zero, total = format.scales(matrix)
    if zero is not None or total is not None or format.scale == "e8m0":
        return format.encode(matrix)
    best = format.encode(matrix, scale)
    for _ in range(rounds):
        codes = format.encode(matrix, scale).codes.float().reshape(len(matrix), groups, -1)
        values = blocks(matrix, groups)
        energy = codes.square().sum(-1)
        fitted = (values * codes).sum(-1) / energy.clamp(min=1)
        scale = restorable(torch.where((energy > 0) & (fitted > 0), fitted, scale), format)
        tried = format.encode(matrix, scale)
        if float((tried.decode() - matrix).norm()) < float((best.decode() - matrix).norm()):
            best = tried
    return best
