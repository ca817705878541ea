"""Attention broadcast: which steps each kind is computed at, what runs, and FasterCache's move along the last change."""

import pytest
import torch

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.caching.methods.broadcast import PUBLISHED, attentions
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, blocks_of, timesteps, trajectory


def column(plan, end):
    (site,) = (i for i, name in enumerate(plan.sites) if name.endswith(end))
    return "".join("CR"[a] for a in plan.actions[:, site])


def test_each_kind_has_its_range_inside_the_window():
    family = family_of(TINY["wan"].model())
    plan = caching.PyramidBroadcast(spatial=2, cross=3, window=(200, 800)).compile(family, 10)  # times 999, 899, ... 99
    assert column(plan, "0.attn1") == "CCCRCRCRCC"
    assert column(plan, "0.attn2") == "CCRCRRCRCC"
    assert len(plan.sites) == 6


def test_ranges_of_one_are_no_sites():
    family = family_of(TINY["wan"].model())
    sites = caching.PyramidBroadcast(spatial=1, cross=2).sites(family)
    assert sites == [f"blocks.{i}.attn2" for i in range(3)]
    with pytest.raises(FewstepError, match="no attention with a range above 1"):
        caching.PyramidBroadcast(1, 1, 1).sites(family)


def test_feed_forwards_of_the_front_blocks_rest_after_the_times_that_are_told():
    family = family_of(TINY["wan"].model())
    method = caching.PyramidBroadcast(2, 1, 1, (0, 1000), mlp_times=(710, 330), mlp_blocks=2)
    plan = method.compile(family, 10)  # times 999, 899, ... 99: the nearest are steps 3 and 7
    assert [site for site in plan.sites if "ffn" in site] == ["blocks.0.ffn", "blocks.1.ffn"]
    assert column(plan, "0.ffn") == column(plan, "1.ffn") == "CCCCRRCCRR"
    assert column(plan, "0.attn1") == "CRCRCRCRCR"
    near = caching.PyramidBroadcast(2, 1, 1, mlp_times=(700, 600), mlp_blocks=1).compile(family, 10)
    assert column(near, "0.ffn") == "CCCCCRRCCC"  # a step that others begin at is computed
    assert caching.PyramidBroadcast(1, 1, 1, mlp_times=(500,)).sites(family) == [f"blocks.{i}.ffn" for i in range(3)]


def test_resting_feed_forwards_do_not_run():
    tiny = TINY["dit"]
    model, ran = tiny.model(), []
    for i, block in enumerate(model.transformer_blocks):
        block.ff.net[0].register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    method = caching.PyramidBroadcast(2, mlp_times=(900,), mlp_blocks=1, mlp_rest=2)
    with caching.applied(model, method, num_inference_steps=4):
        trajectory(tiny, model, [tiny.conditioning()], timesteps(4))
    assert ran.count(0) == 2
    assert all(ran.count(i) == 4 for i in range(1, len(model.transformer_blocks)))


@pytest.mark.parametrize(("options", "said"), [({"mlp_times": (1200,)}, "mlp_times"), ({"mlp_rest": 0}, "mlp_rest")])
def test_times_outside_of_the_trajectory_are_refused(options, said):
    with pytest.raises(FewstepError, match=said):
        caching.PyramidBroadcast(**options)


def test_the_window_is_of_the_runs_own_timesteps():
    from fewstep.caching import model_cache

    tiny = TINY["pixart"]
    model = tiny.model()

    class Scheduler:
        timesteps = torch.tensor([999, 990, 980, 970, 500, 100])

    class Pipe:
        scheduler = Scheduler()

    cache = model_cache.ModelCache(model, [caching.PyramidBroadcast(spatial=2, cross=1, window=(50, 975))], pipe=Pipe())
    trajectory(tiny, model, [tiny.conditioning()], Scheduler.timesteps)
    done = ["CR"[max(a for (s, site, a) in cache.log if (s, site) == (step, 0))] for step in range(6)]
    cache.remove()
    assert "".join(done) == "CCCRCR"
    method = caching.PyramidBroadcast(spatial=3, timesteps=(999.0, 500.0))
    assert method.describe() == "PyramidBroadcast(spatial=3)"
    with pytest.raises(FewstepError, match="2 timesteps are given for 6 steps"):
        method.compile(family_of(model), 6)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "cogvideox", "wan", "sd", "sdxl"])
def test_attention_alone_rests(name):
    tiny = TINY[name]
    model, ran = tiny.model(), []
    kinds = attentions(family_of(model))
    sites = [*kinds["spatial"], *kinds["cross"]]
    assert len(set(sites)) == len(sites) >= len(blocks_of(model))
    for site in sites:
        inner = next(m for m in model.get_submodule(site).modules() if isinstance(m, torch.nn.Linear))
        inner.register_forward_pre_hook(lambda *_, site=site: ran.append(site))
    with caching.applied(model, caching.PyramidBroadcast(2, 2, 2, window=(0, 1000)), num_inference_steps=2):
        trajectory(tiny, model, [tiny.conditioning()], timesteps(2))
    assert sorted(ran) == sorted(sites)


def test_the_number_of_steps_has_to_be_known():
    tiny = TINY["dit"]
    model, x = tiny.model(), tiny.sample()
    with (
        caching.applied(model, caching.PyramidBroadcast()),
        pytest.raises(FewstepError, match="give num_inference_steps"),
    ):
        tiny.call(model, x, torch.tensor(900), tiny.conditioning())


def test_published_settings():
    for name in PUBLISHED:
        method = caching.PyramidBroadcast.published(name)
        assert method.window[0] < method.window[1]
    assert caching.PyramidBroadcast.published("cogvideox").sites(family_of(TINY["cogvideox"].model()))
    with pytest.raises(FewstepError, match="latte"):
        caching.PyramidBroadcast.published("late")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"interval": 3, "start": 0.36}, "CCCCCRCRRCRR"),
        ({"interval": 2, "start": 0.5}, "CCCCCCCRCRCR"),
        ({"interval": 2, "start": 1.0}, "CCCCCCCCCCCC"),
    ],
)
def test_fastercache_starts_late(options, expected):
    plan = caching.FasterCache(**options).compile(family_of(TINY["cogvideox"].model()), 12)
    assert {"".join("CR"[a] for a in row) for row in plan.actions.T} == {expected}
    assert len(plan.sites) == 3


def test_fastercache_moves_on_along_the_last_change():
    tiny = TINY["dit"]
    model, outs = tiny.model(), []
    attention = model.transformer_blocks[0].attn1
    attention.register_forward_hook(
        lambda module, args, out: outs.append(out)
    )  # also called with what is put in its place
    with caching.applied(model, caching.FasterCache(4, start=0.0, weight=0.3)):
        times = timesteps(8)
        trajectory(tiny, model, [tiny.conditioning()], times)
    first, second = outs[0], outs[4]
    assert torch.equal(outs[1], first)  # one value is no direction yet
    for moved in outs[5:8]:
        assert torch.allclose(moved, second + 0.3 * (second - first), rtol=1e-5, atol=1e-6)


def test_refusals():
    with pytest.raises(FewstepError, match="window is"):
        caching.PyramidBroadcast(window=(800, 100))
    with pytest.raises(FewstepError, match="spatial is 0"):
        caching.PyramidBroadcast(spatial=0)
    with pytest.raises(FewstepError, match="start is 2"):
        caching.FasterCache(start=2)
    with pytest.raises(FewstepError, match="has none"):
        caching.apply_(TINY["unet2d"].model(), caching.FasterCache())
