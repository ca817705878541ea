"""quantize_, save, load_, dequantize_ on tiny random instances of the families, LoRA, offload, refusals."""

import copy
import json

import pytest
import torch
from torch import nn

from fewstep import eval as evaluation
from fewstep import quant
from fewstep.errors import ArtifactError, FewstepError, PlanError
from fewstep.eval import fingerprint
from fewstep.eval.sweeps.transforms import make_transform, unchanged
from fewstep.quant.calibration.calls import Call, first_tensor
from fewstep.quant.layers import QuantLinear
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.sites import quantized_layers, role_of, sites
from tests.eval_fixtures import PROMPTS, tiny_dit, tiny_pipeline, tiny_sd3, tiny_unconditional


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet():
    return tiny_pipeline().unet, [
        {"sample": noise(2, 4, 8, 8, seed=i), "timestep": torch.tensor(100 * i + 1),
         "encoder_hidden_states": noise(2, 5, 32, seed=i)}
        for i in range(3)
    ]  # fmt: skip


def unconditional():
    return tiny_unconditional().unet, [(noise(2, 1, 16, 16, seed=i), torch.tensor(200 * i + 1)) for i in range(3)]


def dit():
    labels = torch.tensor([0, 1])
    return tiny_dit().transformer, [
        {"hidden_states": noise(2, 4, 4, 4, seed=i), "timestep": torch.tensor([7, 7]), "class_labels": labels}
        for i in range(3)
    ]


def sd3():
    return tiny_sd3().transformer, [
        {
            "hidden_states": noise(2, 4, 4, 4, seed=i), "encoder_hidden_states": noise(2, 6, 64, seed=i),
            "pooled_projections": noise(2, 32, seed=i), "timestep": torch.tensor([500.0, 500.0]),
        }
        for i in range(3)
    ]  # fmt: skip


