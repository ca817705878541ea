"""Quantisation handled oddly: interrupted, beside hooks of others, copied, saved from odd networks, told nonsense."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import fewstep.quant.folding as folding
from fewstep import caching, quant
from fewstep.errors import ArtifactError, FewstepError
from fewstep.quant.attention.reference import quantized_attention
from fewstep.quant.state import RECORD, float_inside
from fewstep.samplers import DPMSolverSDE, Grid, NoiseSchedule
from tests.eval_fixtures import tiny_dit
from tests.pipeline_fixtures import tiny_ddpm_pipeline

ATTENTION = "transformer_blocks.0.attn1"
LINEAR = "transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def pipe():
    made = tiny_dit()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def calls(pipe):
    return quant.record(pipe, ("dress", "bag"), num_inference_steps=3, samples=2, keep=2)


@pytest.fixture
def net(pipe):
    yield pipe.transformer
    if caching.controller_of(pipe) is not None:
        caching.remove_(pipe)
    quant.dequantize_(pipe.transformer)
    quant.unfold_smoothing_(pipe.transformer)


@torch.no_grad()
def out(net, calls):
    return calls[0].run(net.eval()).clone()


# -- calibration data -------------------------------------------------------------------------------------------------
def test_one_prompt_is_one_prompt_and_none_is_enough_where_none_is_needed(pipe):
    assert quant.record(pipe, "dress", num_inference_steps=1, samples=2).runs.prompts == ("dress", "dress")
    unconditional = tiny_ddpm_pipeline()
    unconditional.set_progress_bar_config(disable=True)
    assert len(quant.record(unconditional, (), num_inference_steps=2, samples=1)) == 2


def test_a_bound_that_no_layer_fits_in_is_said_without_numbers_that_were_not_measured(net, calls):
    before = out(net, calls)
    with pytest.raises(FewstepError, match="too much in every layer; error=1e-09 needs wider formats") as raised:
        quant.quantize_(net, quant.Int8(error=1e-9), calls)
    assert "inf" not in str(raised.value)
    assert torch.equal(out(net, calls), before)


# -- what stands around layers ----------------------------------------------------------------------------------------
def test_the_float_network_inside_is_neither_corrected_nor_attends_in_8_bits(net, calls):
    before = out(net, calls)
    quant.quantize_(net, quant.W4A8(), calls, attention=quant.AttentionPlan())
    quant.correct_(net, quant.fit_correction(net, calls))
    quantised = out(net, calls)
    with float_inside(net, getattr(net, RECORD)):
        assert torch.equal(out(net, calls), before)
    assert torch.equal(out(net, calls), quantised)
    assert not torch.equal(quantised, before)


@pytest.mark.parametrize(("site", "config"), [(ATTENTION, quant.AttentionPlan()), (LINEAR, quant.Int8())])
def test_a_cache_on_the_very_module_is_neither_lost_nor_left(pipe, net, calls, site, config):
    before = out(net, calls)
    plan = caching.CachePlan((site,), np.zeros((4, 1)))
    with caching.applied(pipe, plan, num_inference_steps=4):
        with pytest.raises(FewstepError, match=f"{site} has a hook around it"):
            quant.quantize_(net, config)
        assert quant.plan_of(net) is None
    quant.quantize_(net, config)
    quantised = out(net, calls)
    with caching.applied(pipe, plan, num_inference_steps=4):
        with pytest.raises(FewstepError, match=f"{site} has a hook around it"):
            quant.dequantize_(net)
        assert quant.plan_of(net) is not None
    assert torch.equal(out(net, calls), quantised)
    quant.dequantize_(net)
    assert torch.equal(out(net, calls), before)
    assert "forward" not in vars(net.get_submodule(site))


def test_an_interrupted_fold_is_put_back(net, calls, monkeypatch):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    real, done = folding._fold, []

    def stops(*args):
        real(*args)
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(folding, "_fold", stops)
    with pytest.raises(KeyboardInterrupt):
        quant.fold_smoothing_(net, calls, grid=1, weight="int8:row", activation="int8:row")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not quant.unfold_smoothing_(net)


# -- corrections ------------------------------------------------------------------------------------------------------
def test_a_corrected_network_can_be_pickled_and_noise_is_absorbed_once(pipe, net, calls):
    quant.quantize_(net, quant.W4A8(), calls)
    correction = quant.fit_correction(net, calls)
    quant.correct_(net, correction)
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(out(again, calls), out(net, calls))
    assert quant.remove_correction_(again)
    assert not torch.equal(out(again, calls), out(net, calls))
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    plan = DPMSolverSDE().compile(schedule, Grid.uniform_t(schedule, 4))
    less = correction.absorbed(plan)
    assert bool((less.noise < plan.noise)[plan.noise > 0].all())
    with pytest.raises(FewstepError, match="adds less noise already"):
        correction.absorbed(less)


# -- files ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changed", [{"dtypes": [1]}, {"layer_dtypes": 5}, {"names": 5}, {"plan": 5}])
def test_a_damaged_index_is_refused_and_changes_nothing(net, calls, tmp_path, changed):
    quant.quantize_(net, quant.Int8())
    path = quant.save(net, tmp_path)
    quant.dequantize_(net)
    before = out(net, calls)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ArtifactError, match=r"quantized\.json"):
        quant.load_(net, tmp_path)
    assert torch.equal(out(net, calls), before)


class Tied(nn.Module):
    """One parameter under two names."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.scale = nn.Parameter(torch.randn(32))
        self.shift = self.scale

    def forward(self, x):
        return self.layer(x) * self.scale + self.shift


def test_tied_parameters_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    made, x = Tied(), torch.randn(3, 32)
    quant.quantize_(made, quant.Int8(keep=()))
    quant.save(made, tmp_path)
    loaded = Tied()
    quant.load_(loaded, tmp_path)
    assert torch.equal(loaded(x), made(x))


# -- values of another kind -------------------------------------------------------------------------------------------
def test_what_is_no_plan_is_refused(pipe, net):
    quant.quantize_(net, quant.Int8())
    with pytest.raises(FewstepError, match="plan is of type DPCache; give a CachePlan"):
        quant.fit_cache(pipe, caching.DPCache(), ("dress",))
    quant.dequantize_(net)
    with pytest.raises(FewstepError, match="blocks are 64; give the tokens"):
        quant.AttentionPlan(blocks=64)
    with pytest.raises(FewstepError, match="attention is 'int8'; give an AttentionPlan"):
        quant.quantize_(net, quant.Int8(), attention="int8")
    assert quant.plan_of(net) is None


def test_torchao_wants_a_plan_and_not_a_method():
    pytest.importorskip("torchao")
    with pytest.raises(FewstepError, match="plan is of type Int8; give a QuantPlan"):
        quant.to_torchao(quant.Int8())


def test_values_beyond_float16_are_attended_to():
    """Attention is linear in its values, and a power of two scales floats exactly: so it scales the result, up to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 8, generator=generator).bfloat16() for _ in range(3))
    plan = quant.AttentionPlan()
    small, large = (quantized_attention(q, k, v * factor, plan).float() for factor in (1.0, 2.0**17))
    assert bool(large.isfinite().all())
    # values rounded to 11 bits in either, at other places; the output to bfloat16's 8 bits
    assert float((large / 2.0**17 - small).norm() / small.norm()) < 2.0**-8 + 2 * 2.0**-11
