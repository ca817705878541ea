"""quantize_, save, load_ and dequantize_ on tiny random instances of the families."""

import copy

import pytest
import torch
from torch import nn

from fewstep import eval as evaluation
from fewstep import quant
from fewstep.eval import fingerprint
from fewstep.eval.sweeps.transforms import make_transform, unchanged
from fewstep.quant.methods.nearest import Nearest
from fewstep.quant.sites import quantized_layers
from tests.eval_fixtures import PROMPTS, tiny_pipeline
from tests.quant_fixtures import FAMILIES, error, outputs, same, unet


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
