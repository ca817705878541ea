"""The backend on the project's Triton kernels: layers equal to the reference, by Triton's interpreter in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fewstep.quant.backends.fused import Fused, _kernel
from fewstep.quant.formats import Format
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import build, layer_arrays, quant_layer

PAIRS = (
    ("int8:row", "int8:row"), ("int4:g64", "int8:row"), ("int4:g64", "int4:g64"), ("fp8", "fp8"), ("mxfp8", "mxfp8"),
    ("nvfp4", "nvfp4"), ("mxfp6", "mxfp6"),
)  # fmt: skip
TOLERANCE = 128 * 2.0**-24
"""128 products in float32, in another order."""


def relative(got, want):
    return float((got - want).norm() / want.norm())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fused, linear, x = Fused(), nn.Linear(128, 48).requires_grad_(False), torch.randn(20, 128)
    for weight, activation in PAIRS:
        layer = build(linear, LayerPlan(weight, activation))
        layer.backend = "reference"
        assert relative(fused.linear(layer, x), layer(x)) < TOLERANCE, (weight, activation)
        a, b = Format.parse(activation).encode(x), layer.quantized_weight()
        assert relative(fused.product(a, fused.pack(b)), a.decode() @ b.decode().T) < TOLERANCE, (weight, activation)
    smooth, branch = torch.rand(128) + 0.5, (torch.randn(16, 128) / 11, torch.randn(48, 16) / 4)
    plan = LayerPlan("int4:g64", "uint4:g64", rank=16, smooth=True, shift=0.17)
    layer = quant_layer(linear, plan, layer_arrays(linear, plan, smooth=smooth, branch=branch))
    layer.backend = "reference"
    assert relative(fused.linear(layer, x.abs()), layer(x.abs())) < 2 * TOLERANCE  # two products and a branch
    convolution, images = nn.Conv2d(32, 16, 3, padding=1, stride=2).requires_grad_(False), torch.randn(2, 32, 6, 6)
    layer = build(convolution, LayerPlan("int8:row", "int8:row"))
    layer.backend = "reference"
    assert relative(fused.conv2d(layer, images), layer(images)) < 288 * 2.0**-24
    layer = build(nn.Conv2d(128, 16, 1).requires_grad_(False), LayerPlan("int8:row", "int8:row"))
    layer.backend = "reference"
    pixels = torch.randn(2, 128, 3, 5)
    rows = fused.linear(layer, pixels.permute(0, 2, 3, 1).reshape(-1, 128))
    assert relative(rows, layer(pixels).permute(0, 2, 3, 1).reshape(-1, 16)) < TOLERANCE
    print("equal")


def test_layers_on_the_kernels_equal_the_reference():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"]


@pytest.mark.parametrize(
    ("activation", "weight", "kernel"),
    [
        ("int8:row", "int8:row", "int8_linear"),
        ("int8:row", "int4:g128", "w4a8_linear"),
        ("uint4:g64", "int4:g64", "w4a4_linear"),
        ("nvfp4", "nvfp4", "nvfp4_linear"),
        ("mxfp6", "mxfp6", "mxfp8_linear"),
        ("mxfp6", "mxfp8", None),
        ("int8:tensor", "int8:row", None),
        ("zint8:row", "int8:row", None),
        ("int4:g64", "int4:g32", None),
        ("int4:g16", "int4:g16", None),
        ("e5m2:row", "e5m2:row", None),
        ("fp8", "int8:row", None),
        (None, "int8:row", None),
    ],
)
def test_formats_have_the_kernels_that_take_them(activation, weight, kernel):
    assert _kernel(None if activation is None else Format.parse(activation), Format.parse(weight)) == kernel


def test_without_a_gpu_it_says_so():
    assert Fused().missing(torch.device("cpu")) == "Triton compiles for GPUs"


if __name__ == "__main__":
    main()
