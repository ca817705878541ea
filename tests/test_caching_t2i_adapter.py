"""Caches beside a T2I-Adapter, whose features a UNet adds in place to those of its encoder."""

import pytest
import torch

from fewstep import caching
from fewstep.errors import FewstepError
from tests.caching_fixtures import ROUNDING, TINY, plan_of, same, site_names, trajectory


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def adapted(request):
    """A tiny UNet that gets features in every call, those of the same picture, and what it makes without them."""
    tiny = TINY[request.param]
    model, shapes, hooks = tiny.model(), [], []
    # Blocks with attention add theirs before the downsampler; behind the others the model does.
    for block in model.down_blocks:
        last = block.attentions[-1] if hasattr(block, "attentions") else block
        hooks.append(last.register_forward_hook(lambda module, args, out: shapes.append(out[0].shape)))
    (without,) = trajectory(tiny, model, [tiny.conditioning()], torch.full((1,), 500))
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(7)
    features = [torch.randn(shape, generator=generator) for shape in shapes]

    def given(module, args, kwargs):  # new ones in each call, as pipelines do: the model takes them out of their list
        return args, {**kwargs, "down_intrablock_additional_residuals": [f.clone() for f in features]}

    model.register_forward_pre_hook(given, with_kwargs=True)
    return tiny, model, without


def sites(model):
    return [name for name in site_names(model) if name != "encoder"]


def test_computing_everything_and_removing_change_no_bit(adapted):
    tiny, model, without = adapted
    streams = [tiny.conditioning()]
    assert not same([without], trajectory(tiny, model, streams, torch.full((1,), 500)))  # the features do act
    plain = trajectory(tiny, model, streams)
    for site in sites(model):
        with caching.applied(model, plan_of(site, "CCCC")):
            assert same(trajectory(tiny, model, streams), plain), site
    assert same(trajectory(tiny, model, streams), plain)


def test_an_input_that_does_not_change_is_reused_exactly(adapted):
    tiny, model, _ = adapted
    times, x = torch.full((2,), 500), tiny.sample()
    assert any(site.startswith("branch.") for site in sites(model))
    for site in sites(model):
        with caching.applied(model, plan_of(site, "CR", 2)) as controller:
            computed, reused = trajectory(tiny, model, [tiny.conditioning()], times, x=x, move=0.0)
            assert controller.report().hit_rate == 0.5
        assert (computed - reused).abs().max() <= ROUNDING * computed.abs().max(), site


def test_the_encoder_is_refused_with_the_reason(adapted):
    tiny, model, _ = adapted
    with caching.applied(model, plan_of("encoder", "CRCR")), pytest.raises(FewstepError, match="writes in place"):
        trajectory(tiny, model, [tiny.conditioning()])
