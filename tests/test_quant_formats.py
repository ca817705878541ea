"""Number formats: exact codes against torch's own casts, packing, scales, and torchao's prototypes where installed."""

import itertools
import math

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.quant.formats import E2M1, E2M3, E3M2, E4M3, E5M2, Format, Minifloat, Quantized, element, pack, unpack

FORMATS = (
    "int2:g16", "int3:row", "int4:g64", "int7:row", "int8:row", "int8:tensor", "uint4:g64", "uint8:row", "zint4:g16",
    "zint8:row", "bint1:row", "bint2:row", "e4m3:tensor", "fp8", "e5m2:row", "e2m1:g32", "e3m0:row", "e1m2:row", "nvfp4",
    "mxfp4", "mxfp6", "mxfp8", "e2m3:g32/e8m0-floor", "bin1:row", "bin2:g64", "bin3:row",
)  # fmt: skip


def matrix(rows=6, columns=128, seed=0, scale=1.0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def every_bfloat16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()


@pytest.mark.parametrize(("ours", "theirs"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_codes_are_those_of_torch_on_every_bfloat16_and_about_every_tie(ours, theirs):
    values = theirs_values(theirs)
    finite = values[values.isfinite()]
    ties = (finite[:, None] + finite[None, :]).flatten() / 2
    near = torch.cat(
        [ties, torch.nextafter(ties, torch.tensor(math.inf)), torch.nextafter(ties, torch.tensor(-math.inf))]
    )
    x = torch.cat([every_bfloat16(), near])
    if theirs is torch.float8_e4m3fn:
        over = x.abs() > 464  # half-way to what would be the next number, and no code; torch's versions differ there
        assert bool(ours.decode(ours.encode(x[over], saturate=False)).isnan().all())
        assert bool((ours.decode(ours.encode(x[over & x.isfinite()])).abs() == 448).all())
        x = x[~over]
    expected = x.to(theirs).view(torch.uint8)
    got = ours.encode(x, saturate=False)
    agree = (got == expected) | (x.isnan() & ours.decode(got).isnan())  # the sign of a NaN is nobody's promise
    assert bool(agree.all())


@pytest.mark.parametrize(("ours", "theirs"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_every_code_decodes_as_torch_decodes_it(ours, theirs):
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ours.decode(codes).nan_to_num(nan=7e8), codes.view(theirs).float().nan_to_num(nan=7e8))


def theirs_values(dtype):
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def test_the_values_of_the_small_floats_are_those_of_the_standard():
    assert E2M1.decode(torch.arange(8, dtype=torch.uint8)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E3M2.max, E2M3.max, E4M3.max, E5M2.max) == (28, 7.5, 448, 57344)
    assert (E2M1.max_exponent, E3M2.max_exponent, E4M3.max_exponent, E5M2.max_exponent) == (2, 4, 8, 15)


@pytest.mark.parametrize(
    "kind", [E4M3, E5M2, E2M1, E3M2, E2M3, Minifloat(3, 0), Minifloat(1, 2), Minifloat(3, 4), Minifloat(2, 5)]
)
def test_a_code_survives_decoding_and_rounding_is_to_the_nearest(kind):
    codes = torch.arange(2**kind.bits, dtype=torch.uint8)
    values = kind.decode(codes)
    finite = values.isfinite()
    assert torch.equal(kind.encode(values)[finite], codes[finite])
    x = torch.cat([matrix(scale=kind.max / 2).flatten(), values[finite], torch.tensor([0.0, -0.0, 1e30, -1e30])])
    got = kind.decode(kind.encode(x))
    assert torch.equal(kind.round(x), got)
    nearest = (x.clamp(-kind.max, kind.max)[:, None] - values[finite][None]).abs().amin(1)
    assert torch.equal((x.clamp(-kind.max, kind.max) - got).abs(), nearest)


def test_an_arbitrary_small_float_rounds_as_float16_arithmetic_would():
    """E5M2 without its special codes is float16 with 8 mantissa bits cut off, rounded: the same numbers below its top."""
    x = matrix(scale=100.0).flatten()
    assert torch.equal(Minifloat(5, 2).round(x), E5M2.round(x))


@pytest.mark.parametrize("name", FORMATS)
def test_names_round_trip(name):
    assert str(Format.parse(name)) == name
    assert Format.parse(str(Format.parse(name))) == Format.parse(name)


@pytest.mark.parametrize("name", FORMATS)
def test_storage_round_trips_bit_for_bit_and_has_the_size_that_is_told(name):
    fmt, x = Format.parse(name), matrix()
    q = fmt.encode(x.abs() if name.startswith("uint") else x)
    kept = q.packed()
    back = Quantized.from_packed(fmt, 128, **kept)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.decode(), q.decode())
    assert sum(t.numel() * t.element_size() for t in kept.values()) == fmt.nbytes(*x.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_without_codes_is_rounding_with_them(name):
    fmt, x = Format.parse(name), matrix(seed=1)
    assert torch.equal(fmt.round(x), fmt.encode(x).decode())


@pytest.mark.parametrize("name", [n for n in FORMATS if not n.startswith(("bin", "uint"))])
def test_what_is_on_the_grid_already_stays(name):
    """The largest magnitude is on the grid, so a second quantisation finds the same scales and the same codes.

    Floor E8M0 saturates, but what is left is on its grid. Zero points are found again since 0 and both ends are codes.
    """
    fmt = Format.parse(name)
    once = fmt.round(matrix(seed=2))
    twice = fmt.round(once)
    # scales are recomputed from rounded numbers: one unit in the last place of float32 or float16 of the scale
    slack = 2.0**-10 if fmt.scale == "f16" else 2.0**-22
    assert float((once - twice).abs().max()) <= slack * float(once.abs().max())


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_error_of_integers_is_at_most_half_a_step(bits):
    x = matrix(seed=3)
    for granularity in ("row", "g32", "tensor"):
        q = Format.parse(f"int{bits}:{granularity}/f32").encode(x)
        step = q.scale.repeat_interleave(128 // q.scale.shape[1], 1)
        assert bool(((x - q.decode()).abs() <= 0.5 * step * (1 + 1e-5)).all())  # 1e-5: float32 division and product


def test_unsigned_integers_are_for_what_is_not_negative_and_have_twice_the_levels():
    x = matrix(seed=4).abs()
    error = {n: float((Format.parse(n).round(x) - x).norm()) for n in ("uint4:g64", "int4:g64")}
    assert error["uint4:g64"] < 0.6 * error["int4:g64"]  # 15 steps to 7: a little under half
    assert float(Format.parse("uint4:row").round(-x).abs().max()) == 0


def test_a_zero_point_serves_a_one_sided_range_better_and_keeps_zero_exact():
    x = matrix(seed=5).abs() + 0.5
    x[:, 0] = 0.0
    signed, zero = Format.parse("int4:row").round(x), Format.parse("zint4:row").round(x)
    assert float((zero - x).norm()) < 0.7 * float((signed - x).norm())
    assert bool((zero[:, 0] == 0).all())


def test_binary_scales_are_the_best_for_their_signs_and_bases_add_up():
    x = matrix(seed=6)
    fmt = Format.parse("bin1:row")
    q = fmt.encode(x)
    base = float((q.decode() - x).norm())
    for factor in (0.95, 1.05):
        assert float((fmt.encode(x, scale=q.scale * factor).decode() - x).norm()) > base
    errors = [float((Format.parse(f"bin{n}:row").round(x) - x).norm()) for n in (1, 2, 3, 4)]
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_two_bases_are_the_formula_of_the_paper():
    x = matrix(seed=7)
    s1 = x.abs().mean(1, keepdim=True)
    rest = x - s1 * x.sign()
    s2 = rest.abs().mean(1, keepdim=True)
    expected = s1 * x.sign() + s2 * rest.sign()
    assert torch.allclose(Format.parse("bin2:row").round(x), expected, rtol=1e-6, atol=1e-6)


def test_floor_scales_saturate_and_rceil_scales_do_not():
    x = torch.full((1, 32), 7.0)  # just above 6, the largest of E2M1
    assert float(Format.parse("e2m1:g32/e8m0-floor").encode(x).decode().max()) == 6.0
    assert float(Format.parse("mxfp4").encode(x).decode().max()) == 8.0  # 4 * 2


def test_zeros_stay_zeros_in_every_format_that_has_a_zero():
    for name in FORMATS:
        if not name.startswith("bin"):
            assert float(Format.parse(name).round(torch.zeros(2, 128)).abs().max()) == 0, name


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 13, 64])
def test_packing_of_every_width_round_trips_for_every_code(bits, columns):
    codes = torch.arange(3 * columns, dtype=torch.int64).remainder(2**bits).to(torch.uint8).view(3, columns)
    data = pack(codes, bits)
    assert data.shape == (3, math.ceil(columns * bits / 8))
    assert torch.equal(unpack(data, bits, columns, signed=False), codes)
    signed = ((codes.int() + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(unpack(pack(signed, bits), bits, columns, signed=True), signed)


def test_the_even_code_lies_in_the_low_nibble():
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    assert pack(torch.tensor([[-1, 7]], dtype=torch.int8), 4).tolist() == [[0x7F]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Format.parse("int9:row"), "int9"),
        (lambda: Format.parse("int4:g0"), "int4:g0"),
        (lambda: Format.parse("int4:g64/f64"), "unknown kind of scale 'f64'"),
        (lambda: Format.parse("int4:g64/e8m0"), "those are for floats"),
        (lambda: Format.parse("int4:g64").encode(matrix(2, 96)), "do not divide 96 columns; the largest group that does is 48"),
        (lambda: Format.parse("int8").encode(torch.zeros(2, 3, 4)), "takes a matrix"),
        (lambda: element("int1"), "give 2 to 8"),
        (lambda: element("fp4"), "unknown number format 'fp4'"),
        (lambda: Minifloat(7, 1), "no float of at most 8 bits"),
        (lambda: unpack(torch.zeros(2, 3, dtype=torch.uint8), 4, 8, signed=True), "8 codes of 4 bits are 4"),
        (lambda: pack(torch.zeros(2, 3), 4), "int8 or uint8 is needed"),
    ],
)  # fmt: skip
def test_refusals(make, says):
    with pytest.raises(FewstepError, match=says):
        make()


# -- torchao's prototypes ------------------------------------------------------------------------------------------------
def wide(rows=32, columns=256):
    """Blocks of very different size, so that scales of every kind come up."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.exp2(torch.randint(-8, 9, (rows, columns // 32), generator=generator).float()).repeat_interleave(
        32, 1
    )


@pytest.mark.parametrize("two_level", [True, False])
def test_nvfp4_is_torchaos_bit_for_bit(two_level):
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    x = wide()
    total = nvfp4.per_tensor_amax_to_scale(x.abs().max()) if two_level else None
    scale, data = nvfp4.nvfp4_quantize(x, 16, total)
    q = Format.parse("nvfp4").encode(x, tensor_scale=total if two_level else torch.tensor(1.0))
    kept = q.packed()
    assert torch.equal(kept["scale"].view(-1), scale.view(torch.uint8).view(-1))
    assert torch.equal(kept["codes"].view(-1), data.view(torch.uint8).view(-1))


@pytest.mark.parametrize("mode", ["FLOOR", "RCEIL"])
@pytest.mark.parametrize("kind", ["e4m3", "e5m2", "e2m1"])
def test_mx_is_torchaos_bit_for_bit(mode, kind):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m1": torch.float4_e2m1fn_x2}[kind]
    x = wide()
    scale, data = mx.to_mx(x, dtype, 32, mx.ScaleCalculationMode[mode])
    kept = Format.parse(f"{kind}:g32/e8m0" + ("-floor" if mode == "FLOOR" else "")).encode(x).packed()
    assert torch.equal(kept["scale"].view(-1), scale.view(torch.uint8).view(-1))
    assert torch.equal(kept["codes"].view(-1), data.contiguous().view(torch.uint8).view(-1))
