"""Allocation: exact solvers against brute force, estimators against exact traces, plans within their budgets."""

import itertools
import math

import pytest
import torch
from torch import nn

from fewstep import quant
from fewstep.errors import FewstepError
from fewstep.eval import fingerprint
from fewstep.quant.allocation.damage import dissimilarity, noise, traces
from fewstep.quant.allocation.options import Option, parse
from fewstep.quant.allocation.solve import closed_form, integer_program, nearest_options
from fewstep.quant.calibration.calls import Call, as_calls
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.methods.mixdq import constant_first_token
from fewstep.quant.sites import quantized_layers, sites
from tests.eval_fixtures import PROMPTS, tiny_dit, tiny_pipeline


def random_table(layers=6, options=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table, sizes = {}, {}
    for i in range(layers):
        base = float(torch.rand((), generator=generator)) + 0.01
        table[f"layer{i}"] = [
            Option(LayerPlan(f"int{bits}:row"), bits + 0.25, base * 4.0**-bits, cost=float(bits))
            for bits in (2, 4, 8)[:options]
        ]
        sizes[f"layer{i}"] = int(torch.randint(10, 1000, (), generator=generator))
    return table, sizes


def brute_force(table, sizes, budget, allowed=lambda choice: True):
    total = sum(sizes.values())
    best = math.inf
    for picks in itertools.product(*(range(len(options)) for options in table.values())):
        choice = dict(zip(table, picks, strict=True))
        bits = sum(table[n][i].bits * sizes[n] for n, i in choice.items()) / total
        if bits <= budget and allowed(choice):
            best = min(best, sum(table[n][i].damage for n, i in choice.items()))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [2.5, 4.0, 5.3, 8.25])
def test_the_integer_program_is_exact(seed, budget):
    table, sizes = random_table(seed=seed)
    choice = integer_program(table, sizes, budget)
    total = sum(sizes.values())
    assert sum(table[n][i].bits * sizes[n] for n, i in choice.items()) / total <= budget + 1e-9
    got = sum(table[n][i].damage for n, i in choice.items())
    assert got == pytest.approx(brute_force(table, sizes, budget), rel=1e-6)


def test_costs_and_ties_are_kept():
    table, sizes = random_table()
    tied = [("layer0", "layer3"), ("layer1", "layer4", "layer5")]
    choice = integer_program(table, sizes, 6.0, cost_budget=26.0, ties=tied)
    assert all(len({choice[name] for name in group}) == 1 for group in tied)
    assert sum(table[n][i].cost for n, i in choice.items()) <= 26.0

    def allowed(c):
        return all(len({c[n] for n in g}) == 1 for g in tied) and sum(table[n][i].cost for n, i in c.items()) <= 26.0

    got = sum(table[n][i].damage for n, i in choice.items())
    assert got == pytest.approx(brute_force(table, sizes, 6.0, allowed), rel=1e-6)


def test_a_budget_that_nothing_meets_is_refused_with_the_least():
    table, sizes = random_table()
    with pytest.raises(FewstepError, match=r"no choice of formats has 2 bits a weight; the least there is has 2\.250"):
        integer_program(table, sizes, 2.0)
    with pytest.raises(FewstepError, match=r"the least there is has 2\.250"):
        nearest_options(table, dict.fromkeys(table, 2.0), sizes, 2.0)


def test_the_closed_form_equalises_damage_and_meets_its_budget():
    sizes, c = {"a": 100, "b": 300, "c": 50}, {"a": 5.0, "b": 0.2, "c": 1e-3}
    bits = closed_form(c, sizes, 4.0)
    assert sum(bits[n] * sizes[n] for n in sizes) / 450 == pytest.approx(4.0)
    assert len({round(c[n] * 4 ** -bits[n], 12) for n in c}) == 1


def test_rounded_bits_stay_within_the_budget_and_near_the_optimum():
    table, sizes = random_table(layers=8)
    law = {n: options[1].damage / sizes[n] * 4.0 ** options[1].bits for n, options in table.items()}
    for budget in (3.0, 4.5, 6.0):
        choice = nearest_options(table, closed_form(law, sizes, budget), sizes, budget)
        assert sum(table[n][i].bits * sizes[n] for n, i in choice.items()) / sum(sizes.values()) <= budget + 1e-9
        got = sum(table[n][i].damage for n, i in choice.items())
        uniform = sum(options[0].damage for options in table.values())
        assert got < uniform
        assert got >= brute_force(table, sizes, budget) * (1 - 1e-9)


def test_hutchinson_is_exact_for_one_linear_layer_and_right_on_average_for_two():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)

        def forward(self, x):
            return self.second(self.first(x))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Two()
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    found = traces(net, sites(net), [Call((x,))], probes=400, tolerance=0)
    hidden = net.first(x).detach()
    # y = W2 h: J^T u = u h^T, of squared norm |u|^2 |h|^2 = 4 |h|^2 for every vector of signs
    assert found["second"] == pytest.approx(4 * float(hidden.square().sum()), rel=1e-5)
    # y = W2 W1 x: the trace is |W2|_F^2 |x|^2; 400 vectors leave 1 / sqrt(400) of a spread of order 1
    exact = float(net.second.weight.square().sum() * x.square().sum())
    assert found["first"] == pytest.approx(exact, rel=0.2)
    assert all(p.requires_grad for p in net.parameters())