def pixart():
    from diffusers import PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
            patch_size=2, cross_attention_dim=16, caption_channels=24, use_additional_conditions=False,
        )  # fmt: skip
    return model.eval(), [
        {
            "hidden_states": noise(2, 4, 4, 4, seed=i), "encoder_hidden_states": noise(2, 3, 24, seed=i),
            "timestep": torch.tensor([3, 3]), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        for i in range(3)
    ]  # fmt: skip


def flux():
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    return model.eval(), [
        {
            "hidden_states": noise(1, 16, 4, seed=i), "encoder_hidden_states": noise(1, 5, 32, seed=i),
            "pooled_projections": noise(1, 32, seed=i), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        }
        for i in range(3)
    ]  # fmt: skip


FAMILIES = {"unet": unet, "unconditional": unconditional, "dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux}


def outputs(model, calls):
    with torch.no_grad():
        return [first_tensor(model(**c) if isinstance(c, dict) else model(*c)) for c in calls]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def error(a, b):
    return sum(float((x - y).norm()) for x, y in zip(a, b, strict=True)) / sum(float(y.norm()) for y in b)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_quantises_saves_loads_on_meta_and_comes_back(family, tmp_path):
    model, calls = FAMILIES[family]()
    before, weights = outputs(model, calls), fingerprint.of_module(model)
    report = quant.quantize_(model, quant.Int8(), calls)
    after = outputs(model, calls)
    assert 0 < error(after, before) < 0.05  # 8 bits: about 1 % a layer in a handful of layers
    assert report.output_error == pytest.approx(error(after, before), rel=0.5)
    assert report.bytes < report.float_bytes
    assert set(quantized_layers(model)) == set(report.plan.layers)
    quant.save(model, tmp_path)
    with torch.device("meta"):
        empty = type(model).from_config(model.config)
    plan = quant.load_(empty.eval(), tmp_path)
    assert plan.to_json() == report.plan.to_json()
    assert same(outputs(empty, calls), after)
    assert quant.dequantize_(model) == len(report.plan.layers)
    assert fingerprint.of_module(model) == weights
    assert same(outputs(model, calls), before)


@pytest.mark.parametrize("config", ["Int8()", "Int4()", "W4A8()", "FP8()", "FP4()", "Binary(bases=2)"])
def test_a_config_is_a_value_of_a_sweeps_axis_and_leaves_nothing_behind(config):
    pipe = tiny_pipeline()
    transform = make_transform("quant", config)
    plain = evaluation.draw(pipe, PROMPTS[:1], [0], steps=2, guidance=1.0)
    with unchanged(pipe, config):
        with transform.applied("quant", pipe):
            assert quantized_layers(pipe.unet)
            evaluation.draw(pipe, PROMPTS[:1], [0], steps=2, guidance=1.0)
        assert torch.equal(evaluation.draw(pipe, PROMPTS[:1], [0], steps=2, guidance=1.0), plain)


def test_more_bits_are_less_error():
    errors = []
    for bits in (2, 4, 8):
        model, calls = unet()
        errors.append(quant.quantize_(model, Nearest(f"int{bits}:g8"), calls).output_error)
    # Steps go as 1 / (2^(b-1) - 1): 1, 1/7, 1/127. A factor of 2 for saturation at one step.
    assert errors[2] < errors[1] / 9 < errors[0] / 27


def test_a_file_is_smaller_than_16_bits_by_what_the_plan_says(tmp_path):
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DModel(
            sample_size=8, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=8, attention_head_dim=32,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).half().float()  # fmt: skip
    plan = quant.quantize_(model, quant.Int4()).plan
    path = quant.save(model, tmp_path)
    written = sum(file.stat().st_size for file in path.parent.glob("*.safetensors"))
    header = 200 * len(list(model.parameters()))  # names and offsets
    assert plan.nbytes <= written <= plan.nbytes + header
    assert plan.nbytes < 0.35 * plan.float_bytes  # 4.25 bits of 16, and the first and last layers and embeddings


def test_lora_that_wraps_a_layer_stays_and_has_no_part_in_names():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, calls = unet()
    bare = quant.Int8().plan(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    wrapped = outputs(model, calls)
    report = quant.quantize_(model, quant.Int8(), calls)
    assert report.plan.to_json() == bare.to_json()
    assert 0 < error(outputs(model, calls), wrapped) < 0.05
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == sum(
        len(v) == 2 for v in bare.shapes.values() if v
    ) - sum(len(bare.shapes[n]) == 2 for n in bare.kept)
    quant.dequantize_(model)
    assert same(outputs(model, calls), wrapped)


def test_lora_can_be_added_to_quantised_layers():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, calls = unet()
    quant.quantize_(model, quant.Int8())
    before = outputs(model, calls)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=True))  # starts at zero
    assert same(outputs(model, calls), before)


def test_adapters_are_columns_of_the_branch(tmp_path):
    model, calls = unet()
    quant.quantize_(model, quant.Int8())
    before = outputs(model, calls)
    names = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"]
    layers = [model.get_submodule(name) for name in names]
    a = [noise(3, *layer.shape[1:], seed=i) / 10 for i, layer in enumerate(layers)]
    b = [noise(layer.shape[0], 3, seed=9 + i) for i, layer in enumerate(layers)]
    weights = [layer.weight.clone() for layer in layers]
    assert quant.add_lora_(model, {n: (x, y) for n, x, y in zip(names, a, b, strict=True)}, scale=0.5) == 2
    for layer, old, x, y in zip(layers, weights, a, b, strict=True):
        assert torch.allclose(layer.weight, old + 0.5 * torch.einsum("nr,r...->n...", y, x), atol=1e-5)
    assert not same(outputs(model, calls), before)
    with pytest.raises(FewstepError, match="remove_lora_ first"):
        quant.save(model, tmp_path)
    assert quant.remove_lora_(model) == 2
    assert same(outputs(model, calls), before)
    with pytest.raises(FewstepError, match=r"A is \(3, 5\) and B \(3, 3\); rank x 16 and 16 x rank"):
        quant.add_lora_(model, {names[0]: (torch.ones(3, 5), torch.ones(3, 3))})
    with pytest.raises(FewstepError, match="unknown quantised layer 'conv_in'"):
        quant.add_lora_(model, {"conv_in": (torch.ones(3, 5), torch.ones(3, 3))})


def test_offloading_after_quantising_computes_the_same_and_before_is_refused():
    from accelerate import cpu_offload

    model, calls = unet()
    quant.quantize_(model, quant.Int8())
    before = outputs(model, calls)
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert same(outputs(model, calls), before)
    fresh, _ = unet()
    cpu_offload(fresh, execution_device=torch.device("cpu"))
    with pytest.raises(FewstepError, match="offload hook; quantise first"):
        quant.quantize_(fresh, quant.Int8())


def test_compiled_blocks_follow():
    model, calls = dit()
    plain = outputs(model, calls)
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    outputs(model, calls)
    quant.quantize_(model, quant.Int8(), calls)
    compiled = outputs(model, calls)
    twin, _ = dit()
    quant.quantize_(twin, quant.Int8())
    assert error(compiled, outputs(twin, calls)) < 1e-5
    quant.dequantize_(model)
    assert error(outputs(model, calls), plain) < 1e-6
    whole = torch.compile(dit()[0], backend="eager")
    quant.quantize_(whole, quant.Int8())
    assert error(outputs(whole, calls), outputs(twin, calls)) < 1e-5


def test_half_precision_keeps_its_layers_and_gives_them_back():
    model, _ = unet()
    model.half()
    weights = fingerprint.of_module(model)
    quant.quantize_(model, quant.Int8())
    assert all(p.dtype != torch.float32 for n, p in model.named_parameters() if not n.endswith("scale"))
    quant.dequantize_(model)
    assert fingerprint.of_module(model) == weights


def test_without_originals_the_weights_are_what_the_codes_say():
    model, calls = unet()
    quant.quantize_(model, quant.Int4(), keep_originals=False)
    layer = next(iter(quantized_layers(model).values()))
    expected = layer.weight.clone()
    quant.dequantize_(model)
    assert not quantized_layers(model)
    assert any(torch.equal(m.weight, expected) for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d))
    assert quant.dequantize_(model) == 0
    outputs(model, calls)


