"""Methods that train what rounding starts: one trainer, and a choice of what is trained, how fast, and on which steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.formats import Format, Sign
from fewstep.quant.formats.blocks import blocks
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.methods.ranges import clipped
from fewstep.quant.sites import Site, canonical
from fewstep.quant.views import weight_matrix

BLOCKS = (
    "BasicTransformerBlock",
    "ResnetBlock2D",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)


@dataclass(frozen=True)
class Distilled(Nearest):
    """Start from rounded weights with clipped scales, then train against the float network's outputs on calibration calls.

    Attributes:
        iterations: of Adam, one call each. 0 leaves the start as it is.
        rate: of weights, in steps of their grid an iteration.
        trained: what of a weight is trained.
        rank: of a low-rank change.
        only: parts of layer names that are trained; all where empty.
        late: exponent p of the chance u^p with which a call at relative time u is drawn; 0 for all alike.
        mimic: weight of the blocks' errors in the float network's principal directions.
    """

    weight: str = "int4:g64"
    activation: str | None = "int4:g64"
    iterations: int = 400
    rate: float = 0.01
    trained: Literal["full", "low rank"] = "full"
    rank: int = 32
    only: tuple[str, ...] = ()
    late: float = 0.0
    mimic: float = 0.0
    inputs = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_shortcuts:
            raise FewstepError("split layers are not trained; give split_shortcuts=False")
        if self.iterations < 0:
            raise FewstepError(f"iterations is {self.iterations}; give 0 or more")

    def reads(self, site: Site) -> bool:
        return False  # it looks at whole networks, once they are assembled

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        return layer_arrays(site.module, plan, quantized=clipped(weight_matrix(site.weight).float(), plan.weight))

    def finish(self, model: nn.Module, original: nn.Module, calls: Sequence[Call]) -> dict[str, Any]:
        from fewstep.quant.training.distil import Schedule, distil
        from fewstep.quant.training.layers import Trainable

        what = Trainable(self.trained, self.rank)
        layers = {
            path: (original.get_submodule(path), what)
            for path, layer in model.named_modules()
            if isinstance(layer, QuantLayer) and self._trains(canonical(path))
        }
        if not self.iterations:
            return {}
        if not layers:
            raise FewstepError(f"no quantised layer has any of {', '.join(self.only)} in its name")
        blocks = (
            [path for path, module in model.named_modules() if type(module).__name__ in BLOCKS] if self.mimic else []
        )
        schedule = Schedule(self.iterations, self.rate, time_weight=self._chance, mimic=self.mimic)
        return distil(model, original, layers, calls, schedule, blocks)

    def _trains(self, name: str) -> bool:
        return not self.only or any(part in name for part in self.only)

    def _chance(self, u: float) -> float:
        return float(max(u, 1e-3) ** self.late)


@dataclass(frozen=True)
class EfficientDM(Distilled):
    """W4A4 by a low-rank change of each weight that merges into its codes, at a rate that follows the steps of the grid.

    Inputs keep a scale a group and a token, made at every call; the paper's learned scale for every time step is for scales
    that are stored.

    Source: EfficientDM: Efficient Quantization-Aware Fine-Tuning of Low-Bit Diffusion Models, 2310.03270.
    """

    trained: Literal["full", "low rank"] = "low rank"
    rate: float = 0.02


@dataclass(frozen=True)
class QuEST(Distilled):
    """W4A4 by training only the layers that low bits hurt most: feed-forward, queries, and keys and values of self-attention.

    Time embeddings, the paper's other choice, are not quantised here, so there is nothing to train in them.

    Source: QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning, 2402.03666, sec. 4.3.
    """

    only: tuple[str, ...] = ("ff", "to_q", "attn1.to_k", "attn1.to_v", "attn.to_k", "attn.to_v")


@dataclass(frozen=True)
class BinaryDM(Distilled):
    """Weights as two signs with trained scales, features mimicked in the float network's principal directions.

    Source: BinaryDM: Accurate Weight Binarization for Efficient Diffusion Models, 2404.05662. Its second basis is driven out
    of most blocks during training; here ``weight`` says how many there are.
    """

    weight: str = "bin2:g64"
    activation: str | None = "int8:row"
    rate: float = 0.02
    mimic: float = 0.1

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        if isinstance(plan.weight.element, Sign):
            return layer_arrays(site.module, plan)
        return super().arrays(site, plan, inputs)


@dataclass(frozen=True)
class BitsFusion(Distilled):
    """Weights of 2 bits and one more level that makes the grid even, scales by alternating least squares, late steps often.

    Source: BitsFusion: 1.99 bits Weight Quantization of Diffusion Model, 2406.04333: balance integers and initialisation of
    sec. 4.1, stage I of sec. 4.2 with its Beta(3, 1) times; its stage II wants training data. For its choice of bits see
    ``allocate_bits``.
    """

    weight: str = "bint2:g64"
    activation: str | None = None
    late: float = 2.0
    """The density of Beta(3, 1) is 3 u^2."""

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        return layer_arrays(site.module, plan, quantized=least_squares(weight_matrix(site.weight).float(), plan.weight))


def least_squares(matrix: Tensor, format: Format, rounds: int = 10) -> Any:
    """Codes and scales by turns, each the best for the other: s = <W, Q> / <Q, Q>. Source: 2406.04333, algorithm 1."""
    import torch

    from fewstep.quant.methods.ranges import restorable

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
