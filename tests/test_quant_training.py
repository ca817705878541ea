"""Training of quantised layers: gradients, and every method better than its own start on a tiny network."""

import pytest
import torch
from torch import nn

from fewstep import quant
from fewstep.errors import FewstepError
from fewstep.eval import fingerprint
from fewstep.quant.formats import Format
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import build
from fewstep.quant.methods.trained import least_squares
from fewstep.quant.sites import quantized_layers
from fewstep.quant.training.layers import Trainable, TrainedLayer, signs_through
from tests.eval_fixtures import tiny_dit


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def shared():
    pipe = tiny_dit()
    return pipe.transformer, quant.record(
        pipe, ("dress", "bag"), num_inference_steps=3, samples=4, guidance=3.0, keep=4
    )


@pytest.fixture
def recorded(shared):
    yield shared
    quant.dequantize_(shared[0])


METHODS = {
    "EfficientDM": lambda n: quant.EfficientDM(weight="int3:g8", activation="int4:g8", iterations=n, rank=4),
    "QuEST": lambda n: quant.QuEST(weight="int3:g8", activation="int4:g8", iterations=n),
    "BinaryDM": lambda n: quant.BinaryDM(weight="bin2:g16", iterations=n),
    "BitsFusion": lambda n: quant.BitsFusion(weight="bint2:g16", iterations=n),
    "floats": lambda n: quant.EfficientDM(weight="e2m1:g16", activation="e2m1:g16", iterations=n),
}


@pytest.mark.parametrize("name", METHODS)
def test_training_is_better_than_its_own_start_and_touches_no_float(name, recorded):
    model, calls = recorded
    before = fingerprint.of_module(model)
    flags = [p.requires_grad for p in model.parameters()]
    start = quant.quantize_(model, METHODS[name](0), calls).output_error
    quant.dequantize_(model)
    report = quant.quantize_(model, METHODS[name](60), calls)
    assert report.output_error < 0.95 * start
    assert report.findings["noise_after_training"] < report.findings["noise_before_training"]
    quant.dequantize_(model)
    assert fingerprint.of_module(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_some_samples_are_for_judging_only(recorded):
    from fewstep.quant.training.distil import held_out

    _, calls = recorded
    seen, unseen = held_out(calls)
    assert [call.batch for call in seen] == [3] * len(calls)
    assert [call.batch for call in unseen] == [1] * len(calls)
    for call, a, b in zip(calls, seen, unseen, strict=True):
        x, y, z = (c.tensors()[0][1] for c in (call, a, b))
        assert torch.equal(torch.cat([y, z]), x)
    single = [call.select([0]) for call in calls] * 2
    assert [len(part) for part in held_out(single)] == [5, 1]


def test_only_the_named_layers_are_trained(recorded):
    model, calls = recorded
    config = {"weight": "int3:g8", "activation": "int4:g8", "only": ("to_q",), "rate": 0.05}
    quant.quantize_(model, quant.QuEST(**config, iterations=0), calls)
    start = {name: layer.codes.clone() for name, layer in quantized_layers(model).items()}
    quant.dequantize_(model)
    quant.quantize_(model, quant.QuEST(**config, iterations=60), calls)
    changed = {name for name, layer in quantized_layers(model).items() if not torch.equal(layer.codes, start[name])}
    assert changed == {name for name in start if name.endswith("to_q")}
    quant.dequantize_(model)
    with pytest.raises(FewstepError, match="no quantised layer has any of to_z in its name"):
        quant.quantize_(model, quant.QuEST(only=("to_z",), weight="int3:g8", activation="int4:g8"), calls)
    assert not quantized_layers(model)


@pytest.mark.parametrize("format", ["int4:g32", "bin2:g32", "e2m1:g16", "nvfp4"])
def test_a_layer_in_training_computes_what_the_finished_one_does(format):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(64, 32)
    x = torch.randn(5, 64, generator=seeded(1))
    made = build(layer, LayerPlan(format, "int8:row"))
    trained = TrainedLayer(layer, made, Trainable())
    assert torch.allclose(trained(x), made(x), atol=1e-5)
    codes, bias = trained.finished()
    assert torch.equal(codes.decode(), made.quantized_weight().decode())
    assert torch.equal(bias, layer.bias)
    trained(x).square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().sum() > 0) for p in (trained.delta, trained.bias, trained.stretch)
    )


def test_gradients_of_signs_are_those_of_the_paper():
    w = torch.tensor([[0.4, -0.2, 1.7, -0.9]], requires_grad=True)
    scale = torch.tensor([[[0.5, 0.1]]], requires_grad=True)
    out = signs_through(w, Format.parse("bin2:row"), scale)
    # signs + - + - ; what is left -0.1, 0.3, 1.2, -0.4 gives - + + -
    assert torch.allclose(out, torch.tensor([[0.4, -0.4, 0.6, -0.6]]))
    out.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert w.grad.tolist() == [[1.0, 2.0, 0.0, 4.0]]
    assert scale.grad.tolist() == [[[1 - 2 + 3 - 4, -1 + 2 + 3 - 4]]]


def test_alternating_scales_are_no_worse_than_the_largest_magnitudes_and_are_stationary():
    matrix = torch.randn(16, 64, generator=seeded(2))
    format = Format.parse("bint1:row")
    codes = least_squares(matrix, format)
    assert float((codes.decode() - matrix).norm()) < 0.9 * float((format.round(matrix) - matrix).norm())
    values = codes.codes.float()
    again = (matrix * values).sum(1) / values.square().sum(1)
    assert torch.allclose(again, codes.scale[:, 0], rtol=0.05)


def test_late_steps_are_drawn_as_their_density_says():
    method = quant.BitsFusion()
    assert method._chance(1.0) == 1.0
    assert method._chance(0.5) == pytest.approx(0.25)
