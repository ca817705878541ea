"""Input scales by time: which row a call takes, without reading a device; how they are found, trained, kept and taken off."""

import copy

import pytest
import torch

from fewstep import quant
from fewstep.errors import FewstepError, PlanError
from fewstep.eval import fingerprint
from fewstep.eval.sweeps.transforms import structure
from fewstep.quant.formats import Format
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.moment import Moment
from fewstep.quant.methods.times import time_bins
from fewstep.quant.sites import quantized_layers
from tests.eval_fixtures import PROMPTS, tiny_dit, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_dit()


@pytest.fixture(scope="module")
def calls(pipe):
    return quant.record(pipe, ("dress", "bag"), num_inference_steps=4, samples=4, guidance=3.0)


@pytest.fixture(autouse=True)
def floats(pipe):
    yield
    quant.dequantize_(pipe.transformer)


def test_a_call_takes_the_nearest_time_on_its_own_device():
    moment = Moment((1.0, 250.0, 750.0))
    table = torch.tensor([[1.0], [2.0], [3.0]])
    for time, expected in ((0, 1), (120.0, 1), (torch.tensor(130), 2), (torch.tensor([999, 1]), 3)):
        moment(torch.nn.Identity(), (), {"timestep": time})
        assert moment.pick(table).tolist() == [[expected]]
    moment(torch.nn.Identity(), (None, 260), {})
    assert moment.pick(table).tolist() == [[2.0]]
    # Nothing is read back: a tensor without values can be looked up all the same.
    moment(torch.nn.Identity(), (), {"timestep": torch.empty(2, device="meta")})
    assert moment.row.is_meta
    with pytest.raises(FewstepError, match="not told its time"):
        moment(torch.nn.Identity(), (), {})
    with pytest.raises(FewstepError, match="outside its network"):
        Moment((1.0,)).pick(table)


def test_bins_are_means_of_times_in_a_row(calls):
    times = sorted(call.timestep for call in calls)
    assert time_bins(calls, 99) == tuple(times)
    assert time_bins(calls, 2) == ((times[0] + times[1]) / 2, (times[2] + times[3]) / 2)
    assert time_bins(calls, 1) == (sum(times) / 4,)
    timeless = [quant.Call((call.args[0],)) for call in calls]
    with pytest.raises(FewstepError, match="need calibration calls that are told their time"):
        time_bins(timeless, 2)


def test_stored_scales_are_the_ranges_of_their_own_times(pipe, calls):
    """Of one layer, the largest magnitudes of its inputs at each of the times."""
    model, name = pipe.transformer, "transformer_blocks.0.ff.net.0.proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.append(float(a[0].abs().max())))
    with torch.no_grad():
        for call in calls:
            call.run(model)
    handle.remove()
    config = quant.Int8(weight="int8:row", activation="int8:row", static=True, times=4)
    quant.quantize_(model, config, calls)
    layer = quantized_layers(model)[name]
    assert layer.plan.times == tuple(sorted(call.timestep for call in calls))
    expected = torch.tensor(seen[::-1]) / 127  # times ascend, calls go down
    assert torch.allclose(layer.input_scale[:, 0], expected, rtol=1e-6)


def test_scales_by_time_beat_one_scale_where_ranges_differ(pipe, calls):
    model = pipe.transformer
    errors = []
    now = [0.0]

    def tell(module, args, kwargs):
        now[0] = float(kwargs["timestep"].reshape(-1)[0])

    for times in (0, 4):
        # A pre-hook that makes the last call's inputs ten times larger: one range then wastes most codes of the others.
        hook = model.transformer_blocks[0].register_forward_pre_hook(
            lambda m, a: (a[0] * (10.0 if now[0] > 500 else 1.0), *a[1:])
        )
        clock = model.register_forward_pre_hook(tell, with_kwargs=True)
        config = quant.Int8(
            weight="int8:row", activation="int5:row", static=True, times=times, keep=("edge", "embedding")
        )
        errors.append(quant.quantize_(model, config, calls).output_error)
        quant.dequantize_(model)
        hook.remove()
        clock.remove()
    assert errors[1] < errors[0]


def test_saved_copied_and_taken_off(pipe, calls, tmp_path):
    model = pipe.transformer
    before, shape = fingerprint.of_module(model), structure(pipe)
    quant.quantize_(model, quant.W4A8(static=True, times=2, weight="int4:g8"), calls)
    with torch.no_grad():
        wanted = [call.run(model) for call in calls]
        assert not torch.equal(wanted[0], wanted[-1])
        copied = copy.deepcopy(model)
        assert all(torch.equal(call.run(copied), want) for call, want in zip(calls, wanted, strict=True))
    quant.save(model, tmp_path / "saved")
    with torch.device("meta"):
        other = type(model).from_config(model.config)
    plan = quant.load_(other.eval(), tmp_path / "saved")
    assert max(len(layer.times) for layer in plan.layers.values()) == 2
    with torch.no_grad():
        assert all(torch.equal(call.run(other), want) for call, want in zip(calls, wanted, strict=True))
    quant.dequantize_(model)
    assert (fingerprint.of_module(model), structure(pipe)) == (before, shape)
    assert not model._forward_pre_hooks


