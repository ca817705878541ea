"""A plan as torchao's config by name, which ``torchao.quantize_`` and diffusers' ``TorchAoConfig`` take."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from fewstep.errors import FewstepError, PlanError
from fewstep.quant.formats import E4M3, Format, Integer
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.plan import QuantPlan


def to_torchao(plan: QuantPlan, *, strict: bool = True) -> Any:
    """``FqnToConfig`` with a config for each layer of the plan; layers that it keeps stay as they are.

    torchao rounds the weights anew and finds its own input scales (integers: a step of absmax / 127.5, zero points for
    inputs beside narrow weights), so codes are not those of ``quantize_`` but the formats are.

    Args:
        plan: of linear layers. torchao has neither convolutions nor branches, smoothing, splits or stored scales of ours.
        strict: refuse a plan with layers that torchao cannot express; else these stay in floating point.

    Returns:
        ``torchao.quantization.FqnToConfig``, for ``torchao.quantization.quantize_(model, config, filter_fn=None)`` or
        ``diffusers.TorchAoConfig(config)``. FP8 and FP4 products need the GPUs that torchao names.

    Raises:
        FewstepError: torchao is not installed.
        PlanError: with ``strict``, the first layer that cannot be expressed, and why; or where none can be.

    Example:
        >>> config = quant.to_torchao(quant.Int8().plan(pipe.transformer))
        >>> torchao.quantization.quantize_(pipe.transformer, config, filter_fn=None)
    """
    try:
        from torchao.quantization import FqnToConfig  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise FewstepError("torchao is not installed; pip install 'fewstep[quant]'") from error
    if not isinstance(plan, QuantPlan):
        raise PlanError(f"plan is of type {type(plan).__name__}; give a QuantPlan, such as config.plan(network) makes")
    configs: OrderedDict[str, Any] = OrderedDict()
    for name, layer in plan.layers.items():
        reason = unserved(layer, plan.shapes[name])
        if reason is None:
            configs[name] = _config(layer)
        elif strict:
            raise PlanError(
                f"torchao cannot express {name} ({layer}): {reason}; strict=False leaves such layers as they are"
            )
    if not configs:
        raise PlanError(f"torchao can express no layer of this plan by {plan.method}")
    return FqnToConfig(configs)


def unserved(layer: LayerPlan, shape: tuple[int, ...]) -> str | None:
    """Why torchao has no config for a layer, None where it has one."""
    if len(shape) != 2:
        return "it quantises linear layers"
    extras = [name for name in ("rank", "smooth", "shift", "static", "splits", "first_token") if getattr(layer, name)]
    if extras:
        return f"it has no {' or '.join(extras)}"
    weight, inputs = layer.weight, layer.activation
    if inputs is not None and str(weight) == str(inputs) and str(weight) in ("nvfp4", "mxfp8", "mxfp4", "fp8"):
        return None
    if weight.element == E4M3 and weight.granularity == "row":
        return None if inputs is None else "its FP8 weights take FP8 inputs"
    if not isinstance(weight.element, Integer) or weight.element.kind != "int" or weight.granularity == "tensor":
        return f"it has no weights in {weight}"
    if inputs is None or _eight(inputs):
        return None
    return f"it has no inputs in {inputs}"


def _eight(format: Format) -> bool:
    kind = format.element
    return isinstance(kind, Integer) and kind.bits == 8 and kind.kind in ("int", "zint") and format.granularity == "row"


def _config(layer: LayerPlan) -> Any:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        PerRow,
    )

    weight, inputs = layer.weight, layer.activation
    if str(weight) == "nvfp4" or str(weight).startswith("mx"):
        return _blocks(str(weight))
    if weight.element == E4M3:
        if inputs is None:
            return Float8WeightOnlyConfig()
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    assert isinstance(weight.element, Integer)
    bits, whole = weight.element.bits, not weight.group
    if bits == 8 and whole and (inputs is None or str(inputs) == "int8:row"):
        return Int8WeightOnlyConfig() if inputs is None else Int8DynamicActivationInt8WeightConfig(granularity=PerRow())
    dtype, share = getattr(torch, f"int{bits}"), PerAxis(0) if whole else PerGroup(weight.group)
    if inputs is None:
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=share)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=share)


def _blocks(name: str) -> Any:
    from torchao.prototype.mx_formats import (  # pyright: ignore[reportMissingImports]
        MXDynamicActivationMXWeightConfig,
        NVFP4DynamicActivationNVFP4WeightConfig,
    )

    if name == "nvfp4":
        return NVFP4DynamicActivationNVFP4WeightConfig()
    dtype = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(activation_dtype=dtype, weight_dtype=dtype)
