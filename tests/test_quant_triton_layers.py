"""Triton's kernels from the outside: quantised layers, memory that they must not touch, what they refuse."""

import pytest
import torch

from fewstep.quant.backends.fused import Fused
from fewstep.quant.backends.reference import Reference
from fewstep.quant.formats import Format
from fewstep.quant.kernels import triton as kernels
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays, quant_layer
from tests.memory_fixtures import guard_what_is_allocated, guarded
from tests.quant_fixtures import refused
from tests.triton_fixtures import Layer, N, U, mixed_layer, noise


@pytest.mark.parametrize(
    "plan",
    [
        LayerPlan("int8:row", "int8:row"),
        LayerPlan("int4:g64", "int8:row", smooth=True),
        LayerPlan("int4:g64", "int4:g64", rank=16, smooth=True),
        LayerPlan("int4:g64", "uint4:g64", rank=16, smooth=True, shift=0.171875),
        LayerPlan("fp8", "fp8"),
        LayerPlan("mxfp8", "mxfp8", rank=8),
        LayerPlan("nvfp4", "nvfp4", smooth=True),
    ],
    ids=str,
)
def test_a_quantised_layer_gives_what_its_reference_gives(plan):
    """Both add K products of the same codes in float32, so they differ by 2 K u sum |products| at most, and the branch's."""
    layer = Layer(128)
    linear = torch.nn.Linear(128, N)
    branch = (noise(plan.rank, 128, seed=7) / 16, noise(N, plan.rank, seed=8) / 16) if plan.rank else None
    smooth = layer.smooth if plan.smooth else None
    made = quant_layer(linear, plan, layer_arrays(linear, plan, smooth=smooth, branch=branch))
    wanted = Reference().linear(made, layer.x)
    size = made.round_input(made.prepare(layer.x)).abs() @ made.decoded.abs().T + made.bias.abs()
    if branch:
        size = size + layer.x.abs() @ made.down.abs().T @ made.up.abs().T
    excess = (Fused().linear(made, layer.x) - wanted).abs() / (2 * (128 + plan.rank) * U * size)
    assert excess.max() <= 1, f"{excess.max():.3g} times the bound"


def test_a_quantised_convolution_gives_what_its_reference_gives():
    plan = LayerPlan("int8:row", "int8:row")
    conv = torch.nn.Conv2d(20, 12, 3, stride=2, padding=1)
    made = quant_layer(conv, plan, layer_arrays(conv, plan))
    x = noise(2, 20, 7, 9)
    assert Fused().refuses_conv(made) is None
    wanted = Reference().conv2d(made, x)
    size = torch.nn.functional.conv2d(x.abs(), made.weight.abs(), made.bias.abs(), stride=2, padding=1)
    assert (
        (Fused().conv2d(made, x) - wanted).abs() <= 2 * 9 * 20 * U * 1.02 * size
    ).all()  # 1.02: codes exceed x by half a step


