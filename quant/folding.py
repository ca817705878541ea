"""Smoothing for nothing: factors and centres of a layer's inputs, folded into the normalisation that makes them.

    x = n (1 + s) + t   ->   x' = (x - c) / f:    (1 + s') = (1 + s) / f,   t' = (t - c) / f,   W' = W f,   b' = b + W c

exactly, where s and t come from an AdaLN linear layer (or n's own affine), so that the network computes what it did and its
inputs and weights are easier to quantise. Nothing is divided at run time.

Source: RepQ-ViT, 2212.08254, sec. 3.3 (from scales and zero points by channel to one of the layer); SmoothQuant, 2211.10438.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import as_calls
from fewstep.quant.calibration.inputs import gather
from fewstep.quant.formats import Format
from fewstep.quant.layers.build import FLOAT_LAYERS
from fewstep.quant.methods.base import fit
from fewstep.quant.methods.svdquant import candidates
from fewstep.quant.sites import Site, sites
from fewstep.quant.state import check_untouched, evaluating, unwrapped

FOLDED = "_fewstep_folded"
_SAME = 0.02
"""Relative change of the output that half precision may make of the same network; a wrong fold makes a large one."""

_ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn.to_q", "attn.to_k", "attn.to_v")
_FOLDS: dict[tuple[str, str], tuple[tuple[int, int, int, tuple[str, ...]], ...]] = {
    # (normalisation, its class): chunks of its linear layer, which of them shift and scale, and who reads the result
    ("norm1", "AdaLayerNormZero"): ((6, 0, 1, _ATTENTION), (6, 3, 4, ("ff.net.0.proj",))),
    ("norm1_context", "AdaLayerNormZero"): (
        (6, 0, 1, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        (6, 3, 4, ("ff_context.net.0.proj",)),
    ),
    ("norm", "AdaLayerNormZeroSingle"): ((3, 0, 1, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),),
}
_AFFINE = {"norm1": _ATTENTION[:3], "norm2": ("attn2.to_q",), "norm3": ("ff.net.0.proj",)}


@dataclass(frozen=True)
class Fold:
    """A normalisation, or its AdaLN layer, and the layers that read what it makes.

    Attributes:
        source: path of the AdaLN linear layer or of the affine LayerNorm.
        chunks: parts of the linear layer's output; 0 for a LayerNorm.
        shift, scale: which parts are t and s.
        readers: paths.
    """

    source: str
    chunks: int
    shift: int
    scale: int
    readers: tuple[str, ...]


def folds(model: nn.Module) -> list[Fold]:
    """Every normalisation of the model whose factors can be folded, told from diffusers' blocks."""
    modules = dict(model.named_modules())
    found = []
    for path, module in modules.items():
        parent, _, last = path.rpartition(".")
        start = f"{parent}." if parent else ""

        def readers(names: Sequence[str], start: str = start) -> tuple[str, ...]:
            return tuple(start + n for n in names if isinstance(modules.get(start + n), FLOAT_LAYERS))

        if isinstance(getattr(getattr(module, "linear", None), "bias", None), Tensor):
            for chunks, shift, scale, names in _FOLDS.get((last, type(module).__name__), ()):
                if mine := readers(names):
                    found.append(Fold(f"{path}.linear", chunks, shift, scale, mine))
        plain = type(module) is nn.LayerNorm and module.elementwise_affine and module.bias is not None
        known = plain and getattr(modules.get(parent), "norm_type", None) == "layer_norm"
        if known and (mine := readers(_AFFINE.get(last, ()))):
            found.append(Fold(path, 0, 0, 0, mine))
    return found