def test_a_copy_of_a_quantised_network_is_a_quantised_network(tmp_path):
    model, calls = unet()
    quant.quantize_(model, quant.Int8())
    twin = copy.deepcopy(model)
    assert same(outputs(twin, calls), outputs(model, calls))
    quant.dequantize_(twin)
    assert quantized_layers(model)
    quant.save(model, tmp_path)


# -- plans ---------------------------------------------------------------------------------------------------------------
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


# -- refusals: every one leaves the network as it was ---------------------------------------------------------------------
class Failing(quant.Int8):
    def arrays(self, site, plan, inputs):
        if site.name.startswith("up_blocks"):
            raise RuntimeError("out of memory")
        return super().arrays(site, plan, inputs)


def spoiled(plan, **change):
    name = next(iter(plan.layers))
    return plan.with_layers({name: quant.LayerPlan(**({"weight": "int4:row"} | change))})


def bad_call(calls, sample):
    return [calls[0] | {"sample": sample}]


def spoil_weight(model):
    model.mid_block.resnets[0].conv1.weight.data.fill_(float("nan"))
    return model


Q, INT8, INT4 = quant.quantize_, quant.Int8(), quant.Int4()
REFUSALS = {
    "twice": (lambda m, c: (Q(m, INT8), Q(m, INT8)), "quantised layers already"),
    "group": (lambda m, c: Q(m, spoiled(INT4.plan(m), weight="int4:g48")), "groups of 48, which do not divide"),
    "rank": (lambda m, c: Q(m, spoiled(INT4.plan(m), rank=99)), "planned as"),
    "no config": (lambda m, c: Q(m, "int8"), "config is a str"),
    "no network": (lambda m, c: Q(tiny_pipeline(), INT8), r"give a component, such as pipe\.unet"),
    "nan calibration": (lambda m, c: Q(m, INT8, bad_call(c, c[0]["sample"] * float("nan"))), "call 0: sample has NaN"),
    "constant calibration": (lambda m, c: Q(m, INT8, bad_call(c, torch.ones(2, 4, 8, 8))), "sample is constant"),
    "empty calibration": (lambda m, c: Q(m, INT8, []), "has no calls"),
    "one tensor": (lambda m, c: Q(m, INT8, torch.ones(3)), "give a list of calls"),
    "backend": (lambda m, c: Q(m, INT4, backend="onednn"), "backend onednn cannot compute"),
    "unknown backend": (lambda m, c: Q(m, INT4, backend="cudnn"), "unknown backend 'cudnn'"),
    "role": (lambda m, c: Q(m, quant.Int8(keep=("egde",))), "unknown role 'egde'; did you mean 'edge'"),
    "nothing": (lambda m, c: Q(m, quant.Int8(keep=("*",))), "no layer that Int8 would quantise"),
    "fails late": (lambda m, c: Q(m, Failing()), "out of memory"),
    "nan weight": (lambda m, c: Q(spoil_weight(m), INT8), r"mid_block\.resnets\.0\.conv1 has NaN"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_the_network_alone(case):
    act, says = REFUSALS[case]
    model, calls = unet()
    modules = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises((FewstepError, RuntimeError), match=says):
        act(model, calls)
    if case == "twice":
        quant.dequantize_(model)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert quant.plan_of(model) is None
    if case != "nan weight":
        assert same(outputs(model, calls), outputs(unet()[0], calls))


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


def test_files_of_other_networks_damaged_files_and_unquantised_networks(tmp_path):
    model, _ = unet()
    with pytest.raises(FewstepError, match="is not quantised; quantize_ it first"):
        quant.save(model, tmp_path)
    quant.quantize_(model, quant.Int8())
    path = quant.save(model, tmp_path)
    other = unconditional()[0]
    before = fingerprint.of_module(other)
    with pytest.raises(ArtifactError, match="holds a UNet2DConditionModel with fingerprint"):
        quant.load_(other, tmp_path)
    assert fingerprint.of_module(other) == before
    with pytest.raises(FewstepError, match="quantised layers already"):
        quant.load_(model, tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        quant.load_(unet()[0], tmp_path / "nowhere")
    arrays = next(tmp_path.glob("*.safetensors"))
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 1
    arrays.write_bytes(bytes(data))
    fresh = unet()[0]
    with pytest.raises(ArtifactError, match="damaged"):
        quant.load_(fresh, tmp_path)
    body = json.loads(path.read_text())
    body["plan"]["layers"]["conv_in"] = {"weight": "int5.row"}
    path.write_text(json.dumps(body))
    with pytest.raises((ArtifactError, FewstepError), match="no number format"):
        quant.load_(fresh, tmp_path)
    assert not quantized_layers(fresh)


# -- calibration ----------------------------------------------------------------------------------------------------------
def test_recorded_calls_are_those_that_the_pipeline_made():
    pipe = tiny_pipeline()
    calls = quant.record(pipe, PROMPTS, num_inference_steps=4, samples=3, guidance=3.0, keep=2)
    assert [call.batch for call in calls] == [2] * 4
    assert [call.timestep for call in calls] == sorted((call.timestep for call in calls), reverse=True)
    again = quant.record(pipe, PROMPTS, num_inference_steps=4, samples=3, guidance=3.0, keep=2)
    assert all(torch.equal(a.tensors()[0][1], b.tensors()[0][1]) for a, b in zip(calls, again, strict=True))
    assert not pipe.unet._forward_pre_hooks
    assert isinstance(calls[0], Call)


def test_gathered_inputs_are_the_layers_own_whatever_the_budget():
    from fewstep.quant.calibration.calls import as_calls
    from fewstep.quant.calibration.inputs import gather

    model, calls = unet()
    seen = {}
    site = next(s for s in sites(model) if s.name == "mid_block.attentions.0.transformer_blocks.0.ff.net.2")
    handle = site.module.register_forward_pre_hook(
        lambda m, a: seen.setdefault("x", []).append(a[0].reshape(-1, a[0].shape[-1]))
    )
    outputs(model, calls)
    handle.remove()
    everything = torch.cat(seen["x"])
    found = {}
    for budget in (1, 2**30):
        for got_site, inputs in gather(model, sites(model), as_calls(calls), rows=10**6, budget=budget):
            found.setdefault(got_site.name, []).append(inputs)
    small, large = found[site.name]
    assert all(len(v) == 2 for v in found.values())
    assert torch.equal(small.sample.sort(0).values, everything.sort(0).values)
    assert torch.equal(small.channel_max, large.channel_max)
    assert torch.equal(small.channel_max, everything.abs().amax(0))
    assert float(small.high.max()) == pytest.approx(float(everything.max()))


def test_a_stopped_calibration_goes_on_and_a_folder_for_another_plan_is_refused(tmp_path):
    model, calls = unet()
    with pytest.raises(RuntimeError, match="out of memory"):
        quant.quantize_(model, Failing(), calls, checkpoint=tmp_path)
    held = len(list(tmp_path.glob("*.safetensors")))
    assert held > 3

    class Counting(Failing):
        asked = []  # noqa: RUF012

        def arrays(self, site, plan, inputs):
            self.asked.append(site.name)
            return quant.Int8.arrays(self, site, plan, inputs)

    Counting.__name__ = "Failing"  # the same method, repaired
    report = quant.quantize_(model, Counting(), calls, checkpoint=tmp_path)
    assert len(Counting.asked) == len(report.plan.layers) - held
    twin, _ = unet()
    quant.quantize_(twin, quant.Int8())
    assert same(outputs(model, calls), outputs(twin, calls))
    with pytest.raises(ArtifactError, match="another plan or other calls"):
        quant.quantize_(unet()[0], quant.Int4(), calls, checkpoint=tmp_path)
