"""Quantisation of rows in Triton: codes, scales, what is not finite."""

import pytest
import torch

from fewstep.quant.formats import E2M1, E4M3, Format
from fewstep.quant.kernels import triton as kernels
from tests.triton_fixtures import Layer, M, U, noise

FORMATS = [
    "int8:row",
    "int8:g64",
    "int4:row",
    "int4:g64",
    "int4:g16/f32",
    "uint4:row",
    "uint4:g32",
    "fp8",
    "mxfp8",
    "mxfp4",
    "nvfp4",
]


@pytest.mark.parametrize("columns", [192, 320])
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_rows_are_those_of_the_reference_bit_for_bit(format, columns):
    layer = Layer(columns)
    rows = kernels.quantize_rows(layer.x, format, smooth=layer.smooth, down=layer.down)
    reference = Format.parse(format).encode(layer.x / layer.smooth).packed()
    torch.testing.assert_close(rows.codes, reference["codes"], rtol=0, atol=0)
    torch.testing.assert_close(rows.scale, reference["scale"], rtol=0, atol=0)
    if "tensor_scale" in reference:
        assert rows.tensor_scale.item() == reference["tensor_scale"].item()
    x, down = layer.x.double(), layer.down.double()
    assert ((rows.projected.double() - x @ down.T).abs() <= columns * U * (x.abs() @ down.abs().T)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_tiny_numbers_quantise_as_the_reference_does(format):
    x = torch.zeros(5, 64)
    x[1] = 1e-30 * noise(64)
    x[2, 3] = 1.0
    x[3] = 1e20 * noise(64)
    rows = kernels.quantize_rows(x, format)
    reference = Format.parse(format).encode(x).packed()
    torch.testing.assert_close(rows.codes, reference["codes"], rtol=0, atol=0)
    torch.testing.assert_close(rows.scale, reference["scale"], rtol=0, atol=0)


def test_e4m3_codes_of_every_value_midpoint_and_neighbour_are_those_of_torch():
    values = E4M3.decode(torch.arange(127, dtype=torch.uint8)).double()
    middle = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middle]).float()
    points = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(1e9))])
    points = torch.cat([points, -points]).clamp(-448, 448).reshape(1, -1)
    rows = kernels.quantize_rows(points, "fp8", scale=torch.tensor(1.0))
    torch.testing.assert_close(rows.codes, points.to(torch.float8_e4m3fn).view(torch.uint8), rtol=0, atol=0)


def test_e2m1_codes_of_every_value_midpoint_and_neighbour_go_to_the_even_one():
    values = E2M1.decode(torch.arange(8, dtype=torch.uint8))
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    points = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(9.0)).clamp(max=6)])
    points = torch.cat([points, -points])
    block = torch.nn.functional.pad(points[:, None], (0, 31), value=6.0)  # the scale of every block is 1
    rows = kernels.quantize_rows(block, "mxfp4")
    assert (rows.scale == 127).all()
    torch.testing.assert_close(rows.codes[:, 0] & 15, E2M1.encode(points), rtol=0, atol=0)


def test_a_static_scale_saves_the_first_pass_and_saturates():
    x = noise(M, 96)
    rows = kernels.quantize_rows(x, "int8:tensor", scale=torch.tensor(0.01))
    torch.testing.assert_close(rows.codes.view(torch.int8), (x / 0.01).round().clamp(-127, 127).to(torch.int8))
    assert (rows.scale == torch.tensor(0.01)).all()


def test_mixed_order_keeps_the_order_within_both_parts():
    order = kernels.mixed_order(torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0]), 2)
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert order.dtype == torch.int32
