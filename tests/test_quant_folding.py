"""Smoothing folded into normalisations, and powers for what a GELU leaves."""

import math

import pytest
import torch
from torch import nn

from fewstep import quant
from fewstep.errors import FewstepError, PlanError
from fewstep.eval import fingerprint
from fewstep.eval.sweeps.transforms import structure
from fewstep.quant.folding import folds
from fewstep.quant.formats import Format, Log
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.methods.svdquant import GELU_SHIFT
from tests.eval_fixtures import PROMPTS, tiny_dit, tiny_pipeline, tiny_sd3


def recorded(make):
    pipe = make()
    prompts = ("dress", "bag") if make is tiny_dit else PROMPTS
    calls = quant.record(pipe, prompts, num_inference_steps=2, samples=2, guidance=3.0)
    network = getattr(pipe, "unet", None) or pipe.transformer
    return pipe, network, calls


# AdaLN: two for a block; affine norms: three for each of four blocks
FAMILIES = {"dit": (tiny_dit, 2), "sd": (tiny_pipeline, 12), "sd3": (tiny_sd3, None)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("centre", [False, True])
def test_the_network_computes_what_it_did_and_comes_back_bit_for_bit(name, centre):
    make, count = FAMILIES[name]
    pipe, network, calls = recorded(make)
    before, shape = fingerprint.of_module(network), structure(pipe)
    with torch.no_grad():
        wanted = [call.run(network) for call in calls]
    report = quant.fold_smoothing_(network, calls, weight="int4:g8", activation="int4:g8", grid=4, centre=centre)
    assert count is None or len(report) == count
    assert all(0 < error <= 1 for error in report.values())
    assert min(report.values()) < 1
    assert fingerprint.of_module(network) != before
    with torch.no_grad():
        for call, want in zip(calls, wanted, strict=True):
            # float32 weights with other factors: a few roundings of 6e-8 through a few layers
            assert float((call.run(network) - want).norm() / want.norm()) < 1e-4
    with pytest.raises(FewstepError, match="folded into the network already"):
        quant.fold_smoothing_(network, calls)
    quant.quantize_(network, quant.Int4(weight="int4:g8", activation="int4:g8"))
    with pytest.raises(FewstepError, match="quantised layers already"):
        quant.unfold_smoothing_(network)
    quant.dequantize_(network)
    assert quant.unfold_smoothing_(network)
    assert not quant.unfold_smoothing_(network)
    assert (fingerprint.of_module(network), structure(pipe)) == (before, shape)


def test_an_outlier_channel_no_longer_costs_the_others_their_codes():
    _, network, calls = recorded(tiny_dit)
    block = network.transformer_blocks[0]
    with torch.no_grad():  # one channel of the modulated input 50 times as large as the rest
        size = len(block.norm1.linear.bias) // 6
        for chunk in (0, 1, 3, 4):
            block.norm1.linear.weight[chunk * size + 3] *= 50
    config = quant.Int8(weight="int8:row", activation="int4:row")
    before = quant.quantize_(network, config, calls).output_error
    quant.dequantize_(network)
    quant.fold_smoothing_(network, calls, weight="int8:row", activation="int4:row")
    after = quant.quantize_(network, config, calls).output_error
    assert after < 0.8 * before


def test_flux_single_blocks_fold_into_their_own_linear_layer():
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = nn.ModuleDict({"block": FluxSingleTransformerBlock(16, 2, 8)})
    (fold,) = folds(block)
    assert fold.source == "block.norm.linear"
    assert set(fold.readers) == {"block.attn.to_q", "block.attn.to_k", "block.attn.to_v", "block.proj_mlp"}
    assert (fold.chunks, fold.shift, fold.scale) == (3, 0, 1)


def test_powers_are_the_nearest_exponents():
    element = Format.parse("log4:row").element
    assert element == Log(4)
    values = element.decode(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == [2.0**-q for q in range(15)] + [0.0]
    x = torch.rand(2000, generator=torch.Generator().manual_seed(0)).square()
    rounded = element.round(x)
    assert torch.equal(element.decode(element.encode(x)), rounded)
    large = x >= element.least
    # an exponent is off by a half at most
    assert bool(((rounded[large] / x[large]).log2().abs() <= 0.5 + 1e-6).all())
    root = Format.parse("log4s8:row").element
    assert float((root.round(x)[x > root.least] / x[x > root.least]).log2().abs().max()) <= 0.25 + 1e-6
    assert element.encode(torch.tensor([0.0, -1.0, 1e-9])).tolist() == [15, 15, 15]
    packed = Format.parse("log4s8:g16").encode(x[:64].reshape(2, 32))
    assert packed.packed()["codes"].numel() == 32
    assert str(packed.format) == "log4s8:g16"
    again = type(packed).from_packed(packed.format, 32, **packed.packed())
    assert torch.equal(again.decode(), packed.decode())


def test_a_base_is_chosen_where_a_gelu_came_before_and_nowhere_else():
    _, network, calls = recorded(tiny_dit)
    config = {"weight": "int8:row", "activation": "int4:row"}
    plan = quant.AdaLog(**config).plan(network, calls)
    name = "transformer_blocks.0.ff.net.2"
    changed = set(quant.Int4(**config).plan(network).diff(plan))
    assert changed <= {name}
    report = quant.quantize_(network, quant.AdaLog(**config), calls)
    quant.dequantize_(network)
    plain = quant.quantize_(network, quant.Int4(**config), calls)
    assert report.output_error <= plain.output_error
    quant.dequantize_(network)
    choices = quant.AdaLog(**config, steps=(8,)).choices(LayerPlan("int8:row", "int4:row"))
    assert [str(c.activation) for c in choices] == ["int4:row", "uint4:row", "log4s8:row"]
    assert [c.shift for c in choices] == [0.0, GELU_SHIFT, GELU_SHIFT]


def test_powers_beat_even_steps_on_what_a_softmax_leaves():
    scores = 4 * torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    p = scores.softmax(1)

    def error(name: str) -> float:
        return float((Format.parse(name).round(p) - p).norm() / p.norm())

    assert error("log4s8:row") < error("uint4:tensor")
    assert error("log4s8:row") < error("log4:row")  # finer where most of the probability is


def test_attention_takes_probabilities_as_powers():
    from fewstep.quant.attention import AttentionPlan, quantized_attention

    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 32, 16, generator=generator) for _ in range(3))
    want = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())

    def error(pv: str) -> float:
        return float((quantized_attention(q, k, v, AttentionPlan(pv=pv)).double() - want).norm() / want.norm())

    # an exponent is off by at most 1/2 or 1/4, a probability by a factor of 2^(1/2) or 2^(1/4), evenly spread; errors of 32
    # tokens average, so what is left is well below the largest of each
    assert error("float16") < error("log4s8") < error("log4") < 2**0.5 - 1
    assert error("log4s8") < 2**0.25 - 1


