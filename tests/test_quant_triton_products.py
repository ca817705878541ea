"""Products in Triton against float64 on the same codes."""

import pytest
import torch

from fewstep.quant.formats import Format
from fewstep.quant.kernels import triton as kernels
from tests.triton_fixtures import Layer, M, N, U, assert_close, mixed_layer, noise


@pytest.mark.parametrize(
    ("linear", "activation", "weight"),
    [
        (kernels.int8_linear, "int8:row", "int8:row"),
        (kernels.int8_linear, "int8:g64", "int8:g64"),
        (kernels.int8_linear, "int8:row", "int8:g32"),
        (kernels.w4a8_linear, "int8:row", "int4:g64"),
        (kernels.w4a8_linear, "int8:row", "int4:row"),
        (kernels.w4a8_linear, "int8:g32/f32", "int4:g32"),
        (kernels.w4a4_linear, "int4:g64", "int4:g64"),
        (kernels.w4a4_linear, "int4:row", "int4:g64"),
        (kernels.w4a4_linear, "uint4:g32", "int4:g32"),
        (kernels.w4a4_linear, "uint4:row", "int4:row"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_integer_products_are_exact_within_a_group(linear, activation, weight):
    columns = 330 if "g" not in activation + weight else 192
    group = Format.parse(weight).group or columns
    assert 127 * 127 * group < 2**24
    Layer(columns).check(linear, activation, weight, roundings=-(-columns // group))


@pytest.mark.parametrize("emulate", [True, False])
@pytest.mark.parametrize("format", ["fp8", "mxfp8", "mxfp4", "nvfp4"])
def test_floating_products(format, emulate):
    if format == "nvfp4" and not emulate:
        pytest.skip("the interpreter takes NVFP4's E4M3 scales for E8M0; the machine code is checked instead")
    columns = 330 if format == "fp8" else 352
    linear = getattr(kernels, f"{format}_linear")
    Layer(columns).check(linear, format, format, roundings=columns, emulate=emulate)


@pytest.mark.parametrize("accurate", [True, False])
def test_where_fp8_sums_are_kept_changes_no_product(accurate):
    Layer(256).check(kernels.fp8_linear, "fp8", "fp8", roundings=256, accurate=accurate, emulate=False)


def test_emulated_codes_decode_to_their_values_exactly():
    """Against an identity, a product has one term: every E4M3 and E2M1 code under ordinary and extreme scales."""
    finite = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    codes = torch.nn.functional.pad(finite, (0, 2)).reshape(8, 32)
    eye = Format.parse("mxfp8").encode(torch.eye(32)).packed()
    for byte in (1, 100, 127, 200):
        scale = torch.full((8, 1), byte, dtype=torch.uint8)
        rows = kernels.QuantizedRows(Format.parse("mxfp8"), 32, codes, scale, None, None, torch.float32)
        y = kernels.mxfp8_linear(rows, eye["codes"], eye["scale"])
        torch.testing.assert_close(y, rows.quantized().decode(), rtol=0, atol=0)
    four = (torch.arange(16, dtype=torch.uint8) * 17).reshape(1, 16)  # every code, twice a byte
    eye = Format.parse("nvfp4").encode(torch.eye(32) * 6, tensor_scale=torch.tensor(1.0)).packed()
    for byte in (1, 8, 56, 126):  # the least and the first normal scale, 1, and 448
        scale = torch.full((1, 2), byte, dtype=torch.uint8)
        rows = kernels.QuantizedRows(Format.parse("nvfp4"), 32, four, scale, torch.tensor(1.0), None, torch.float32)
        y = kernels.nvfp4_linear(rows, eye["codes"], eye["scale"], eye["tensor_scale"]) / 6
        torch.testing.assert_close(y, rows.quantized().decode(), rtol=2 * U, atol=0)


@pytest.mark.parametrize("wide", [0, 64, 128, 256])
def test_tiles_of_8_and_4_bit_activations_in_one_product(wide):
    layer, order, rows, weight = mixed_layer(wide)
    x = (layer.x / layer.smooth)[:, order.long()]
    parts = []
    for name, codes, scale, part in (
        ("int8", rows.codes8, rows.scale8, x[:, :wide]),
        ("int4", rows.codes4, rows.scale4, x[:, wide:]),
    ):
        if part.shape[1]:
            reference = Format.parse(f"{name}:g64/f32").encode(part)
            torch.testing.assert_close(codes, reference.packed()["codes"], rtol=0, atol=0)
            torch.testing.assert_close(scale, reference.scale, rtol=0, atol=0)
            parts.append(reference.decode())
    packed = weight.packed()
    y = kernels.w4ax_linear(rows, packed["codes"], packed["scale"], layer.bias, up=layer.up)
    assert_close(y, rows, torch.cat(parts, 1), weight.decode(), layer, roundings=4)


def test_outlier_channels_in_8_bits_cost_less_error_than_everything_in_4():
    """8 bits halve a step four times, so the error of the channels that dominate falls by about 2^4; a factor 2 is asked."""
    errors = {}
    for wide in (0, 64):
        layer, order, rows, weight = mixed_layer(wide)
        packed = weight.packed()
        y = kernels.w4ax_linear(rows, packed["codes"], packed["scale"], layer.bias, up=layer.up)
        exact = (layer.x / layer.smooth)[:, order.long()] @ weight.decode().T + rows.projected @ layer.up.T + layer.bias
        errors[wide] = float((y - exact).norm())
    assert errors[64] < errors[0] / 2


def test_a_shifted_unsigned_input_gives_the_unshifted_product():
    """W (x + s) - s W 1 = W x: what is left is the error of 16 levels, half a step a column at most."""
    x = torch.nn.functional.gelu(noise(M, 128) * 2)
    shift = 0.171875
    weight = Format.parse("int4:g64").encode(noise(N, 128, seed=1))
    w, packed = weight.decode(), weight.packed()
    rows = kernels.quantize_rows(x, "uint4:g64", shift=shift)
    y = kernels.w4a4_linear(rows, packed["codes"], packed["scale"], -shift * w.sum(1))
    step = rows.scale.float().repeat_interleave(64, 1)
    assert ((y - x @ w.T).abs() <= (step / 2) @ w.abs().T * 1.01).all()
    assert (rows.quantized().decode() >= 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "padding": 1},
        {"kernel": 3, "stride": 2, "padding": 1},
        {"kernel": (1, 3), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)},
        {"kernel": 1},
    ],
)
def test_convolution_is_exact_but_for_the_scales(options):
    kernel = options.pop("kernel")
    kernel_h, kernel_w = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = noise(2, 37, 9, 7)
    x[1] *= 50  # every image has its own scale
    weight = Format.parse("int8:row").encode(noise(21, kernel_h * kernel_w * 37, seed=1))
    bias = noise(21, seed=2)
    assert 127 * 127 * kernel_h * kernel_w * 37 < 2**24
    y = kernels.int8_conv2d(x, weight.codes.reshape(21, kernel_h, kernel_w, 37), weight.scale, bias, **options)
    scale = x.abs().amax((1, 2, 3), keepdim=True) / 127
    pixels = (x / scale).round().double() * scale.double()
    filters = (weight.codes.double() * weight.scale.double()).reshape(21, kernel_h, kernel_w, 37).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.conv2d(pixels, filters, bias.double(), **options)
    assert y.shape == wanted.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert ((y.double() - wanted).abs() <= 4 * U * (wanted.abs() + bias.abs().max())).all()
    alone = kernels.int8_conv2d(x[1:], weight.codes.reshape(21, kernel_h, kernel_w, 37), weight.scale, bias, **options)
    torch.testing.assert_close(alone[0], y[1], rtol=0, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("format", ["int8:row", "int4:g64", "mxfp8", "nvfp4"])
def test_what_is_not_finite_is_seen_in_its_row_and_nowhere_else(format, poison):
    layer = Layer(128)
    layer.x[5, 70] = poison
    options = {"tensor_scale": torch.tensor(1e-3)} if format == "nvfp4" else {}
    rows = kernels.quantize_rows(layer.x, format, **options)
    weight = {"int4:g64": "int4:g64"}.get(format, format)
    packed = Format.parse(weight).encode(layer.weight).packed()
    linear = {
        "int8:row": kernels.int8_linear,
        "int4:g64": kernels.w4a4_linear,
        "mxfp8": kernels.mxfp8_linear,
        "nvfp4": kernels.nvfp4_linear,
    }[format]
    y = linear(rows, packed["codes"], packed["scale"], *([packed["tensor_scale"]] if "tensor_scale" in packed else []))
    bad = ~y.isfinite()
    assert bad[5].any()
    bad[5] = False
    assert not bad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_and_outputs(dtype):
    x = noise(2, 3, 96).to(dtype)
    weight = Format.parse("int8:row").encode(noise(N, 96, seed=1)).packed()
    y = kernels.int8_linear(x, weight["codes"], weight["scale"])
    wide = kernels.int8_linear(x.float(), weight["codes"], weight["scale"])
    assert y.dtype == dtype
    assert y.shape == (2, 3, N)
    step = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0  # which the interpreter truncates
    torch.testing.assert_close(y, wide.to(dtype), rtol=step, atol=0)
    assert kernels.int8_linear(x, weight["codes"], weight["scale"], out_dtype=torch.float32).dtype == torch.float32


def test_no_rows_are_no_launch():
    weight = Format.parse("int4:g64").encode(noise(N, 128)).packed()
    assert kernels.w4a4_linear(torch.empty(0, 128), weight["codes"], weight["scale"]).shape == (0, N)
