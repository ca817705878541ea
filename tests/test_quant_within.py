"""A bound on the output error: which layers stay in floating point for it. And 1 x 1 convolutions, linear layers of pixels."""

import math

import pytest
import torch
from torch import nn

from fewstep import quant
from fewstep.errors import FewstepError
from fewstep.quant.allocation.damage import measured
from fewstep.quant.allocation.within import contributions, within_error
from fewstep.quant.calibration.calls import Call
from fewstep.quant.formats import Format
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import build, layer_arrays, quant_layer
from fewstep.quant.sites import sites
from tests.tensor_fixtures import relative


def unet():
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DModel(
            sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
        return model, [Call((torch.randn(2, 3, 16, 16), torch.tensor([t, t])), {}) for t in (100, 800)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("formats", [("int8:row", "int8:row"), ("int7:row", "zint8:row"), ("int4:g32", "int4:g32")])
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_a_1x1_convolution_has_a_scale_a_pixel(formats, backend, stride):
    layer = nn.Conv2d(64, 48, 1, stride=stride).requires_grad_(False)
    x = torch.randn(2, 64, 7, 9, generator=torch.Generator().manual_seed(0))
    x[:, :, 3, 3] *= 1000  # harms its own pixel and no other
    made = build(layer, LayerPlan(*formats))
    made.backend = backend
    w, a = (Format.parse(f) for f in formats)
    rows = a.round(x.permute(0, 2, 3, 1).reshape(-1, 64)).reshape(2, 7, 9, 64).permute(0, 3, 1, 2)
    weight = w.round(layer.weight.flatten(1)).reshape(48, 64, 1, 1)
    expected = nn.functional.conv2d(rows.double(), weight.double(), layer.bias.double(), stride)
    assert made.pointwise
    assert made(x).shape == expected.shape
    assert relative(made(x), expected) < 64 * 2.0**-24  # as many float32 products


def test_a_1x1_convolution_takes_smoothing_and_a_branch():
    layer, x = nn.Conv2d(64, 48, 1).requires_grad_(False), torch.randn(2, 64, 5, 5)
    smooth = torch.rand(64) + 0.5
    u, s, v = torch.linalg.svd(layer.weight.flatten(1) * smooth, full_matrices=False)
    plan = LayerPlan("int2:row", "int8:row", rank=48, smooth=True)
    made = quant_layer(layer, plan, layer_arrays(layer, plan, smooth=smooth, branch=(v, u * s)))
    assert relative(made(x), layer(x)) < 1e-5  # a branch of full rank leaves nothing to quantise


def test_one_pass_back_finds_what_single_layers_do_to_the_output():
    model, calls = unet()
    plan = quant.Int8().plan(model)
    there = [site for site in sites(model) if site.name in plan.layers]
    alone = measured(model, there, {site.name: {"it": plan.layers[site.name]} for site in there}, calls)
    truth = {name: found["it"] for name, found in alone.items()}
    found, work = contributions(model, plan, calls)
    assert found.keys() == truth.keys() == plan.layers.keys()
    # Estimates from one vector of signs a call: a factor of 2 a layer, and the layers' own scatter averages out in the sum.
    assert 0.7 < sum(found.values()) / sum(truth.values()) < 1.4
    ratios = [math.log2(found[name] / truth[name]) for name in truth]
    assert sum(abs(r) < 1 for r in ratios) > 0.8 * len(ratios)
    conv = next(site for site in there if site.name == "down_blocks.0.resnets.0.conv1")
    assert work[conv.name] == 2 * 2 * 16 * 16 * 32 * 32 * 9  # calls, samples, pixels, outputs, inputs, taps
    assert all(p.requires_grad for p in model.parameters())


def test_a_bound_keeps_the_layers_that_do_most_harm_and_holds():
    model, calls = unet()
    free = quant.quantize_(model, quant.Int8(), calls)
    quant.dequantize_(model)
    bound = 0.6 * free.output_error
    report = quant.quantize_(model, quant.Int8(error=bound), calls)
    assert report.output_error <= bound
    assert 0 < len(report.plan.layers) < len(free.plan.layers)
    settings = report.plan.provenance
    assert settings["error_found"] == pytest.approx(report.output_error, rel=1e-6)
    # Half of the squared error sits in far fewer than half of the multiplications; else nothing would be won.
    assert 0 < settings["float_multiplications"] < 0.64
    assert any("error=" in why for why in report.plan.kept.values())


def test_a_bound_that_holds_anyway_changes_nothing():
    model, calls = unet()
    assert quant.Int8(error=0.5).plan(model, calls).layers == quant.Int8().plan(model).layers


def test_what_cannot_be_bounded_is_refused():
    model, calls = unet()
    with pytest.raises(FewstepError, match=r"quant\.record"):
        quant.Int8(error=0.01).plan(model)
    with pytest.raises(FewstepError, match="static=False"):
        quant.Int8(error=0.01, static=True).plan(model, calls)
    with pytest.raises(FewstepError, match="above 0"):
        within_error(model, quant.Int8().plan(model), calls, -1.0)
    with pytest.raises(FewstepError, match="wider formats"):
        quant.Int8(error=1e-9).plan(model, calls)
