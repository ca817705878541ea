"""What every cache must keep on every family: exactness, isolation of streams, copies, clean refusals."""

import copy
import pickle

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.errors import FewstepError, PlanError
from tests.caching_fixtures import (
    ROUNDING,
    STEPS,
    TINY,
    TRANSFORMERS,
    UNETS,
    plan_of,
    same,
    site_names,
    timesteps,
    trajectory,
)


def untouched(model):
    """Whether a network carries nothing of a cache."""
    return not any("forward" in vars(m) or "_diffusers_hook" in vars(m) for m in model.modules())


@pytest.fixture(params=TINY, scope="module")
def tiny(request):
    return TINY[request.param]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model()


def test_computing_everything_and_removing_change_no_bit(tiny, model):
    streams = [tiny.conditioning()]
    plain, keys = trajectory(tiny, model, streams), list(model.state_dict())
    for site in site_names(model):
        with caching.applied(model, plan_of(site, "CCCR")):
            cached = trajectory(tiny, model, streams)
            assert list(model.state_dict()) == keys
        assert same(cached[:-1], plain[:-1]), site  # what the last step reuses is kept at the one before
        assert not torch.equal(cached[-1], plain[-1]), site
        assert untouched(model), site
    assert same(trajectory(tiny, model, streams), plain)


def test_reuse_on_an_input_that_does_not_change_is_computing(tiny, model):
    times = torch.full((3,), 500)
    x, streams = tiny.sample(), [tiny.conditioning()]
    plain = trajectory(tiny, model, streams, times, x=x, move=0.0)
    assert same(plain[1:], plain[:-1])
    for site in site_names(model):
        with caching.applied(model, plan_of(site, "CRR", 3)) as controller:
            cached = trajectory(tiny, model, streams, times, x=x, move=0.0)
            assert controller.report().hit_rate == pytest.approx(2 / 3), site
        for found in cached:
            assert (found - plain[0]).abs().max() <= ROUNDING * plain[0].abs().max(), site


def test_every_site_saves_work(tiny, model):
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d)]
    count = 0

    def counted(*_):
        nonlocal count
        count += 1

    handles = [layer.register_forward_pre_hook(counted) for layer in layers]
    for site in site_names(model):
        made = []
        with caching.applied(model, plan_of(site, "CR", 2)):
            for t in timesteps(2):
                before = count
                trajectory(tiny, model, [tiny.conditioning()], [t])
                made.append(count - before)
        assert made[1] < made[0], site
    for handle in handles:
        handle.remove()


def test_a_reused_stack_saves_what_its_blocks_cost():
    tiny = TINY["dit"]
    model = tiny.model()
    inputs = {**tiny.conditioning(1), "hidden_states": tiny.sample(1), "timestep": torch.full((1,), 500)}
    tokens, width = 16, 16
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width
    feed_forward = 2 * tokens * width * 4 * width
    modulation = 256 * width + width**2 + 6 * width**2  # each block embeds the time by itself
    cost = plan_of("blocks", "CR", 2).cost(model, inputs)
    assert cost.full == cost.macs[0]
    assert cost.macs[0] - cost.macs[1] == 3 * (attention + feed_forward + modulation)
    assert cost.share == pytest.approx((cost.macs[0] + cost.macs[1]) / (2 * cost.full))


def calls(tiny, model, streams, contexts=None, samples=None):
    """The outputs by stream, for samples that do not depend on the outputs."""
    samples = samples or [tiny.sample(seed=10 + i) for i in range(STEPS)]
    found = {name: [] for name in streams}
    for x, t in zip(samples, timesteps(), strict=True):
        for name, conditioning in streams.items():
            announced = [name] if contexts else None
            found[name] += trajectory(tiny, model, [conditioning], [t], announced, x)
    return found


@pytest.mark.parametrize("contexts", [False, True])
def test_guidance_streams_do_not_share_and_their_order_does_not_matter(tiny, model, contexts):
    if not tiny.conditions and not contexts:
        pytest.skip("calls without conditioning cannot be told apart")
    streams = {"cond": tiny.conditioning(seed=2), "uncond": tiny.conditioning(seed=3)}
    for site in site_names(model)[1::3]:
        with caching.applied(model, plan_of(site), num_inference_steps=STEPS) as controller:
            alone = {}
            for name in streams:
                alone |= calls(tiny, model, {name: streams[name]}, contexts)
                controller.reset()
            both = calls(tiny, model, streams, contexts)
            controller.reset()
            swapped = calls(tiny, model, dict(reversed(streams.items())), contexts)
        for name in streams:
            assert same(both[name], alone[name]), (site, name)
            assert same(swapped[name], alone[name]), (site, name)


