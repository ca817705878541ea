"""8-bit attention in Triton's interpreter, against the reference and against the formula in float64 on the same codes."""

import math

import pytest
import torch
from torch.nn import functional as F

from fewstep.errors import FewstepError
from fewstep.quant.attention import AttentionPlan, quantized_attention
from fewstep.quant.attention.reference import rounded_tokens, smoothed
from fewstep.quant.kernels import triton as kernels
from tests.triton_fixtures import noise


def qkv(tokens, keys, dim, wide):
    key = noise(2, 2, keys, dim, seed=1) + 3 * noise(1, 2, 1, dim, seed=2)
    return noise(2, 2, tokens, dim), key, noise(2, 2, keys, wide, seed=3)


@pytest.mark.parametrize(
    ("tokens", "keys", "dim", "wide"), [(150, 90, 40, 40), (20, 77, 72, 24), (129, 64, 64, 64), (1, 1, 16, 16)]
)
@pytest.mark.parametrize("blocks", [(128, 64), (256, 128)])
def test_it_is_softmax_of_the_codes_products(tokens, keys, dim, wide, blocks):
    q, k, v = qkv(tokens, keys, dim, wide)
    plan = AttentionPlan(blocks=blocks)
    got = kernels.int8_attention(q, k, v, plan)
    (a, sa), (b, sb) = (
        rounded_tokens(x, size, "int8")
        for x, size in zip((q * (math.log2(math.e) / math.sqrt(dim)), smoothed(k, plan)), blocks, strict=True)
    )
    scores = (a.double() * sa) @ (b.double() * sb).mT
    p = torch.exp2(scores - scores.amax(-1, keepdim=True))
    values = v.half().double()
    want = p @ values / p.sum(-1, keepdim=True)
    # P in float16: each of its numbers is off by at most 2^-11 of itself, or 2^-25 where it is subnormal.
    bound = 2.0**-11 * (p @ values.abs()) / p.sum(-1, keepdim=True) + 2.0**-24 * keys * values.abs().amax()
    assert bool(((got.double() - want).abs() <= bound).all())
    reference = quantized_attention(q, k, v, plan)
    assert bool(((got - reference).abs() <= 2 * bound).all())


def test_scales_and_dtypes_are_taken():
    q, k, v = qkv(40, 50, 32, 32)
    got = kernels.int8_attention(q.half(), k.half(), v.half(), scale=0.1)
    want = F.scaled_dot_product_attention(q, k, v, scale=0.1)
    assert got.dtype == torch.float16
    assert float((got.float() - want).norm() / want.norm()) < 0.02


def test_values_beyond_float16_do_not_overflow():
    q, k, v = qkv(40, 50, 32, 32)
    far = (2.0**20 * v).bfloat16()  # a power of two: the same numbers, further out
    got = kernels.int8_attention(q, k, far) / 2.0**20
    want = kernels.int8_attention(q, k, v.bfloat16())
    assert float((got - want).abs().max()) <= 2.0**-10 * float(v.abs().max())  # both round values to float16's 11 bits


def test_what_it_does_not_take_is_said():
    q, k, v = qkv(8, 8, 16, 16)
    for call, says in (
        (lambda: kernels.int8_attention(q, k, v, AttentionPlan("fp8")), "int8 QK"),
        (lambda: kernels.int8_attention(q, k, v, AttentionPlan(blocks=(64, 64))), "multiples of"),
        (lambda: kernels.int8_attention(q, k[:1], v), "keys of"),
        (lambda: kernels.int8_attention(q.double(), k, v), "float64"),
        (lambda: kernels.int8_attention(q, k[:, :, :0], v[:, :, :0]), "no keys"),
        (lambda: kernels.int8_attention(*qkv(4, 4, 300, 300)), "300"),
    ):
        with pytest.raises(FewstepError, match=says):
            call()