def test_metrics_are_zero_for_equals_and_grow():
    want = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for metric in (noise, dissimilarity):
        assert metric(want, want) == pytest.approx(0, abs=1e-6)
        assert metric(want + 0.1, want) < metric(want * 0.5 + 1.0, want)
    assert noise(want * 1.1, want) == pytest.approx(0.01, rel=1e-4)


@pytest.fixture(scope="module")
def recorded():
    pipe = tiny_dit()
    return pipe.transformer, quant.record(
        pipe, ("dress", "bag"), num_inference_steps=2, samples=2, guidance=3.0, keep=2
    )


@pytest.fixture(scope="module")
def texts():
    pipe = tiny_pipeline()
    return pipe.unet, quant.record(pipe, PROMPTS, num_inference_steps=1, samples=2, guidance=3.0, keep=2)


FEW = ("edge", "embedding", "attention", "convolution", "shortcut", "projection")
"""Roles that are kept, so that text attention and feed-forward layers are left: what these tests are about."""
CHOICES = ("int2:g8 x int8:row", "int4:g8 x int8:row", "int8:row x int8:row")


@pytest.mark.parametrize("options", [{}, {"solver": "baq"}, {"sensitivity": "hawq"}, {"may_keep": True}])
def test_a_plan_keeps_its_budget_and_leaves_the_network_alone(options, recorded):
    unet, calls = recorded
    before = fingerprint.of_module(unet)
    plan = quant.allocate_bits(unet, calls, budget=7.0, choices=CHOICES, **options)
    assert fingerprint.of_module(unet) == before
    assert not quantized_layers(unet)
    assert plan.provenance["bits"] <= 7.0
    assert len(set(map(str, plan.layers.values()))) > 1
    narrow = quant.allocate_bits(unet, calls, budget=5.0, choices=CHOICES)
    assert narrow.provenance["bits"] <= 5.0
    assert quant.quantize_(unet, plan, calls).output_error < quant_error(unet, narrow, calls)
    quant.dequantize_(unet)


def test_the_fewest_bits_for_an_error_are_fewer_than_for_a_smaller_one(recorded):
    unet, calls = recorded
    plans = [quant.fewest_bits(unet, calls, error=e, choices=CHOICES, rounds=4) for e in (0.1, 0.2)]
    for plan, limit in zip(plans, (0.1, 0.2), strict=True):
        assert quant_error(unet, plan, calls) <= limit
    assert plans[1].provenance["bits"] < plans[0].provenance["bits"]
    with pytest.raises(FewstepError, match="the widest choices have an output error of"):
        quant.fewest_bits(unet, calls, error=1e-4, choices=CHOICES)


def quant_error(unet, plan, calls):
    quant.dequantize_(unet)
    error = quant.quantize_(unet, plan, calls).output_error
    quant.dequantize_(unet)
    return error


def test_refusals(recorded):
    unet, calls = recorded
    with pytest.raises(FewstepError, match="give some, see quant"):
        quant.allocate_bits(unet, None, budget=5.0)
    with pytest.raises(FewstepError, match="unknown solver 'lp'"):
        quant.allocate_bits(unet, calls, budget=5.0, solver="lp")
    with pytest.raises(FewstepError, match="no choice of formats has 1 bits a weight"):
        quant.allocate_bits(unet, calls[:1], budget=1.0, choices=CHOICES[1:])
    with pytest.raises(FewstepError, match="is no pair of formats"):
        parse(" x int8:row")


def test_first_tokens_are_kept_where_they_are_all_the_same(texts):
    unet, calls = texts
    assert constant_first_token(calls)  # every text starts with the same token
    other = as_calls([dict(call.kwargs) for call in calls])
    other[0].kwargs["encoder_hidden_states"] = other[0].kwargs["encoder_hidden_states"].clone()
    other[0].kwargs["encoder_hidden_states"][0] += 1
    assert not constant_first_token(other)
    method = quant.MixDQ(budget=6.0, splits=3, finalists=1, keep=FEW)
    report = quant.quantize_(unet, method, calls)
    keys = [n for n, p in report.plan.layers.items() if p.first_token]
    assert keys
    assert all(n.endswith(("attn2.to_k", "attn2.to_v")) for n in keys)
    text = calls[0].kwargs["encoder_hidden_states"]
    made = quantized_layers(unet)[keys[0]](text)
    quant.dequantize_(unet)
    assert torch.allclose(made[:, 0], unet.get_submodule(keys[0])(text)[:, 0], atol=1e-6)
    assert report.plan.provenance["bits"] <= 6.0
