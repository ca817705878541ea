"""Training of quantised layers: gradients, and every method better than its own start on a tiny network."""

import itertools
from dataclasses import replace

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
from fewstep.quant.training.data import Feed, split
from fewstep.quant.training.judge import fell
from fewstep.quant.training.layers import Trainable, TrainedLayer, signs_through
from fewstep.quant.training.noised import with_sample
from tests.eval_fixtures import tiny_dit
from tests.tensor_fixtures import generator


@pytest.fixture(scope="module")
def shared():
    pipe = tiny_dit()
    return pipe.transformer, quant.record(pipe, ("dress", "bag"), num_inference_steps=3, samples=4, guidance=3.0)


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


def test_whole_samples_are_set_apart_and_only_judged_by(recorded):
    _, calls = recorded
    assert [call.samples for call in calls] == [(0, 1, 2, 3, 0, 1, 2, 3)] * len(calls)  # both halves of guidance
    seen, unseen = split(calls)
    assert seen == [(i, [0, 1, 2, 4, 5, 6]) for i in range(len(calls))]
    assert unseen == [(i, [3, 7]) for i in range(len(calls))]
    few = [call.select([0, 1, 2, 3]) for call in calls]
    nameless = [replace(call, samples=None) for call in few]
    assert split(nameless) == ([(i, [0, 1, 2]) for i in range(3)], [(i, [3]) for i in range(3)])
    single = [call.select([0]) for call in nameless] * 2
    assert [len(part) for part in split(single)] == [5, 1]
    one = [call.select([0]) for call in calls]
    assert split(one)[0] == split(one)[1]  # one sample: nothing can be set apart


def test_only_the_named_layers_are_trained(recorded):
    model, calls = recorded
    calls = list(calls)  # judged call by call: on so small a network the sampler's end is luck
    config = {"weight": "int3:g8", "activation": "int4:g8", "only": ("ff.net.2",), "rate": 0.02}
    quant.quantize_(model, quant.QuEST(**config, iterations=0), calls)
    start = {name: layer.codes.clone() for name, layer in quantized_layers(model).items()}
    quant.dequantize_(model)
    quant.quantize_(model, quant.QuEST(**config, iterations=60), calls)
    changed = {name for name, layer in quantized_layers(model).items() if not torch.equal(layer.codes, start[name])}
    assert changed == {name for name in start if name.endswith("ff.net.2")}
    quant.dequantize_(model)
    with pytest.raises(FewstepError, match="no quantised layer has any of to_z in its name"):
        quant.quantize_(model, quant.QuEST(only=("to_z",), weight="int3:g8", activation="int4:g8"), calls)
    assert not quantized_layers(model)


@pytest.mark.parametrize("format", ["int4:g32", "bin2:g32", "e2m1:g16", "nvfp4"])
def test_a_layer_in_training_computes_what_the_finished_one_does(format):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(64, 32)
    x = torch.randn(5, 64, generator=generator(1))
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
    matrix = torch.randn(16, 64, generator=generator(2))
    format = Format.parse("bint1:row")
    codes = least_squares(matrix, format)
    assert float((codes.decode() - matrix).norm()) < 0.9 * float((format.round(matrix) - matrix).norm())
    values = codes.codes.float()
    again = (matrix * values).sum(1) / values.square().sum(1)
    assert torch.allclose(again, codes.scale[:, 0], rtol=0.05)


