"""What the tests of the Triton kernels' numbers share. They run in Triton's interpreter: ``test_quant_triton.py`` starts them
in a process that has it, and in any other they are skipped.

Bounds: u = 2^-24 is the rounding of float32. A sum of n float32 products, in any order, differs from the exact one by at most
about n u sum |products|; integer sums below 2^24 are exact, so a group counts as one product.
"""

import os

import pytest

from tests.tensor_fixtures import noise

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run in the interpreter by test_quant_triton.py", allow_module_level=True)

from fewstep.quant.formats import Format
from fewstep.quant.kernels import triton as kernels

U = 2.0**-24
M, N, R = 37, 45, 20


class Layer:
    """An input with outliers, a weight, a low-rank branch and a bias, all of sizes that no tile divides."""

    def __init__(self, columns):
        self.x = noise(M, columns) * noise(columns, seed=1).exp()
        self.smooth = (noise(columns, seed=2) / 2).exp()
        self.weight = noise(N, columns, seed=3)
        self.down, self.up = noise(R, columns, seed=4), noise(N, R, seed=5)
        self.bias = noise(N, seed=6)

    def check(self, linear, activation, weight, roundings, **options):
        """Compare with float64 on the same codes; ``roundings`` is n of the module's bound, without the branch."""
        rows = kernels.quantize_rows(self.x, activation, smooth=self.smooth, down=self.down)
        encoded = Format.parse(weight).encode(self.weight)
        packed = encoded.packed()
        arguments = [packed["codes"], packed["scale"], *([packed["tensor_scale"]] if "tensor_scale" in packed else [])]
        y = linear(rows, *arguments, self.bias, up=self.up, **options)
        assert y.shape == (M, N)
        assert_close(y, rows, rows.quantized().decode(), encoded.decode(), self, roundings)


def assert_close(y, rows, x, w, layer, roundings):
    x, w, p, up, bias = (t.double() for t in (x, w, rows.projected, layer.up, layer.bias))
    wanted = x @ w.T + p @ up.T + bias
    size = x.abs() @ w.abs().T + p.abs() @ up.abs().T + bias.abs()
    excess = (y.double() - wanted).abs() / (size * (roundings + R + 4) * U)
    assert excess.max() <= 1, f"{excess.max():.3g} times the bound"


def mixed_layer(wide):
    layer = Layer(256)
    order = kernels.mixed_order(layer.x.abs().amax(0), wide)
    rows = kernels.quantize_mixed(layer.x, order, wide, group=64, smooth=layer.smooth, down=layer.down)
    weight = Format.parse("int4:g64").encode(layer.weight[:, order.long()])
    return layer, order, rows, weight
