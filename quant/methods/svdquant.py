"""SVDQuant: smooth outliers into the weight, let a low-rank branch carry its large directions, quantise what is left.

Source: SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models, 2411.05007.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.formats import Format, Integer, Quantized
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays, residual
from fewstep.quant.methods.base import FLAT, SKIPPED, rounded_parts
from fewstep.quant.methods.gptq import gptq
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.methods.trial import Branch, Trial
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site
from fewstep.quant.views import weight_matrix

GELU_SHIFT = 0.171875
"""Above -min GELU(x) = 0.1700, and a short binary fraction."""


@dataclass(frozen=True)
class SVDQuant(Nearest):
    """Smoothing, a low-rank branch, and a 4-bit (or other) rest.

    With calibration data, smoothing factors and the branch are those with the least output error of each layer on its own
    inputs, both quantisers at work. Without, nothing is smoothed and the branch is of the least weight error.

    Attributes:
        weight, activation: an element (``int4``, ``int8``), then in groups of ``group_size``; or a whole format (``nvfp4``).
        rank: of the branch, at most a quarter of the smaller side of a weight.
        group_size: channels that share a scale.
        grid: migration strengths that are tried: alpha = i / grid with beta = 0 and beta = 1 - alpha.
        iterations: alternations of branch and codes at most; stopped when the error rises.
        shift: whether inputs that come from a GELU are shifted to be positive and stored unsigned.
        gptq: whether codes are chosen by GPTQ at the end.
    """

    weight: str = "int4"
    activation: str | None = "int4"
    conv_activation: str | None = None
    keep: tuple[str, ...] = SKIPPED
    rank: int = 32
    group_size: int = 64
    grid: int = 20
    iterations: int = 100
    shift: bool = True
    gptq: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, value, least in (("rank", self.rank, 0), ("grid", self.grid, 1), ("iterations", self.iterations, 1)):
            if value < least:
                raise FewstepError(f"{what} is {value}; give at least {least}")
        if self.activation is None:
            raise FewstepError("SVDQuant smooths inputs that are quantised; give an activation format")

    def reads(self, site: Site) -> bool:
        return site.role not in FLAT

    def formats(self, site: Site) -> tuple[str, str | None]:
        _, activation = super().formats(site)
        group = f":g{self.group_size}"
        own = replace_bare(self.weight, group)
        if site.role in FLAT:
            return own, None
        return own, None if activation is None else replace_bare(activation, group)

    def decide(self, site: Site) -> LayerPlan | str:
        plan = super().decide(site)
        if isinstance(plan, str) or plan.activation is None:
            return plan
        grouped = site.is_conv and getattr(site.module, "groups", 1) > 1
        return plan if grouped else replace(plan, rank=min(self.rank, min(site.rows, site.columns) // 4), smooth=True)

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        plan = super().plan(model, calls)
        changes: dict[str, LayerPlan | None] = {}
        if self.shift:
            for name, layer in plan.layers.items():
                if layer.activation is not None and after_gelu(model, name):
                    unsigned = _unsigned(layer.activation)
                    if unsigned is not None:
                        changes[name] = replace(layer, activation=unsigned, shift=GELU_SHIFT)
        return plan.with_layers(changes)

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        if plan.splits:
            return rounded_parts(site.module, plan)
        if plan.activation is None:
            return layer_arrays(site.module, plan)
        if inputs is None or not plan.smooth:
            ones = torch.ones(site.shape[1], device=weight_matrix(site.weight).device)
            branch, codes = low_rank(site.weight, plan, self.iterations)
            return layer_arrays(site.module, plan, smooth=ones if plan.smooth else None, branch=branch, quantized=codes)
        trial = Trial(site.module, plan, inputs.sample)
        smooth = search_smoothing(trial, inputs.channel_max + plan.shift, self.grid)
        branch, codes = low_rank_for(trial, smooth, self.iterations)
        if self.gptq:
            left = residual(site.weight, smooth, branch)
            better = gptq(left, plan.weight, trial.gram(trial.inputs(smooth)))
            rounded = trial.inputs(smooth)
            if trial.error(rounded, better.decode(), branch, smooth) < trial.error(
                rounded, codes.decode(), branch, smooth
            ):
                codes = better
        return layer_arrays(site.module, plan, smooth=smooth, branch=branch, quantized=codes)


def replace_bare(name: str, group: str) -> str:
    """``int4`` -> ``int4:g64``; what says its granularity already, or is a block format, stays."""
    parsed = Format.parse(name)
    return name + group if name == parsed.element.name else str(parsed)


def after_gelu(model: nn.Module, name: str) -> bool:
    """Whether a layer's input is the output of a plain GELU (a gated one, GEGLU, is not bounded below)."""
    parent, _, last = name.rpartition(".")
    if last != "2" or not parent.endswith("net"):
        return False
    first = type(model.get_submodule(f"{parent}.0")).__name__
    return first in ("GELU", "ApproximateGELU")