def test_another_batch_in_the_middle_is_computed(tiny, model):
    big, small = tiny.conditioning(3), tiny.conditioning(1, seed=5)
    for site in site_names(model)[1::3]:
        with caching.applied(model, plan_of(site, "CCRR")) as controller:
            times = timesteps()
            trajectory(tiny, model, [big], times[:3], x=tiny.sample(3))
            changed = trajectory(tiny, model, [small], times[3:4], x=tiny.sample(1, seed=4))
        assert same(changed, trajectory(tiny, model, [small], times[3:4], x=tiny.sample(1, seed=4))), site
        assert controller.report().forced == 1, site


def test_another_batch_of_one_stream_drops_what_it_kept(tiny, model):
    big = tiny.conditioning(3)
    for site in site_names(model)[1::3]:
        with caching.applied(model, plan_of(site, "CCRR")):
            times = timesteps()
            trajectory(tiny, model, [big], times[:3], ["cond"], x=tiny.sample(3))
            small = tiny.conditioning(1, seed=5)
            changed = trajectory(tiny, model, [small], times[3:4], ["cond"], x=tiny.sample(1, seed=4))
        assert same(changed, trajectory(tiny, model, [small], times[3:4], x=tiny.sample(1, seed=4))), site


def test_two_networks_of_a_class_do_not_share(tiny):
    first, second = tiny.model(0), tiny.model(1)
    streams = {"a": tiny.conditioning()}
    site = site_names(first)[1]
    with caching.applied(first, plan_of(site)), caching.applied(second, plan_of(site)):
        apart = [calls(tiny, network, streams)["a"] for network in (first, second)]
    with caching.applied(first, plan_of(site)), caching.applied(second, plan_of(site)):
        together = [[], []]
        for i, t in enumerate(timesteps()):
            for found, network in zip(together, (first, second), strict=True):
                found += trajectory(tiny, network, [streams["a"]], [t], x=tiny.sample(seed=10 + i))
    assert same(together[0], apart[0])
    assert same(together[1], apart[1])


def test_a_call_that_fails_leaves_nothing_to_reuse(tiny):
    model = tiny.model()
    streams, times = [tiny.conditioning()], timesteps()
    last = (
        dict(model.named_modules())[family_of(model).branches("feed_forward")[-1]]
        if tiny.name != "unet2d"
        else model.conv_out
    )
    for site in site_names(model)[1::3]:
        with caching.applied(model, plan_of(site, "CCCR")):
            good = trajectory(tiny, model, streams, times)
            trajectory(tiny, model, streams, times[:2])
            handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
            with pytest.raises(RuntimeError, match="out of memory"):
                trajectory(tiny, model, streams, times[2:3])
            handle.remove()
            after = trajectory(tiny, model, streams, times[3:4], x=tiny.sample(seed=4))
            again = trajectory(tiny, model, streams, times)
        assert same(after, trajectory(tiny, model, streams, times[3:4], x=tiny.sample(seed=4))), site
        assert same(again, good), site


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_a_cache_of_their_own(tiny, copied):
    model, streams = tiny.model(), [tiny.conditioning()]
    for site in site_names(model)[1::3]:
        with caching.applied(model, plan_of(site)):
            expected = trajectory(tiny, model, streams)
            trajectory(tiny, model, streams, timesteps()[:2])
            twin = copied(model)
            with torch.no_grad():
                next(model.parameters()).add_(1.0)  # the copy must not run the original's layers
            found = trajectory(tiny, twin, streams)
            with torch.no_grad():
                next(model.parameters()).sub_(1.0)
        assert same(found, expected), site
        assert caching.controller_of(twin).report().hit_rate > 0, site
        caching.remove_(twin)
        assert untouched(twin), site
        model = tiny.model()


def test_what_is_kept_ends_with_the_trajectory(tiny, model):
    streams = [tiny.conditioning()]
    for site in site_names(model)[1::3]:
        with caching.applied(model, plan_of(site)):
            first = trajectory(tiny, model, streams)
            assert same(trajectory(tiny, model, streams), first), site  # on timesteps of its own
            times = timesteps()
            assert same(trajectory(tiny, model, streams, times), first), site
            assert same(trajectory(tiny, model, streams, times), first), site  # on the same ones again
            apart = [torch.tensor(int(t)) for t in times]
            assert same(trajectory(tiny, model, streams, apart), first), site  # with each timestep by itself
            assert same(trajectory(tiny, model, streams, times), first), site


