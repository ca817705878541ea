"""What quantisation refuses, and that every refusal leaves the network as it was."""

import json

import pytest
import torch

from fewstep import quant
from fewstep.errors import ArtifactError, FewstepError
from fewstep.eval import fingerprint
from fewstep.quant.sites import quantized_layers
from tests.eval_fixtures import tiny_pipeline
from tests.quant_fixtures import Failing, outputs, same, unconditional, unet


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
