"""Quantised networks with LoRA, offloading and compilation."""

import pytest
import torch

from fewstep import quant
from fewstep.errors import FewstepError
from fewstep.quant.layers import QuantLinear
from tests.quant_fixtures import dit, error, outputs, same, unet
from tests.tensor_fixtures import noise


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