PRODUCTS = {
    "int8": (kernels.int8_linear, "int8:row", "int8:row"),
    "w4a8": (kernels.w4a8_linear, "int8:row", "int4:row"),
    "w4a4": (kernels.w4a4_linear, "int4:g32", "int4:g32"),
    "fp8": (kernels.fp8_linear, "fp8", "fp8"),
    "mxfp8": (kernels.mxfp8_linear, "mxfp8", "mxfp8"),
    "nvfp4": (kernels.nvfp4_linear, "nvfp4", "nvfp4"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_no_kernel_leaves_its_tensors(name, monkeypatch):
    """The process would die. Every element of the result is written, too: what is not stays NaN."""
    linear, activation, weight = PRODUCTS[name]
    layer = Layer(96 if "g" in activation or name[0] in "mn" else 98)
    packed = Format.parse(weight).encode(layer.weight).packed()
    arguments = [packed["codes"], packed["scale"], *([packed["tensor_scale"]] if "tensor_scale" in packed else [])]
    branch = {"smooth": layer.smooth, "down": layer.down, "up": layer.up}
    options = {} if name in ("fp8", "mxfp8", "nvfp4") else {"activation": activation}
    free = linear(layer.x, *arguments, layer.bias, **branch, **options)
    guard_what_is_allocated(monkeypatch)
    arguments = [guarded(t) for t in (layer.x, *arguments, layer.bias)]
    y = linear(*arguments, **{key: guarded(value) for key, value in branch.items()}, **options)
    torch.testing.assert_close(y, free, rtol=0, atol=0)


def test_mixed_tiles_and_convolution_do_not_leave_their_tensors(monkeypatch):
    layer, order, _, weight = mixed_layer(64)
    packed = weight.packed()
    x, filters, scale = noise(1, 5, 6, 7), torch.ones(3, 3, 3, 5, dtype=torch.int8), torch.ones(3)
    free = kernels.w4ax_linear(layer.x, packed["codes"], packed["scale"], order=order, wide=64, group=64)
    convolved = kernels.int8_conv2d(x, filters, scale, padding=1)
    guard_what_is_allocated(monkeypatch)
    codes, scales, order = guarded(packed["codes"]), guarded(packed["scale"]), guarded(order)
    y = kernels.w4ax_linear(guarded(layer.x), codes, scales, order=order, wide=64, group=64)
    torch.testing.assert_close(y, free, rtol=0, atol=0)
    again = kernels.int8_conv2d(guarded(x), guarded(filters), guarded(scale), padding=1)
    torch.testing.assert_close(again, convolved, rtol=0, atol=0)


def test_refusals_name_what_is_wrong():
    x = noise(4, 128)
    w8 = Format.parse("int8:row").encode(noise(N, 128)).packed()
    w4 = Format.parse("int4:g64").encode(noise(N, 128)).packed()
    q, linear8, linear4 = kernels.quantize_rows, kernels.int8_linear, kernels.w4a4_linear
    refused(lambda: q(x, "int2:row"), "int2", "takes int8")
    refused(lambda: q(x, "int4:g8"), "groups of 16")
    refused(lambda: q(x, "int4:g48"), "groups of 16")
    refused(lambda: q(noise(4, 100), "int4:g64"), "do not divide 100")
    refused(lambda: q(noise(4, 33), "int4:row"), "odd")
    refused(lambda: q(x.long()), "torch.int64")
    refused(lambda: q(x, "int8:tensor"), "static scale")
    refused(lambda: q(x, smooth=torch.ones(5)), "smooth has shape (5,)", "(128,)")
    refused(lambda: q(x, down=torch.ones(200, 128)), "rank 200", "128")
    refused(lambda: q(x, scale=torch.ones(3)), "static scale of shape (3,)")
    refused(lambda: linear8(x, w4["codes"], w4["scale"]), "weight codes", "(N, 128)")
    refused(lambda: linear8(x, w8["codes"], w8["scale"][:5]), "weight scale")
    refused(lambda: linear8(x, w8["codes"], w8["scale"], torch.ones(3)), "bias has shape (3,)")
    refused(lambda: linear8(x, w8["codes"], w8["scale"], up=torch.ones(N, 4)), "up without down")
    refused(lambda: linear8(x, w8["codes"], w8["scale"], down=torch.ones(4, 128)), "down without up")
    refused(lambda: linear8(q(x), w8["codes"], w8["scale"], smooth=torch.ones(128)), "smooth", "already")
    refused(lambda: linear8(q(x, "int4:g64"), w8["codes"], w8["scale"]), "activations in int4:g64", "int8")
    refused(lambda: linear4(x, w4["codes"], w4["scale"], activation="int4:g32"), "groups of 32", "64")
    refused(lambda: kernels.w4ax_linear(x, w4["codes"], w4["scale"]), "order and wide")
    refused(lambda: kernels.quantize_mixed(x, torch.arange(128).int(), 100), "100 of 128")
    refused(
        lambda: kernels.int8_conv2d(noise(1, 4, 5, 5), torch.ones(2, 3, 3, 5).to(torch.int8), torch.ones(2)),
        "without groups",
    )
    refused(
        lambda: kernels.int8_conv2d(noise(1, 4, 2, 2), torch.ones(2, 3, 3, 4).to(torch.int8), torch.ones(2)),
        "larger than 2",
    )
