"""Plans of bits: printed, saved, compared, counted, and refused for another network."""

import json

import pytest

from fewstep import quant
from fewstep.errors import PlanError
from fewstep.quant.sites import role_of
from tests.quant_fixtures import dit, unet


def test_a_plan_is_printed_saved_compared_and_followed(tmp_path):
    model, calls = unet()
    plan = quant.Int4().plan(model)
    name = next(iter(plan.layers))
    mixed = plan.with_layers({name: quant.LayerPlan("int8:row"), list(plan.layers)[1]: None})
    assert set(plan.diff(mixed)) == {name, list(plan.layers)[1]}
    assert name in str(mixed)
    assert "kept: by the plan" in str(mixed)
    mixed.save(tmp_path / "plan.json")
    back = quant.QuantPlan.load(tmp_path / "plan.json", model)
    assert back.to_json() == mixed.to_json()
    for config in (back, quant.MixedPrecision(back), quant.MixedPrecision(tmp_path / "plan.json", gptq=True)):
        report = quant.quantize_(model, config, calls)
        assert report.plan.layers == mixed.layers
        quant.dequantize_(model)
    assert len(mixed.plot().axes[0].patches) == len(mixed.shapes)


def test_bytes_of_a_plan_are_counted_as_stored():
    model, _ = unet()
    plan = quant.Int4().plan(model)
    n, k = plan.matrix("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj")
    group = plan.layers["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"].weight.group
    assert (
        plan.layer_bytes("mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj") == n * k // 2 + 2 * n * k // group
    )
    assert plan.float_bytes == 2 * sum(p.numel() for p in model.parameters())


def test_roles_of_known_names():
    assert {
        "conv_in": role_of("conv_in", True),
        "time": role_of("down_blocks.0.resnets.0.time_emb_proj", False),
        "cross": role_of("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", False),
        "self": role_of("transformer_blocks.3.attn.add_q_proj", False),
        "ff": role_of("transformer_blocks.3.ff_context.net.2", False),
        "adaln": role_of("single_transformer_blocks.0.norm.linear", False),
        "single": role_of("single_transformer_blocks.0.proj_mlp", False),
        "res": role_of("up_blocks.1.resnets.0.conv1", True),
        "short": role_of("up_blocks.1.resnets.0.conv_shortcut", True),
        "last": role_of("proj_out", False),
    } == {
        "conv_in": "edge", "time": "embedding", "cross": "cross", "self": "attention", "ff": "feedforward",
        "adaln": "modulation", "single": "feedforward", "res": "convolution", "short": "shortcut", "last": "edge",
    }  # fmt: skip


def test_plans_of_other_networks_and_layers_that_are_not_there():
    model, _ = unet()
    plan = quant.Int8().plan(model)
    with pytest.raises(PlanError, match="this DiTTransformer2DModel has"):
        plan.validate(dit()[0])
    with pytest.raises(PlanError, match="unknown layer 'conv_on'; did you mean 'conv_in'"):
        plan.with_layers({"conv_on": None})
    body = plan.to_json()
    for name, says in (("mid_block.resnets.0.norm1", "is a GroupNorm"), ("mid_block.resnets.9.conv1", "unknown layer")):
        changed = json.loads(json.dumps(body))
        changed["layers"][name], changed["shapes"][name] = {"weight": "int8:row"}, [8, 8]
        with pytest.raises(PlanError, match=says):
            quant.QuantPlan.from_json(changed).validate(model)
    with pytest.raises(PlanError, match="differing: colour"):
        quant.QuantPlan.from_json(body | {"colour": 1})