def test_refusals_leave_the_model_as_it_was(tiny, model):
    streams = [tiny.conditioning()]
    plain = trajectory(tiny, model, streams)
    whole = site_names(model)[1]
    with pytest.raises(FewstepError, match="no cache to remove"):
        caching.remove_(model)
    with pytest.raises(FewstepError, match="nowhere"):
        caching.apply_(model, caching.Interval(2, at=(whole, "nowhere")))
    with pytest.raises(FewstepError, match="share"):
        caching.apply_(model, [plan_of(whole)] * 2)
    with pytest.raises(PlanError, match="was made for AnotherModel"):
        caching.apply_(model, caching.CachePlan((whole,), np.zeros((2, 1)), model={"class": "AnotherModel"}))
    assert untouched(model)
    with caching.applied(model, plan_of(whole, "CRCR")):
        reused = trajectory(tiny, model, streams)
        with pytest.raises(FewstepError, match="has a cache already"):
            caching.apply_(model, caching.Interval(2))
        assert same(trajectory(tiny, model, streams), reused)
    assert untouched(model)
    assert same(trajectory(tiny, model, streams), plain)


@pytest.mark.parametrize("name", UNETS)
def test_another_size_in_the_middle_is_computed(name):
    tiny = TINY[name]
    model, streams, times = tiny.model(), [tiny.conditioning()], timesteps()
    large = tiny.sample(shape=(tiny.shape[0], 16, 16))
    for site in site_names(model):
        with caching.applied(model, plan_of(site, "CCRR")):
            trajectory(tiny, model, streams, times[:3])
            changed = trajectory(tiny, model, streams, times[3:], x=large)[0]
        assert torch.equal(changed, trajectory(tiny, model, streams, times[3:4], x=large)[0]), site


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_controlnet_residuals_act_at_reused_steps(name):
    tiny = TINY[name]
    model, times = tiny.model(), torch.full((2,), 500)
    shapes = [(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4)]
    generator = torch.Generator().manual_seed(5)

    def control(strength):
        return {
            "down_block_additional_residuals": [strength * torch.randn(2, *s, generator=generator) for s in shapes],
            "mid_block_additional_residual": strength * torch.randn(2, 16, 4, 4, generator=generator),
        }

    first, second = control(1.0), control(1.0)
    for site in ("encoder", "branch.0", "output"):
        with caching.applied(model, plan_of(site, "CR", 2)):
            constant = trajectory(tiny, model, [{**tiny.conditioning(), **first}], times, move=0.0)
        assert same(constant[1:], constant[:1]), site
    conditioning = tiny.conditioning()
    with caching.applied(model, plan_of("encoder", "CR", 2)):
        trajectory(tiny, model, [{**conditioning, **first}], times[:1])
        moved = trajectory(tiny, model, [{**conditioning, **second}], times[1:])
    assert same(moved, trajectory(tiny, model, [{**conditioning, **second}], times[:1]))  # the sample is the same


@pytest.mark.parametrize(
    ("name", "argument", "tokens"),
    [("sd3", "block_controlnet_hidden_states", 16), ("flux", "controlnet_block_samples", 16)],
)
def test_what_a_model_adds_between_its_blocks_is_not_added_twice(name, argument, tokens):
    tiny = TINY[name]
    model, times = tiny.model(), torch.full((2,), 500)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    generator = torch.Generator().manual_seed(5)
    control = {argument: [torch.randn(2, tokens, width, generator=generator) for _ in range(2)]}
    for site in ("blocks", "blocks[1:]", "blocks[0:2]"):
        with caching.applied(model, plan_of(site, "CR", 2)):
            computed, reused = trajectory(tiny, model, [{**tiny.conditioning(), **control}], times, move=0.0)
        assert (computed - reused).abs().max() <= ROUNDING * computed.abs().max(), site


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_ranges_are_counted_over_all_lists_of_blocks(name):
    model = TINY[name].model()
    family = family_of(model)
    count = len(family.paths)
    assert [role.path for role in family.site("blocks").roles] == family.paths
    assert [role.path for role in family.site("blocks[-2:]").roles] == family.paths[-2:]
    for empty in (f"blocks[{count}:]", "blocks[2:1]"):
        with pytest.raises(FewstepError, match="is empty"):
            family.site(empty)


@pytest.mark.parametrize("name", UNETS)
def test_a_branch_that_does_not_exist_is_refused(name):
    family = family_of(TINY[name].model())
    assert family.branch_count == 3
    with pytest.raises(FewstepError, match="branch 3"):
        family.site("branch.3")