def _unsigned(format: Format) -> Format | None:
    kind = format.element
    if not isinstance(kind, Integer) or kind.kind != "int":
        return None
    return replace(format, element=Integer(kind.bits, "uint"))


def candidates(x_max: Tensor, w_max: Tensor, grid: int) -> Iterator[Tensor]:
    """Smoothing factors max|x|^alpha / max|w|^beta; channels that are zero somewhere have 1."""
    yield torch.ones_like(x_max)
    for i in range(1, grid):
        alpha = i / grid
        for beta in (0.0, 1 - alpha):
            factors = x_max.double().pow(alpha) / w_max.double().pow(beta)
            factors = torch.where((x_max > 0) & (w_max > 0), factors, 1.0)
            if bool(torch.isfinite(factors).all()):
                yield factors.float()


def search_smoothing(trial: Trial, x_max: Tensor, grid: int) -> Tensor:
    """The factors with the least output error, branch and both quantisers at work; (C,) float32.

    Source: the grid of deepcompressor's released runs; SVDQuant, sec. 4.2.
    """
    plan, best, least = trial.plan, torch.ones(trial.channels, device=trial.weight.device), float("inf")
    for smooth in candidates(x_max.to(trial.weight.device), trial.column_max(), grid):
        matrix = trial.weight * trial.columns(smooth)
        branch = truncated(matrix, plan.rank) if plan.rank else None
        left = matrix if branch is None else matrix - branch[1] @ branch[0]
        error = trial.error(trial.inputs(smooth), plan.weight.round(left), branch, smooth)
        if error < least:
            best, least = smooth, error
    return best


def low_rank_for(trial: Trial, smooth: Tensor, iterations: int) -> tuple[Branch | None, Quantized]:
    """Branch and codes by turns, each fitted to what the other leaves, until the output error rises."""
    plan, matrix, rounded = trial.plan, trial.weight * trial.columns(smooth), trial.inputs(smooth)

    def error(branch: Branch, codes: Quantized) -> float:
        return trial.error(rounded, codes.decode(), branch, smooth)

    if not plan.rank:
        return None, plan.weight.encode(matrix)
    return _alternate(matrix, plan, iterations, error)


def low_rank(weight: Tensor, plan: LayerPlan, iterations: int) -> tuple[Branch | None, Quantized]:
    """The same by the weight's own error."""
    matrix = weight_matrix(weight).float()

    def error(branch: Branch, codes: Quantized) -> float:
        return float((matrix - branch[1] @ branch[0] - codes.decode()).double().square().sum())

    if not plan.rank:
        return None, plan.weight.encode(matrix)
    return _alternate(matrix, plan, iterations, error)


def _alternate(
    matrix: Tensor, plan: LayerPlan, iterations: int, error: Callable[[Branch, Quantized], float]
) -> tuple[Branch, Quantized]:
    best: tuple[Branch, Quantized] | None = None
    least, codes_value = float("inf"), torch.zeros_like(matrix)
    for _ in range(iterations):
        branch = truncated(matrix - codes_value, plan.rank)
        codes = plan.weight.encode(matrix - branch[1] @ branch[0])
        codes_value = codes.decode()
        now = error(branch, codes)
        if now >= least:
            break
        best, least = (branch, codes), now
    assert best is not None
    return best


def truncated(matrix: Tensor, rank: int) -> Branch:
    """The best approximation of a rank: down (r, K) with orthonormal rows, up (N, r).

    Exact in float64 up to 512 rows or columns; beyond, randomised with 10 more directions and 4 power iterations.
    """
    if min(matrix.shape) <= 512:
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        return v[:rank].float(), (u[:, :rank] * s[:rank]).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # equal weights, equal branches
        u, s, vt = torch.svd_lowrank(matrix.float(), q=min(rank + 10, *matrix.shape), niter=4)
    return vt.T[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()