def test_compiled_layers_follow_the_time(pipe, calls):
    model = pipe.transformer
    quant.quantize_(model, quant.W4A8(static=True, times=4, weight="int4:g8"), calls, backend="reference")
    with torch.no_grad():
        wanted = [call.run(model) for call in calls]
        compiled = torch.compile(model, backend="eager")
        for call, want in zip(calls, wanted, strict=True):
            assert torch.equal(call.run(compiled), want)


@pytest.mark.parametrize("method", [quant.EfficientDM, quant.QuEST])
def test_step_sizes_are_trained(method, pipe, calls):
    model = pipe.transformer
    config = {"weight": "int8:row", "activation": "int4:tensor", "times": 4, "rate": 0.02}
    report = quant.quantize_(model, method(**config, iterations=0), list(calls))
    start = {name: layer.input_scale.clone() for name, layer in quantized_layers(model).items() if layer.plan.static}
    assert all(scale.shape == (4, 1) for scale in start.values())
    quant.dequantize_(model)
    trained = quant.quantize_(model, method(**config, iterations=40, together=1), list(calls))
    assert trained.findings["noise_after_training"] < trained.findings["noise_before_training"]
    assert trained.output_error < report.output_error
    after = quantized_layers(model)
    assert all(not torch.equal(after[name].input_scale, scale) for name, scale in start.items())


@pytest.fixture(scope="module")
def unet():
    pipe = tiny_pipeline()
    return pipe, quant.record(pipe, PROMPTS, num_inference_steps=3, samples=4, guidance=3.0)


def keeper(into, name):
    def hook(module, args, out):
        into[name] = out[0]

    return hook


def embedding_error(model, calls, floats):
    total = 0.0
    for call in calls:
        got = {}
        handles = [model.get_submodule(name).register_forward_hook(keeper(got, name)) for name in floats[call.timestep]]
        with torch.no_grad():
            call.run(model)
        for handle in handles:
            handle.remove()
        total += sum(float((got[n] - want).square().sum()) for n, want in floats[call.timestep].items())
    return total


def test_time_embeddings_have_a_scale_for_every_time_and_are_trained_apart(unet):
    pipe, calls = unet
    model = pipe.unet
    every = [name for name, _ in model.named_modules()]
    names = [n for n in every if n.endswith("time_emb_proj") or n.startswith("time_embedding.linear")]
    floats: dict[float, dict[str, torch.Tensor]] = {}
    for call in calls:
        kept = floats.setdefault(call.timestep, {})
        handles = [model.get_submodule(n).register_forward_hook(keeper(kept, n)) for n in names]
        with torch.no_grad():
            call.run(model)
        for handle in handles:
            handle.remove()
    try:
        config = {"weight": "int4:g8", "activation": "int8:row"}
        plan = quant.TFMQ(**config).plan(model, calls)
        assert {n for n, layer in plan.layers.items() if layer.times} == set(names)
        assert all(len(plan.layers[n].times) == 3 for n in names)
        assert not any(n.startswith("time_embedding") for n in quant.W4A8().plan(model).layers)
        quant.quantize_(model, quant.TFMQ(**config, iterations=0), calls)
        start = embedding_error(model, calls, floats)
        quant.dequantize_(model)
        quant.quantize_(model, quant.TFMQ(**config, iterations=40), list(calls))
        assert embedding_error(model, calls, floats) < 0.8 * start
        quant.dequantize_(model)
        report = quant.quantize_(model, quant.QuEST(**config, iterations=2, embeddings=True), calls)
        assert set(report.findings["embeddings"]) == {
            "noise_before_training", "noise_after_training", "drift_before_training", "drift_after_training", "kept",
        }  # fmt: skip
        assert report.plan.layers[names[0]].times
    finally:
        quant.dequantize_(model)


def test_refusals(pipe, calls):
    with pytest.raises(PlanError, match="need static=True"):
        LayerPlan("int8:row", "int8:tensor", times=(1.0,))
    with pytest.raises(PlanError, match="give ascending numbers"):
        LayerPlan("int8:row", "int8:tensor", static=True, times=(2.0, 1.0))
    with pytest.raises(FewstepError, match="times is 3; give 0, or with static=True"):
        quant.Int8(times=3)
    with pytest.raises(FewstepError, match="times is -1; give 0 or more"):
        quant.EfficientDM(times=-1)
    with pytest.raises(FewstepError, match="give an activation format"):
        quant.BitsFusion(times=2)
    with pytest.raises(FewstepError, match="told their time"):
        quant.quantize_(pipe.transformer, quant.Int8(static=True, times=2), [calls[0].args[0]])
    assert not quantized_layers(pipe.transformer)
    plan = quant.W4A8(static=True, times=4, weight="int4:g8").plan(pipe.transformer, calls)
    assert type(plan).from_json(plan.to_json()) == plan
    assert "scales at 4 times" in str(plan)
    assert Format.parse("int8:tensor") == plan.layers["transformer_blocks.0.ff.net.2"].activation
