"""Quantised layers: against the formula written out, and every backend against the reference on the same codes."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewstep.errors import FewstepError, PlanError
from fewstep.quant import backends, kernels
from fewstep.quant.backends import onednn
from fewstep.quant.formats import Format
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers import QuantConv2d, QuantLinear
from fewstep.quant.layers.build import build, layer_arrays, quant_layer, unbuild
from tests.tensor_fixtures import generator, relative

FORMATS = [
    ("int8:row", "int8:row"), ("int7:row", "zint8:row"), ("int4:row", "int8:row"), ("int8:row", "int4:row"),
    ("int8:tensor", "int8:row"), ("int4:g64", "int4:g64"), ("int4:g64", "int8:row"), ("fp8", "fp8"),
    ("e4m3:tensor", "e4m3:tensor"), ("nvfp4", "nvfp4"), ("mxfp8", "mxfp8"), ("bin2:g64", "int8:row"), ("int4:g64", None),
]  # fmt: skip


def linear(k=128, n=48, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(k, n, bias=bias).requires_grad_(False)


def conv(c=64, n=48, seed=0, **geometry):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(c, n, 3, **({"padding": 1} | geometry)).requires_grad_(False)


@pytest.mark.parametrize(("weight", "activation"), FORMATS)
def test_a_linear_layer_is_its_formula_in_float64(weight, activation):
    layer, x = linear(), torch.randn(3, 20, 128, generator=generator())
    made = build(layer, LayerPlan(weight, activation))
    w = Format.parse(weight).round(layer.weight).double()
    flat = x.reshape(-1, 128)
    a = (flat if activation is None else Format.parse(activation).round(flat)).double()
    expected = (a @ w.T + layer.bias.double()).unflatten(0, (3, 20))
    # 128 products in float32: sqrt(128) 2^-24 where errors are independent, 128 times 2^-24 at most
    assert relative(made(x), expected) < 128 * 2.0**-24
    made.backend = "reference"
    assert relative(made(x), expected) < 128 * 2.0**-24


@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2}, {"padding": (1, 2), "dilation": (1, 2)}, {"padding_mode": "circular"}]
)
@pytest.mark.parametrize(("weight", "activation"), [f for f in FORMATS if f[0] != "e4m3:tensor"])
def test_a_convolution_is_its_formula_in_float64(weight, activation, geometry):
    layer, x = conv(**geometry), torch.randn(3, 64, 7, 9, generator=generator()) + 0.3
    made = build(layer, LayerPlan(weight, activation))
    matrix = layer.weight.permute(0, 2, 3, 1).reshape(48, -1)
    w = Format.parse(weight).round(matrix).reshape(48, 3, 3, 64).permute(0, 3, 1, 2).double()
    a = x.double()
    if activation is not None:
        rows = Format.parse(activation).round(x.permute(0, 2, 3, 1).reshape(3, -1))
        a = rows.reshape(3, 7, 9, 64).permute(0, 3, 1, 2).double()
    expected = layer.double()._conv_forward(a, w, layer.bias.double())
    assert relative(made(x), expected) < 576 * 2.0**-24
    made.backend = "reference"
    assert relative(made(x), expected) < 576 * 2.0**-24


@pytest.mark.parametrize("pad", [[0, 0], [1, 2]])
@pytest.mark.parametrize("kind", ["far apart", "positive", "negative", "zeros", "channels last"])
def test_onednns_codes_of_images_are_the_formats_bit_for_bit(kind, pad):
    x = torch.randn(2, 8, 5, 7, generator=generator(11))
    x = {
        "far apart": x * torch.tensor([1.0, 100.0])[:, None, None, None], "positive": x.abs() + 1, "negative": -x.abs(),
        "zeros": x * 0, "channels last": x.to(memory_format=torch.channels_last),
    }[kind]  # fmt: skip
    codes, scale, zero = onednn._zeroed_codes(x, pad)
    padded = F.pad(x, (pad[1], pad[1], pad[0], pad[0]))
    want = Format.parse("zint8:row").encode(padded.flatten(1))
    assert torch.equal(codes.flatten(1), want.codes)
    assert torch.equal(scale.reshape(-1, 1), want.scale)
    assert torch.equal(zero, want.zero)


def test_the_image_of_a_sample_does_not_depend_on_its_batch():
    layer, x = build(conv(), LayerPlan("int8:row", "zint8:row")), torch.randn(3, 64, 5, 5, generator=generator(1))
    x[1] *= 100
    alone = torch.cat([layer(x[i : i + 1]) for i in range(3)])
    assert torch.equal(layer(x), alone)


def test_smoothing_branch_and_shift_cancel_but_for_rounding():
    layer, x = linear(), torch.randn(20, 128, generator=generator(2)).abs()
    smooth = torch.rand(128, generator=generator(3)) + 0.5
    branch = (torch.randn(4, 128, generator=generator(4)) / 11, torch.randn(48, 4, generator=generator(5)) / 2)
    plan = LayerPlan("int8:g8", "uint8:g8", rank=4, smooth=True, shift=0.25)
    made = quant_layer(layer, plan, layer_arrays(layer, plan, smooth=smooth, branch=branch))
    left = layer.weight * smooth - branch[1] @ branch[0]
    codes = Format.parse("int8:g8").round(left).double()
    a = Format.parse("uint8:g8").round((x + 0.25) / smooth).double()
    bias = layer.bias.double() - 0.25 * (codes / smooth.double()).sum(1)
    expected = a @ codes.T + (x.double() / smooth.double()) @ branch[0].double().T @ branch[1].double().T + bias
    assert relative(made(x), expected) < 1e-6
    # Each undone wrongly is an error of the size of the output. The random branch makes what is rounded some 3 times larger
    # than the weight, and the outputs of a random layer are small beside their terms: 1/255 becomes a percent or two.
    assert relative(made(x), layer(x)) < 0.03
    assert relative(made.weight, layer.weight) < 0.03  # what it says it multiplies with


def test_a_convolution_takes_smoothing_and_a_branch():
    layer, x = conv(), torch.randn(2, 64, 6, 6, generator=generator(6))
    smooth = torch.rand(64, generator=generator(7)) + 0.5
    matrix = layer.weight.permute(0, 2, 3, 1).reshape(48, -1) * smooth.repeat(9)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    plan = LayerPlan("int8:row", "int8:row", rank=8, smooth=True)
    arrays = layer_arrays(layer, plan, smooth=smooth, branch=(v[:8], u[:, :8] * s[:8]))
    made = quant_layer(layer, plan, arrays)
    assert relative(made(x), layer(x)) < 0.02  # 8 bits: 1.4 % for normal inputs
    full = LayerPlan("int2:row", "int8:row", rank=48, smooth=True)
    exact = quant_layer(layer, full, layer_arrays(layer, full, smooth=smooth, branch=(v, u * s)))
    assert relative(exact(x), layer(x)) < 1e-5  # a branch of full rank leaves nothing to quantise


def test_split_parts_have_scales_of_their_own():
    layer, x = conv(), torch.randn(2, 64, 6, 6, generator=generator(8))
    x[:, 24:] *= 50
    layer.weight[:, 24:] /= 50
    whole, split = (build(layer, LayerPlan("int4:row", "int8:row", splits=s)) for s in ((), (24,)))
    assert relative(split(x), layer(x)) < 0.6 * relative(whole(x), layer(x))
    lin, z = linear(), torch.randn(4, 128, generator=generator(9))
    parts = build(lin, LayerPlan("int8:row", "int8:row", splits=(32, 96)))
    assert relative(parts(z), lin(z)) < 0.02
    assert unbuild(parts).weight.shape == lin.weight.shape


def test_the_first_token_is_what_was_stored():
    layer, x = linear(), torch.randn(2, 7, 128, generator=generator(10))
    plan = LayerPlan("int4:g64", "int4:g64", first_token=True)
    made = quant_layer(layer, plan, layer_arrays(layer, plan, extra={"first": torch.arange(48.0)}))
    assert torch.equal(made(x)[:, 0], torch.arange(48.0).expand(2, 48))
    assert torch.equal(made(x)[:, 1:], build(layer, LayerPlan("int4:g64", "int4:g64"))(x)[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_codes_and_scales(dtype):
    for layer, x in ((linear(), torch.randn(4, 128)), (conv(), torch.randn(2, 64, 5, 5))):
        made = build(layer, LayerPlan("int8:row", "int8:row"))
        before = {name: value.clone() for name, value in made.named_parameters()}
        made.to(dtype)
        assert made.weight.dtype == made.bias.dtype == dtype
        assert torch.equal(made.codes, before["codes"])
        assert torch.equal(made.scale, before["scale"])
        out = made(x.to(dtype))
        assert out.dtype == dtype
        # inputs and outputs rounded to the dtype, an 8-bit step moved by that here and there
        assert relative(out, build(layer, LayerPlan("int8:row", "int8:row"))(x)) < 0.02


@pytest.mark.parametrize(("weight", "activation"), FORMATS)
def test_inputs_may_lie_in_memory_in_any_order(weight, activation):
    made = build(linear(), LayerPlan(weight, activation))
    x = torch.randn(1, 128, 20, generator=generator(16)).transpose(1, 2)  # as a UNet's transformer hands pixels on
    assert not x.is_contiguous()
    assert relative(made(x), made(x.contiguous())) < 1e-6
    folded = build(conv(), LayerPlan(weight, activation)) if weight != "e4m3:tensor" else None
    if folded is not None:
        images = torch.randn(2, 64, 5, 7, generator=generator(17))
        assert relative(folded(images.to(memory_format=torch.channels_last)), folded(images)) < 1e-6


def test_layers_copy_pickle_and_load_after_they_ran():
    made = build(linear(), LayerPlan("int8:row", "int8:row"))
    x = torch.randn(4, 128, generator=generator(11))
    expected = made(x)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), expected)
    other = build(linear(seed=1), LayerPlan("int8:row", "int8:row"))
    other(x)  # what a backend made of the old weight must be forgotten
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), expected)


def test_layers_are_what_they_replace_for_code_that_asks():
    lin, cnv = build(linear(), LayerPlan("int4:g64")), build(conv(stride=2), LayerPlan("int4:g64"))
    assert isinstance(lin, QuantLinear)
    assert isinstance(lin, nn.Linear)
    assert (lin.in_features, lin.out_features, lin.weight.shape) == (128, 48, (48, 128))
    assert isinstance(cnv, QuantConv2d)
    assert isinstance(cnv, nn.Conv2d)
    assert (cnv.in_channels, cnv.out_channels, cnv.kernel_size, cnv.stride) == (64, 48, (3, 3), (2, 2))
    assert "int4:g64" in repr(lin)
    again = unbuild(cnv)
    x = torch.randn(1, 64, 6, 6)
    assert relative(again(x), cnv(x)) < 1e-5


def test_a_graph_compiler_sees_through_a_layer():
    made = build(linear(), LayerPlan("int8:row", "int8:row"))
    x = torch.randn(4, 128, generator=generator(12))
    expected = made(x)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert relative(compiled(x), expected) < 1e-6


# -- backends ------------------------------------------------------------------------------------------------------------
def usable():
    return [
        row
        for row in kernels.backends()
        if row.usable and "any" not in (row.activation, row.weight) and row.activation != "float"
    ]


@pytest.mark.parametrize("row", usable(), ids=lambda r: f"{r.backend}-{r.device}-{r.activation}-{r.weight}")
@pytest.mark.parametrize("shape", [(1, 16, 64), (33, 80, 256), (128, 128, 512)])
def test_every_backend_is_the_reference_on_the_same_codes(row, shape):
    m, n, k = shape
    a = Format.parse(row.activation).encode(torch.randn(m, k, generator=generator(13)).to(row.device))
    b = Format.parse(row.weight).encode(torch.randn(n, k, generator=generator(14)).to(row.device))
    got = kernels.matmul(a, b, row.backend).cpu()
    exact = a.decode().cpu().double() @ b.decode().cpu().double().T
    bound = a.decode().cpu().double().abs() @ b.decode().cpu().double().abs().T * k * 2.0**-24
    zero = 0.0 if a.zero is None else float(a.scale.max() * 255) * b.decode().abs().sum(1).max() * k * 2.0**-24
    assert bool(((got - exact).abs() <= bound + zero).all())


@pytest.mark.parametrize("bits", [7, 8])
def test_the_largest_sums_are_exact(bits):
    """All codes at their largest: where 16-bit accumulators are cut off, the result is far from the exact one."""
    top = 2 ** (bits - 1) - 1
    a = Format.parse("int8:tensor").encode(torch.full((8, 512), 1.0))
    b = Format.parse(f"int{bits}:row").encode(torch.full((8, 512), 1.0))
    assert int(a.codes.max()) == 127
    assert int(b.codes.max()) == top
    assert kernels.matmul(a, b) == pytest.approx(torch.full((8, 8), 512.0), rel=1e-5)


def test_the_table_names_every_backend_with_a_reason_where_it_cannot():
    rows = kernels.backends()
    assert {row.backend for row in rows} == set(backends.BY_NAME)
    assert all(row.problem for row in rows if not row.usable)
    assert any(row.backend == "reference" and row.usable for row in rows)


class Broken(backends.Reference):
    name = "broken"

    def product(self, activation, packed):
        return super().product(activation, packed) * 1.01


class Crashing(backends.Reference):
    name = "crashing"

    def product(self, activation, packed):
        raise RuntimeError("no kernel image is available\nand more")


@pytest.mark.parametrize(("kind", "says"), [(Broken, "off by"), (Crashing, "no kernel image is available")])
def test_a_backend_that_fails_its_probe_is_left_out_with_one_warning(kind, says, monkeypatch):
    broken = kind()
    monkeypatch.setitem(backends.BY_NAME, broken.name, broken)
    monkeypatch.setattr(backends, "ALL", (broken, *backends.ALL))
    backends._probed.cache_clear()
    made = build(linear(), LayerPlan("int4:row", "int4:row"))
    with pytest.warns(UserWarning, match=says):
        first = made(torch.ones(2, 128))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = build(linear(), LayerPlan("int4:row", "int4:row"))(torch.ones(2, 128))
    assert torch.equal(first, again)
    backends._probed.cache_clear()


def test_a_named_backend_that_cannot_says_why():
    made = build(linear(), LayerPlan("int4:g64", "int4:g64"))
    made.backend = "onednn"
    with pytest.raises(FewstepError, match=r"backend onednn cannot compute .*: oneDNN has one scale a row"):
        made(torch.ones(2, 128))
    made.backend = "onedn"
    with pytest.raises(FewstepError, match="unknown backend 'onedn'; did you mean 'onednn'"):
        made(torch.ones(2, 128))


def test_matmul_refuses_what_does_not_fit():
    a, b = (Format.parse("int8:row").encode(torch.ones(4, k)) for k in (64, 32))
    with pytest.raises(FewstepError, match="a has 64 columns and b 32"):
        kernels.matmul(a, b)
    with pytest.raises(FewstepError, match="backend torch cannot multiply int4:g64 by int8:row"):
        kernels.matmul(Format.parse("int4:g64").encode(torch.ones(4, 64)), a, "torch")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"weight": "int4:g7x"}, "no number format"),
        ({"activation": None, "smooth": True}, "leaves them as they are"),
        ({"splits": (8, 8)}, "ascending"),
    ],
)
def test_layer_plans_refuse_what_contradicts(change, says):
    with pytest.raises((PlanError, FewstepError), match=says):
        LayerPlan(**({"weight": "int8:row", "activation": "int8:row"} | change))


def test_layer_plans_round_trip_as_json():
    for plan in (LayerPlan("int4:g64"), LayerPlan("nvfp4", "nvfp4", rank=32, smooth=True, shift=0.17, splits=(64,))):
        assert LayerPlan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="unknown keys colour"):
        LayerPlan.from_json({"weight": "int8:row", "colour": "red"})


def test_the_reference_is_what_conv2d_makes_of_decoded_numbers():
    layer, x = conv(), torch.randn(2, 64, 5, 5, generator=generator(15))
    made = build(layer, LayerPlan("int4:g64"))
    assert relative(made(x), F.conv2d(x, made.weight, layer.bias, padding=1)) < 1e-6
