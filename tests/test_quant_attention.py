"""Attention in 8 bits: the reference against its formula in float64, and hung into networks and out of them again."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from fewstep import quant
from fewstep.errors import FewstepError, PlanError
from fewstep.eval import fingerprint
from fewstep.quant.attention import AttentionPlan, quantized_attention
from fewstep.quant.attention.install import attentions, problem_of
from fewstep.quant.formats import E4M3
from tests.eval_fixtures import tiny_dit, tiny_pipeline, tiny_sd3
from tests.quant_fixtures import tiny_flux
from tests.tensor_fixtures import relative


def qkv(tokens=150, keys=90, dim=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, tokens, dim, generator=generator)
    k = torch.randn(2, 3, keys, dim, generator=generator) + 4 * torch.randn(1, 3, 1, dim, generator=generator)
    return q, k, torch.randn(2, 3, keys, dim, generator=generator)


def written_out(q, k, v, plan, mask=None):
    """The formula of the reference, block by block, in float64 but for the roundings."""
    scale = math.log2(math.e) / math.sqrt(q.shape[-1])
    top, rounding = (127.0, torch.round) if plan.qk == "int8" else (448.0, E4M3.round)

    def blocks(x, size):
        out = torch.empty_like(x)
        for start in range(0, x.shape[2], size):
            part = x[:, :, start : start + size]
            step = part.abs().amax((2, 3), keepdim=True) / top
            out[:, :, start : start + size] = rounding(part / step) * step
        return out.double()

    k = k - k.mean(2, keepdim=True) if plan.smooth else k
    scores = blocks(q * scale, plan.blocks[0]) @ blocks(k, plan.blocks[1]).mT
    if mask is not None:
        scores = scores + mask.double() * math.log2(math.e)
    p = torch.exp2(scores - scores.amax(-1, keepdim=True))
    total = p.sum(-1, keepdim=True)
    if plan.pv == "fp8":
        step = v.abs().amax(2, keepdim=True) / 448
        p, v = E4M3.round((p * 448).float()).double() / 448, (E4M3.round(v / step) * step).double()
    elif plan.pv == "float16":
        p, v = p.half().double(), v.half().double()
    return p.double() @ v.double() / total


@pytest.mark.parametrize(
    "plan", [AttentionPlan(), AttentionPlan("fp8", "fp8"), AttentionPlan(pv="float", blocks=(16, 32))]
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_reference_is_its_formula(plan, masked):
    q, k, v = qkv()
    mask = torch.randn(2, 1, 150, 90, generator=torch.Generator().manual_seed(5)) if masked else None
    got = quantized_attention(q, k, v, plan, mask)
    # Scores of some 10 in float32 are off by 10 2^-24, which moves probabilities by as much. Where that turns a rounding of
    # P it moves one of 90 terms by 2^-11 in float16 and 2^-4 in E4M3, rarely.
    assert relative(got, written_out(q, k, v, plan, mask)) < {"float": 1e-5, "float16": 1e-4, "fp8": 1e-3}[plan.pv]


@pytest.mark.parametrize(("plan", "bound"), [(AttentionPlan(), 0.02), (AttentionPlan("int8", "fp8"), 0.05)])
def test_it_is_attention_to_8_bits_and_smoothing_is_why(plan, bound):
    q, k, v = qkv(seed=1)
    want = F.scaled_dot_product_attention(q, k, v)
    assert relative(quantized_attention(q, k, v, plan), want) < bound
    # Keys share an offset 4 times as large as what tells them apart, so their steps would be coarser by about that; the
    # queries' steps stay.
    fine, rough = (
        relative(quantized_attention(q, k, v, AttentionPlan(plan.qk, "float", smooth=smooth)), want)
        for smooth in (True, False)
    )
    assert rough > 1.5 * fine


def test_masks_hide_keys_and_scales_are_taken():
    q, k, v = qkv(seed=2)
    seen = torch.rand(150, 90, generator=torch.Generator().manual_seed(3)) > 0.5
    plan = AttentionPlan(pv="float")
    got = quantized_attention(q, k, v, plan, seen, scale=0.3)
    assert relative(got, F.scaled_dot_product_attention(q, k, v, seen, scale=0.3)) < 0.05  # scores twice as large
    v[:, :, ~seen[7]] = 1e6  # what query 7 does not see
    assert float(quantized_attention(q, k, v, plan, seen)[:, :, 7].abs().max()) < 100
    assert quantized_attention(q.half(), k.half(), v.half(), plan).dtype == torch.float16


def unet():
    return tiny_pipeline().unet, {"sample": noise(2, 4, 8, 8), "timestep": torch.tensor(5),
                                  "encoder_hidden_states": noise(2, 5, 32)}  # fmt: skip


def dit():
    return tiny_dit().transformer, {"hidden_states": noise(2, 4, 4, 4), "timestep": torch.tensor([7, 7]),
                                    "class_labels": torch.tensor([0, 1])}  # fmt: skip


def sd3():
    return tiny_sd3().transformer, {
        "hidden_states": noise(2, 4, 4, 4), "encoder_hidden_states": noise(2, 6, 64),
        "pooled_projections": noise(2, 32), "timestep": torch.tensor([500.0, 500.0]),
    }  # fmt: skip


def flux():
    return tiny_flux(), {
        "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 8, 32), "pooled_projections": noise(1, 32),
        "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def output(made):
    model, call = made
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


@pytest.mark.parametrize("family", [unet, dit, sd3, flux])
def test_every_family_takes_it_alone_and_beside_layers_and_comes_back(family, tmp_path):
    made = model, call = family()
    before, weights = output(made), fingerprint.of_module(model)
    report = quant.quantize_(model, AttentionPlan("int8", "fp8"), [call])
    assert set(report.plan.attention) == set(attentions(model)) != set()
    assert not report.plan.layers
    alone = output(made)
    assert 0 < relative(alone, before) < 0.1  # softmax of near equal scores: a few percent of the attention's share
    assert report.output_error == pytest.approx(relative(alone, before), rel=1e-3)  # the float twin computes in float
    quant.dequantize_(model)
    assert torch.equal(output(made), before)
    plan = quant.quantize_(model, quant.Int8(), attention=AttentionPlan()).plan
    assert plan.layers
    both = output(made)
    quant.save(model, tmp_path)
    again = family()
    quant.load_(again[0], tmp_path)
    assert torch.equal(output(again), both)
    assert quant.dequantize_(model) == len(plan.layers)
    assert torch.equal(output(made), before)
    assert fingerprint.of_module(model) == weights


def test_patterns_choose_attentions_and_plans_keep_them(tmp_path):
    model, _ = made = unet()
    before = output(made)
    plan = quant.quantize_(model, quant.Int8(), attention={"*attn1": AttentionPlan("fp8", blocks=(32, 32))}).plan
    assert plan.attention
    assert all(name.endswith("attn1") for name in plan.attention)
    first = output(made)
    quant.dequantize_(model)
    plan.save(tmp_path / "plan.json")
    assert quant.QuantPlan.load(tmp_path / "plan.json", model).attention == plan.attention
    body = {name: value for name, value in plan.to_json().items() if name != "attention"}
    assert quant.QuantPlan.from_json(body).layers == plan.layers  # as plans were before they had attentions
    quant.quantize_(model, quant.QuantPlan.load(tmp_path / "plan.json"))
    assert torch.equal(output(made), first)
    assert "fp8 QK" in str(plan)
    quant.dequantize_(model)
    assert torch.equal(output(made), before)


def test_what_cannot_be_is_refused_and_the_network_is_as_it_was(tmp_path):
    model, _ = made = unet()
    before = output(made)
    for wanted, says in (
        ({"*attn7": AttentionPlan()}, "attn7"),
        (AttentionPlan(backend="sage"), "sage"),
        (AttentionPlan(backend="saga"), "sage"),
        (AttentionPlan(backend="triton"), "Triton"),
    ):
        with pytest.raises(FewstepError, match=says):
            quant.quantize_(model, quant.Int8(), attention=wanted)
        assert torch.equal(output(made), before)
    quant.quantize_(model, AttentionPlan())
    with pytest.raises(FewstepError, match="dequantize_"):
        quant.quantize_(model, quant.Int8())
    for body, says in (({"qk": "int7"}, "int8"), ({"bits": 4}, "bits"), ({"blocks": [0, 4]}, "tokens"), ([], "table")):
        with pytest.raises(PlanError, match=says):
            AttentionPlan.from_json(json.loads(json.dumps(body)))


def test_one_of_diffusers_backends_is_called_and_compared_once(monkeypatch):
    model, _ = made = unet()
    before = output(made)
    plan = AttentionPlan(backend="_native_math")  # there on every machine; its numbers are those of float attention
    assert problem_of(plan, torch.device("cpu")) is None
    quant.quantize_(model, plan)
    assert relative(output(made), before) < 1e-5
    quant.dequantize_(model)
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", lambda q, k, v, **kwargs: q * 0)
    quant.quantize_(model, plan)
    with pytest.raises(FewstepError, match="off by 100%"):
        output(made)
    quant.dequantize_(model)
    assert torch.equal(output(made), before)
