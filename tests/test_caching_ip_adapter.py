"""Caches beside IP-Adapter: picture prompts tell streams apart, and what they add stays exact."""

import pytest
import torch

from fewstep import caching
from tests.caching_fixtures import ROUNDING, TINY, plan_of, same, site_names, timesteps, trajectory

CLIP, TOKENS = 6, 4


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def adapted(request):
    """A tiny UNet with the weights of an IP-Adapter, loaded as diffusers' pipelines do."""
    tiny = TINY[request.param]
    model, generator = tiny.model(), torch.Generator().manual_seed(4)
    width = model.config.cross_attention_dim
    names = [name.removesuffix(".processor") for name in model.attn_processors if "attn2" in name]
    attention = {
        f"{2 * i + 1}.to_{kind}_ip.weight": torch.randn(model.get_submodule(name).to_k.out_features, width, generator=generator)
        for i, name in enumerate(names)
        for kind in "kv"
    }  # fmt: skip
    image_proj = {
        "proj.weight": torch.randn(TOKENS * width, CLIP, generator=generator), "proj.bias": torch.zeros(TOKENS * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    model._load_ip_adapter_weights([{"image_proj": image_proj, "ip_adapter": attention}])
    return tiny, model


def with_picture(tiny, seed):
    """One text for all, a picture by seed."""
    conditioning = tiny.conditioning()
    picture = torch.randn(2, 1, CLIP, generator=torch.Generator().manual_seed(seed))
    return {
        **conditioning,
        "added_cond_kwargs": {**conditioning.get("added_cond_kwargs", {}), "image_embeds": [picture]},
    }


def test_computing_everything_and_removing_change_no_bit(adapted):
    tiny, model = adapted
    streams = [with_picture(tiny, 5)]
    plain = trajectory(tiny, model, streams)
    assert not same(plain, trajectory(tiny, model, [with_picture(tiny, 6)]))  # the pictures do act
    for site in site_names(model):
        with caching.applied(model, plan_of(site, "CCCC")):
            assert same(trajectory(tiny, model, streams), plain), site
    assert same(trajectory(tiny, model, streams), plain)


def test_an_input_that_does_not_change_is_reused_exactly(adapted):
    tiny, model = adapted
    times, x = torch.full((2,), 500), tiny.sample()
    for site in site_names(model):
        with caching.applied(model, plan_of(site, "CR", 2)) as controller:
            computed, reused = trajectory(tiny, model, [with_picture(tiny, 5)], times, x=x, move=0.0)
            assert controller.report().hit_rate == 0.5
        assert (computed - reused).abs().max() <= ROUNDING * computed.abs().max(), site


def test_streams_that_differ_in_their_picture_alone_do_not_share(adapted):
    tiny, model = adapted
    first, second = with_picture(tiny, 5), with_picture(tiny, 6)
    samples = [tiny.sample(seed=10 + i) for i in range(4)]

    def outputs(streams):
        found = [[] for _ in streams]
        for x, t in zip(samples, timesteps(4), strict=True):
            for kept, conditioning in zip(found, streams, strict=True):
                kept += trajectory(tiny, model, [conditioning], [t], x=x)
        return found

    for site in site_names(model)[1::3]:
        with caching.applied(model, plan_of(site), num_inference_steps=4) as controller:
            alone = []
            for conditioning in (first, second):
                alone += outputs([conditioning])
                controller.reset()
            together = outputs([second, first])
        assert same(together[1], alone[0]), site
        assert same(together[0], alone[1]), site