def test_six_bits_store_three_quarters_of_eight():
    _, network, calls = recorded(tiny_dit)
    six = quant.quantize_(network, quant.FP6(), calls)
    quant.dequantize_(network)
    eight = quant.quantize_(network, quant.FP8(activation=None), calls)
    assert all(layer.activation is None for layer in six.plan.layers.values())
    codes = sum(six.plan.numel(name) for name in six.plan.layers)
    scales = sum(4 * six.plan.matrix(name)[0] for name in six.plan.layers)
    stored = sum(map(six.plan.layer_bytes, six.plan.layers))
    assert stored == codes * 6 // 8 + scales
    # E3M2 has 2 mantissa bits: at most 1/8 relative where normal, an eighth of the squares' mean is far less
    assert eight.output_error < six.output_error < 1 / 8
    assert math.isfinite(six.output_error)
    assert str(quant.FP6.of("mxfp6").activation) == "mxfp6"


def test_a_network_whose_normalisations_have_other_readers_is_put_back():
    _, network, calls = recorded(tiny_dit)
    block = network.transformer_blocks[0]
    with torch.no_grad():  # an outlier, so that something is folded
        block.norm1.linear.weight[3] *= 50
        before = fingerprint.of_module(network)

    # Something beside the three projections looks at what AdaLN makes.
    def reader(module, args, kwargs, out):
        return out + (args or [kwargs["hidden_states"]])[0]

    handle = block.attn1.register_forward_hook(reader, with_kwargs=True)
    with pytest.raises(FewstepError, match="something else reads its normalisations"):
        quant.fold_smoothing_(network, calls, weight="int4:g8", activation="int4:g8")
    handle.remove()
    assert fingerprint.of_module(network) == before
    assert not quant.unfold_smoothing_(network)


def test_refusals():
    _, network, calls = recorded(tiny_dit)
    with pytest.raises(FewstepError, match="give calibration"):
        quant.fold_smoothing_(network, None)
    with pytest.raises(FewstepError, match="grid is 0"):
        quant.fold_smoothing_(network, calls, grid=0)
    with pytest.raises(FewstepError, match="no number format"):
        quant.fold_smoothing_(network, calls, weight="int4:gg")
    with pytest.raises(FewstepError, match="no block whose normalisation is its own"):
        quant.fold_smoothing_(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)])
    with pytest.raises(FewstepError, match="AdaLog chooses bases by what layers see"):
        quant.quantize_(network, quant.AdaLog(weight="int4:g8", activation="int4:g8"))
    with pytest.raises(PlanError, match="weights have signs"):
        LayerPlan("log4:row", "int8:row")
    with pytest.raises(FewstepError, match="steps of 1 to 64"):
        Format.parse("log4s99:row")
    quant.fold_smoothing_(network, calls, weight="int4:g8", activation="int4:g8", grid=1, keep_originals=False)
    with pytest.raises(FewstepError, match="were not kept"):
        quant.unfold_smoothing_(network)