def fold_smoothing_(
    module: nn.Module,
    calibration: Any,
    *,
    weight: str = "int4:g64",
    activation: str = "int4:g64",
    grid: int = 20,
    centre: bool = False,
    rows: int = 1024,
    keep_originals: bool = True,
) -> dict[str, float]:
    """Fold smoothing factors into the normalisations of a float network, in place; it computes what it did.

    Layers that read the same normalisation share their factors. Of the grid of SVDQuant's candidates each normalisation gets
    those with the least output error of its readers in the formats that are meant to follow.

    Args:
        module: a float network whose blocks have AdaLN layers of their own (DiT, SD3, Flux) or affine LayerNorms (UNets).
        calibration: its calls, see :func:`~fewstep.quant.record`.
        weight, activation: formats that the network will be quantised to.
        grid: migration strengths that are tried, as for :class:`~fewstep.quant.SVDQuant`.
        centre: whether the middle of each channel's range is taken off too, where all readers have a bias for it.
        rows: of each layer's inputs that are looked at.
        keep_originals: keep the weights beside for :func:`unfold_smoothing_`.

    Returns:
        For each normalisation the readers' output error, as a part of what it was before.

    Raises:
        FewstepError: a network that is quantised or folded already, has nothing to fold into, or is another one afterwards
            because something else reads its normalisations (it is put back); no calibration.
    """
    model, calls = unwrapped(module), as_calls(calibration)
    check_untouched(model)
    if hasattr(model, FOLDED):
        raise FewstepError("smoothing is folded into the network already; unfold_smoothing_ first")
    if not calls:
        raise FewstepError("smoothing factors follow from what layers see; give calibration, see quant.record")
    if grid < 1:
        raise FewstepError(f"grid is {grid}; give at least 1")
    for format in (weight, activation):
        Format.parse(format)
    there = folds(model)
    if not there:
        raise FewstepError(
            f"{type(model).__name__} has no block whose normalisation is its own; give SVDQuant, which divides at run time"
        )
    named = {site.path: site for site in sites(model)}
    first = {fold.readers[0]: fold for fold in there}
    kept: dict[str, Tensor] = {}
    report = {}
    with evaluating(model), torch.no_grad():
        solved = {}
        for site, inputs in gather(model, [named[path] for path in first], calls, rows=rows):
            fold = first[site.path]
            x = inputs.sample.to(site.weight.device)
            solved[site.path] = _searched(x, [named[p] for p in fold.readers], (weight, activation), grid, centre)
        call = calls[0].to(next(model.parameters()).device)
        before = call.run(model).float()
        try:
            for path, fold in first.items():
                factors, middle, error = solved[path]
                _fold(model, fold, factors, middle, kept)
                report[fold.source if not fold.chunks else f"{fold.source}[{fold.scale}]"] = error
            moved = float((call.run(model).float() - before).norm() / before.norm().clamp(min=1e-30))
            if not moved < _SAME:
                raise FewstepError(
                    f"{type(model).__name__} does not compute what it did with smoothing folded in (off by {moved:.1%}): "
                    "something else reads its normalisations"
                )
        except BaseException:
            _put_back(model, kept)
            raise
    setattr(model, FOLDED, kept if keep_originals else {})
    return report


def unfold_smoothing_(module: nn.Module) -> bool:
    """Every bit as before :func:`fold_smoothing_`; whether anything was folded.

    Raises:
        FewstepError: for a quantised network, or where the originals were not kept.
    """
    model = unwrapped(module)
    kept: dict[str, Tensor] | None = getattr(model, FOLDED, None)
    if kept is None:
        return False
    check_untouched(model)
    if not kept:
        raise FewstepError("the weights before folding were not kept (keep_originals=False)")
    _put_back(model, kept)
    delattr(model, FOLDED)
    return True


def _put_back(model: nn.Module, kept: dict[str, Tensor]) -> None:
    for name, value in kept.items():
        parameter = model.get_parameter(name)
        parameter.data = value.to(parameter)


def _searched(
    x: Tensor, readers: Sequence[Site], formats: tuple[str, str], grid: int, centre: bool
) -> tuple[Tensor, Tensor, float]:
    """Factors and middle (C,) of inputs (M, C), and the error with them as a part of that without."""
    wanted, act = (fit(format, x.shape[1]) for format in formats)
    middle = torch.zeros(x.shape[1], device=x.device)
    ones = torch.ones_like(middle)
    if wanted is None or act is None:
        return ones, middle, 1.0
    weights = [site.weight.float() for site in readers]

    def error(factors: Tensor, c: Tensor) -> float:
        rounded = act.round((x - c) / factors)
        return sum(
            float(((rounded @ wanted.round(w * factors).T) - (x - c) @ w.T).double().square().sum()) for w in weights
        )

    centres = [middle]
    if centre and all(site.module.bias is not None for site in readers):
        centres.append((x.amax(0) + x.amin(0)) / 2)
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    start = error(ones, middle)
    best = (start, ones, middle)
    for c in centres:
        for factors in candidates((x - c).abs().amax(0), largest, grid):
            factors = factors / factors.log().mean().exp()  # so that the normalisation's numbers stay of their size
            best = min(best, (error(factors, c), factors, c), key=lambda entry: entry[0])
    return best[1], best[2], best[0] / max(start, 1e-300)


def _fold(model: nn.Module, fold: Fold, factors: Tensor, middle: Tensor, kept: dict[str, Tensor]) -> None:
    def change(path: str, value: Tensor) -> None:
        parameter = model.get_parameter(path)
        kept.setdefault(path, parameter.detach().clone())
        parameter.data = value.to(parameter)

    source = model.get_submodule(fold.source)
    weight, bias = (getattr(source, name).detach().double() for name in ("weight", "bias"))
    f, c = factors.double(), middle.double()
    if not fold.chunks:
        weight, bias = weight / f, (bias - c) / f
    else:
        size = len(weight) // fold.chunks
        t, s = (slice(i * size, (i + 1) * size) for i in (fold.shift, fold.scale))
        weight, bias = weight.clone(), bias.clone()
        weight[t], weight[s] = weight[t] / f[:, None], weight[s] / f[:, None]
        bias[t], bias[s] = (bias[t] - c) / f, (bias[s] + 1) / f - 1
    change(f"{fold.source}.weight", weight)
    change(f"{fold.source}.bias", bias)
    for path in fold.readers:
        reader: Any = model.get_submodule(path)
        w = reader.weight.detach().double()
        if bool(c.any()):
            change(f"{path}.bias", reader.bias.detach().double() + w @ c)
        change(f"{path}.weight", w * f)
