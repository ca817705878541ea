"""From a float layer to its quantised one, and back."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.formats import Format, Quantized
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.layers.conv import GEOMETRY, QuantConv2d
from fewstep.quant.layers.linear import QuantLinear
from fewstep.quant.layers.split import QuantSplit
from fewstep.quant.views import weight_matrix

FLOAT_LAYERS = (nn.Linear, nn.Conv2d)


def residual(weight: Tensor, smooth: Tensor | None = None, branch: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """What is left to quantise: the weight matrix (N, K), times the smoothing factors, less the low-rank branch; float32.

    Args:
        weight: of a linear layer or a convolution.
        smooth: (C,) a factor a channel.
        branch: down (r, K) and up (N, r), of the smoothed matrix.
    """
    matrix = weight_matrix(weight.detach()).float()
    if smooth is not None:
        matrix = matrix * smooth.float().repeat(matrix.shape[1] // smooth.shape[0])
    return matrix if branch is None else matrix - branch[1].float() @ branch[0].float()


def layer_arrays(
    layer: nn.Module,
    plan: LayerPlan,
    *,
    smooth: Tensor | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
    quantized: Quantized | None = None,
    bias: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The arrays of ``layer`` quantised by ``plan``.

    Args:
        layer: a linear layer or a convolution, with its weight.
        smooth: (C,) factors that inputs are divided by.
        branch: down (r, K) and up (N, r) of the smoothed weight matrix.
        quantized: codes of :func:`residual` where a method chose them; rounded to the nearest where left out.
        bias: in place of the layer's.
        extra: ``input_scale``, ``input_zero`` and ``first``, as they are kept.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype
    quantized = quantized or plan.weight.encode(residual(weight, smooth, branch))
    arrays = quantized.packed()
    given = bias if bias is not None else layer.bias
    kept = given.detach().clone() if isinstance(given, Tensor) else None  # the layer's own may be trained on
    factors = None if smooth is None else smooth.float().repeat(quantized.shape[1] // smooth.shape[0])
    if plan.shift:
        if weight.ndim != 2:
            raise FewstepError("a shift is for linear layers: a convolution's border is zero, and would be shifted too")
        codes = quantized.decode()
        share = plan.shift * (codes if factors is None else codes / factors).sum(1)
        kept = (-share if kept is None else kept.float() - share).to(dtype)
    if kept is not None:
        arrays["bias"] = kept
    if smooth is not None:
        arrays["smooth"] = smooth.to(dtype)
    if branch is not None:
        down, up = branch
        arrays["down"] = (down.float() if factors is None else down.float() / factors).to(dtype)
        arrays["up"] = up.to(dtype)
    # One layout, so that a layer sums in the same order before it is saved and after.
    return {name: value.contiguous() for name, value in (arrays | dict(extra or {})).items()}


def quant_layer(
    layer: nn.Module, plan: LayerPlan, arrays: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> QuantLayer:
    """The quantised layer that takes the place of ``layer``, whose weight is not read."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shape, dtype = tuple(weight.shape), dtype or weight.dtype
    made: QuantLinear | QuantConv2d
    if isinstance(layer, nn.Conv2d):
        geometry = {name: getattr(layer, name) for name in GEOMETRY}
        geometry["border"] = layer._reversed_padding_repeated_twice
        made = QuantConv2d(plan, shape, arrays, dtype, geometry)
    else:
        made = QuantLinear(plan, shape, arrays, dtype)
    return made.train(layer.training)


def split_parts(layer: nn.Module, splits: tuple[int, ...]) -> list[nn.Module]:
    """The layers over parts of the input channels whose sum ``layer`` is; the bias is the first one's."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    parts = []
    for i, (a, b) in enumerate(itertools.pairwise((0, *splits, weight.shape[1]))):
        part = copy.copy(layer)
        part._parameters = {"weight": nn.Parameter(weight.detach()[:, a:b], requires_grad=False), "bias": None}
        if i == 0:
            part._parameters["bias"] = layer._parameters["bias"]
        parts.append(part)
    return parts


def build(layer: nn.Module, plan: LayerPlan, arrays: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The quantised form of ``layer``: from arrays where they are given, else rounded to the nearest.

    The arrays of a split layer are named ``0.codes``, ``1.codes`` and so on.
    """
    if not plan.splits:
        return quant_layer(layer, plan, layer_arrays(layer, plan) if arrays is None else arrays)
    whole = replace(plan, splits=())
    parts = []
    for i, part in enumerate(split_parts(layer, plan.splits)):
        given = None if arrays is None else _part(arrays, i)
        parts.append(quant_layer(part, whole, layer_arrays(part, whole) if given is None else given))
    return QuantSplit(plan, parts)