def test_every_call_is_drawn_equally_often_and_late_ones_by_their_density(recorded):
    _, calls = recorded
    seen, _ = split(calls)
    draws = [draw for draw, _ in zip(Feed(calls, seen, rows=4), range(30), strict=False)]
    counts = [sum(draw[0][0] == i for draw in draws) for i in range(3)]
    assert counts == [10, 10, 10]
    owners = [{calls[i].samples[r] for r in rows} for ((i, rows),) in draws]
    assert all(
        len(rows) == 4 and len(mine) == 2 for ((_, rows),), mine in zip(draws, owners, strict=True)
    )  # both halves
    assert set.union(*owners) == {0, 1, 2}  # 3 is only judged by
    chance = quant.BitsFusion()._chance
    assert (chance(1.0), chance(0.5)) == (1.0, pytest.approx(0.25))
    late = [draw[0][0] for draw, _ in zip(Feed(calls, seen, chance=chance), range(300), strict=False)]
    u = [(call.timestep / calls[0].timestep) ** 2 for call in calls]
    for i in range(3):  # five standard deviations of a binomial count
        p = u[i] / sum(u)
        assert abs(late.count(i) - 300 * p) <= 5 * (300 * p * (1 - p)) ** 0.5 + 1


def test_calls_of_one_draw_hold_the_same_samples(recorded):
    _, calls = recorded
    seen, _ = split(calls)
    draw = next(iter(Feed(calls, seen, rows=4, together=3)))
    assert sorted(i for i, _ in draw) == [0, 1, 2]
    assert len({tuple(rows) for _, rows in draw}) == 1
    some = [call.select([0, i + 1, 4, i + 5] if i else [1, 0, 5, 4]) for i, call in enumerate(calls)]
    feed = Feed(some, [(i, [0, 1, 2, 3]) for i in range(3)], together=3)
    draw = next(iter(feed))
    assert {i: [some[i].samples[r] for r in rows] for i, rows in draw} == {0: [0, 0], 1: [0, 0], 2: [0, 0]}
    kept = [call.select([i, i + 4]) for i, call in enumerate(calls)]  # another sample of each
    assert len(next(iter(Feed(kept, split(kept)[0], together=2)))) == 1


def test_reach_is_what_an_error_does_to_a_gaussian_of_unit_variance():
    """x0 ~ N(0, 1) has eps(x) = sigma x and a linear flow, so the effect of one error in one small step is known exactly."""
    from fewstep.quant.training.weights import reach
    from fewstep.samplers.schedule import NoiseSchedule

    schedule = NoiseSchedule.from_config(
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
    )
    times = list(range(980, 0, -20))
    alpha, sigma = (v.tolist() for v in schedule.at(schedule.t_from_model_time(torch.tensor(times).double()))[:2])
    alpha, sigma = [*alpha, 1.0], [*sigma, 0.0]

    def end(x, bad=None, error=0.0):
        for i in range(len(times)):
            eps = sigma[i] * x + (error if i == bad else 0.0)
            x = alpha[i + 1] * (x - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps
        return x

    found = reach(schedule, times)
    for i in (3, 20, 40):  # first-order steps shrink by 1 + O(h) of what the flow does; h is 2 % of the path
        assert found[i] == pytest.approx(abs(end(0.5, i, 1.0) - end(0.5)), rel=0.04)


def test_flows_start_without_a_singularity():
    from fewstep.quant.training.weights import reach
    from fewstep.samplers.schedule import Flow

    times = [1000.0, 750.0, 500.0, 250.0]
    found = reach(Flow(1000), times)
    # X_t moves by |dt| a unit of velocity, over the root of alpha^2 + sigma^2 where the step ends
    sigma = [t / 1000 for t in times] + [0.0]
    expected = [(s - t) / ((1 - t) ** 2 + t**2) ** 0.5 for s, t in itertools.pairwise(sigma)]
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_method_that_makes_it_worse_gives_back_its_start_bit_for_bit(recorded):
    model, calls = recorded
    config = {"weight": "int4:g8", "activation": "int8:row"}
    quant.quantize_(model, quant.Int4(**config))
    start = {name: fingerprint.of_module(layer) for name, layer in quantized_layers(model).items()}
    quant.dequantize_(model)
    report = quant.quantize_(model, quant.EfficientDM(**config, iterations=3, rate=100.0, rank=4), calls)
    assert report.findings["kept"] == "the start"
    assert report.findings["drift_after_training"] == report.findings["drift_before_training"]
    assert {name: fingerprint.of_module(layer) for name, layer in quantized_layers(model).items()} == start


def test_the_drift_is_that_of_the_samples_set_apart(recorded):
    from fewstep.caching.calibration.runs import Runs

    model, calls = recorded
    runs = Runs.of(calls.runs.pipe, ("dress", "bag"), 4, 3, 3.0)
    wanted = runs.latents()[3:]
    report = quant.quantize_(model, quant.EfficientDM(weight="int4:g8", iterations=1, rate=100.0, rank=4), calls)
    expected = float((runs.latents()[3:] - wanted).square().mean().sqrt() / wanted.std())
    # drawn in a batch of 1 there and of 4 here: float32 sums in another order, a few roundings amplified by guidance
    assert report.findings["drift_before_training"] == pytest.approx(expected, rel=1e-2)


def test_a_fall_must_be_beyond_chance():
    before = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert fell(before, before - 0.1)
    assert not fell(before, before)
    # mean 0.1 with a standard deviation of 1.15: half a standard error would be 0.29
    assert not fell(before, before - torch.tensor([1.1, -0.9, 1.1, -0.9]))
    assert not fell(before, torch.tensor([0.0, 0.0, 0.0, torch.inf]))
    assert fell(before[:1], before[:1] - 0.1)


def test_noise_is_added_as_the_process_does_and_is_the_target(recorded):
    from fewstep.quant.training.judge import float_latents
    from fewstep.quant.training.noised import noised

    model, calls = recorded
    clean = float_latents(model, model, calls.runs)
    again, targets = noised(model, model, calls)
    alphas = calls.runs.pipe.scheduler.alphas_cumprod
    assert len(again) == len(calls)
    for call, before, eps in zip(again, calls, targets, strict=True):
        alpha, sigma = alphas[int(call.timestep)].sqrt(), (1 - alphas[int(call.timestep)]).sqrt()
        # the network predicts eps: float32 sums of two terms, off by a few roundings
        assert torch.allclose(call.args[0], alpha * clean[list(call.samples)] + sigma * eps, atol=1e-5)
        assert torch.equal(eps[:4], eps[4:])  # both halves of guidance
        assert call.kwargs.keys() == before.kwargs.keys()
    with pytest.raises(FewstepError, match=r"give calibration from quant\.record"):
        noised(model, model, list(calls))
    with pytest.raises(FewstepError, match=r"no sample of shape \(1, 2\)"):
        with_sample(calls[0], torch.zeros(1, 2))


def test_stage_two_is_reported_and_judged_like_the_first(recorded):
    model, calls = recorded
    report = quant.quantize_(model, quant.BitsFusion(weight="bint2:g16", iterations=4, second=4), calls)
    second = report.findings["second"]
    assert second["drift_after_training"] <= second["drift_before_training"]
    assert second["drift_before_training"] == pytest.approx(report.findings["drift_after_training"])
    with pytest.raises(FewstepError, match="second is -1"):
        quant.BitsFusion(second=-1)


def test_training_goes_on_from_the_codes_that_are_there():
    """Codes that are not the nearest, as GPTQ's or an earlier stage's, are where training starts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(64, 32)
    made = build(layer, LayerPlan("int4:g32", "int8:row"))
    codes = made.quantized_weight()
    moved = replace(codes, codes=(codes.codes + (torch.arange(64) % 5 == 0)).clamp(-7, 7).to(torch.int8))
    made.codes.data = moved.packed()["codes"]
    made.memory.clear()
    trained = TrainedLayer(layer, made, Trainable())
    assert torch.equal(trained.finished()[0].codes, moved.codes)
    kept = torch.arange(64) % 5 != 0
    assert torch.equal(trained.base[:, kept], layer.weight.detach()[:, kept])
    only_scales = TrainedLayer(layer, made, Trainable("none", scales=False, bias=False))
    assert torch.equal(only_scales.finished()[0].codes, moved.codes)