def _part(arrays: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    start = f"{index}."
    return {name[len(start) :]: value for name, value in arrays.items() if name.startswith(start)}


def unbuild(layer: nn.Module) -> nn.Module:
    """A float layer in place of what :func:`build` made."""
    if isinstance(layer, QuantLayer):
        return float_layer(layer)
    assert isinstance(layer, QuantSplit)
    first = layer.parts[0]
    assert isinstance(first, QuantLayer)
    made: Any = float_layer(first)
    made.weight = nn.Parameter(layer.weight.detach().clone().contiguous())
    if isinstance(made, nn.Conv2d):
        made.in_channels = made.weight.shape[1]
    else:
        made.in_features = made.weight.shape[1]
    return made  # type: ignore[no-any-return]


def float_layer(layer: QuantLayer) -> nn.Module:
    """A plain layer with the weight that ``layer`` multiplies with, for where the original is gone."""
    weight = layer.weight
    bias = getattr(layer, "bias", None)
    made: nn.Conv2d | nn.Linear
    with torch.device("meta"):
        if isinstance(layer, QuantConv2d):
            geometry: dict[str, Any] = {name: getattr(layer, name) for name in GEOMETRY}
            n, _, h, w = layer.shape
            made = nn.Conv2d(layer.in_channels, n, (h, w), bias=bias is not None, **geometry)
        else:
            made = nn.Linear(layer.shape[1], layer.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        if layer.plan.shift:  # give the shift's share back
            codes = (
                layer.decoded if layer.smooth is None else layer.decoded / layer.smooth_columns(layer.smooth).float()
            )
            bias = (bias.float() + layer.plan.shift * codes.sum(1)).to(bias.dtype)
        made.bias = nn.Parameter(bias.detach().clone())
    return made.train(layer.training)


def check(name: str, layer: nn.Module, plan: LayerPlan) -> None:
    """Raises FewstepError where a layer cannot be what its plan says."""
    if not isinstance(layer, FLOAT_LAYERS):
        raise FewstepError(f"{name} is a {type(layer).__name__}; linear layers and 2-d convolutions can be quantised")
    if isinstance(layer, QuantLayer):
        raise FewstepError(f"{name} is quantised already; dequantize_ first")
    weight = layer.weight
    if weight.is_meta:
        raise FewstepError(
            f"{name} has its weight on the meta device (sequential offload?); quantise before offloading"
        )
    if not bool(torch.isfinite(weight).all()):
        raise FewstepError(f"{name} has NaN or infinity among its weights; they have no codes")
    channels = int(weight.shape[1])
    for what, format in (("weight", plan.weight), ("activation", plan.activation)):
        _check_groups(name, what, format, channels)
    if plan.splits and plan.splits[-1] >= channels:
        raise FewstepError(f"{name} is split at channel {plan.splits[-1]}, it has {channels}")
    if plan.rank > min(weight.shape[0], weight[0].numel()):
        raise FewstepError(
            f"{name} has a weight of shape {tuple(weight.shape)}; a branch of rank {plan.rank} is larger"
        )
    if isinstance(layer, nn.Conv2d) and layer.groups > 1 and (plan.rank or plan.smooth or plan.splits):
        raise FewstepError(f"{name} is a grouped convolution; it takes no branch, smoothing or splits")
    if isinstance(layer, nn.Conv2d) and plan.shift:
        raise FewstepError(f"{name} is a convolution, whose border a shift would change; shifts are for linear layers")


def _check_groups(name: str, what: str, format: Format | None, channels: int) -> None:
    if format is not None:
        try:
            format.groups(channels)
        except FewstepError as error:
            raise FewstepError(f"{name}, {what}: {error}") from None
