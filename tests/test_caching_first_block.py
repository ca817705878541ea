"""FirstBlockCache and DBCache: decisions recomputed by hand, limits, parity with diffusers' own."""

import pytest
import torch

from fewstep import caching
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, TRANSFORMERS, blocks_of, decided, inputs_along, seen_by, timesteps, trajectory

STEPS = 10


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("front", [1, 2])
def test_decisions_are_those_of_the_front_residual(name, front):
    tiny = TINY[name]
    model, conditioning, times = tiny.model(), tiny.conditioning(), timesteps(STEPS)
    threshold = 0.6 if name in ("flux", "cogvideox") and front == 2 else 0.3 / front
    with caching.applied(model, caching.FirstBlockCache(threshold, front)) as controller:
        samples = inputs_along(tiny, model, conditioning, times)
        found = decided(controller)
    blocks, expected, kept = blocks_of(model), "", None
    for x, t in zip(samples, times, strict=True):
        begin, end = (seen_by(blocks[i], tiny, model, conditioning, x, t).double() for i in (0, front))
        residual = end - begin
        reuse = kept is not None and (residual - kept).abs().mean() / kept.abs().mean() < threshold
        kept = kept if reuse else residual
        expected += "R" if reuse else "C"
    assert found == expected
    assert set(found) == {"C", "R"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "CRRRRRRRRR"),
        ({"warmup": 3}, "CCCRRRRRRR"),
        ({"cooldown": 2}, "CRRRRRRRCC"),
        ({"max_run": 2}, "CRRCRRCRRC"),
        ({"max_run": 0}, "CCCCCCCCCC"),
        ({"max_reuse": 4, "max_run": 1}, "CRCRCRCRCC"),
        ({"always": (2, 5)}, "CRCRRCRRRR"),
    ],
)
def test_limits(options, expected):
    tiny = TINY["dit"]
    model = tiny.model()
    with caching.applied(model, caching.FirstBlockCache(1e9, **options)) as controller:
        trajectory(tiny, model, [tiny.conditioning()], timesteps(STEPS))
        assert decided(controller) == expected


def test_nothing_is_reused_below_every_change():
    tiny = TINY["dit"]
    model, streams = tiny.model(), [tiny.conditioning()]
    plain = trajectory(tiny, model, streams)
    with caching.applied(model, caching.FirstBlockCache(1e-9)) as controller:
        cached = trajectory(tiny, model, streams)
        assert decided(controller) == "CCCC"
        assert "nothing was reused" in str(controller.report())
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))


def test_front_and_back_blocks_always_run():
    tiny = TINY["flux"]  # two double and two single blocks
    model, ran = tiny.model(), []
    for index, block in enumerate(blocks_of(model)):
        first = block.norm1 if hasattr(block, "norm1") else block.norm
        first.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    method = caching.DBCache(1e9, front_blocks=1, back_blocks=1, warmup=2)
    with caching.applied(model, method) as controller:
        trajectory(tiny, model, [tiny.conditioning()])
        assert decided(controller) == "CCRR"
    assert ran == [0, 1, 2, 3] * 2 + [0, 3] * 2


def test_each_stream_decides_for_itself():
    tiny = TINY["wan"]
    model = tiny.model()
    moving, still = tiny.conditioning(seed=2), tiny.conditioning(seed=3)
    x, times = tiny.sample(), torch.full((4,), 500)
    with caching.applied(model, caching.FirstBlockCache(1e-3)) as controller, torch.no_grad():
        for i, t in enumerate(times):
            trajectory(tiny, model, [moving], [t], ["cond"], tiny.sample(seed=i))  # always changes
            trajectory(tiny, model, [still], [t], ["uncond"], x)  # never does
        counts = controller.report().counts
    assert [dict(counts[step, 0]) for step in range(4)] == [{0: 2}, *[{0: 1, 1: 1}] * 3]


@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox"])
def test_diffusers_own_gives_the_same(name):
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    tiny = TINY[name]
    streams, times = [tiny.conditioning()], timesteps(STEPS)
    ours, theirs = tiny.model(), tiny.model()
    with caching.applied(ours, caching.FirstBlockCache(0.3)) as controller:
        expected = trajectory(tiny, ours, streams, times, ["cond"])
        assert set(decided(controller)) == {"C", "R"}
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=0.3))
    found = trajectory(tiny, theirs, streams, times, ["cond"])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)  # they add the residuals in another order


def test_extrapolated_residuals():
    """Where the input stays the same a straight line through two equal residuals is that residual."""
    tiny = TINY["sd3"]
    model, streams, times = tiny.model(), [tiny.conditioning()], torch.full((4,), 500)
    method = caching.FirstBlockCache(0.1, warmup=2, predict=caching.Extrapolate(1))
    with caching.applied(model, method) as controller:
        outputs = trajectory(tiny, model, streams, times, move=0.0)
        assert decided(controller) == "CCRR"
    assert (outputs[0] - outputs[3]).abs().max() <= 1e-5 * outputs[0].abs().max()


def test_a_network_that_leaves_blocks_out_by_itself_keeps_nothing_wrong():
    """Skip-layer guidance: a range that begins with a block that does not run has no residual."""
    tiny = TINY["sd3"]
    model, conditioning = tiny.model(), {**tiny.conditioning(), "skip_layers": [1]}
    plain = trajectory(tiny, model, [conditioning])
    with caching.applied(model, caching.FirstBlockCache(1e9)) as controller:
        cached = trajectory(tiny, model, [conditioning])
        assert controller.report().hit_rate == 0
    assert all(torch.equal(a, b) for a, b in zip(cached, plain, strict=True))


def test_they_are_written_as_they_are_made():
    assert caching.FirstBlockCache(0.1, max_run=2).describe() == "FirstBlockCache(max_run=2, threshold=0.1)"
    assert caching.DBCache().describe() == "DBCache(threshold=0.08)"


def test_refusals():
    dit = TINY["dit"].model()
    with pytest.raises(FewstepError, match="threshold is 0"):
        caching.FirstBlockCache(0)
    with pytest.raises(FewstepError, match="warmup is 0"):
        caching.FirstBlockCache(warmup=0)
    with pytest.raises(FewstepError, match="TeaCache and DeepCache serve UNets"):
        caching.apply_(TINY["sd"].model(), caching.FirstBlockCache())
    with pytest.raises(FewstepError, match="leave nothing to reuse of the 3"):
        caching.apply_(dit, caching.DBCache())
    with pytest.raises(FewstepError, match="front_blocks is 0"):
        caching.FirstBlockCache(front_blocks=0)
    assert caching.controller_of(dit) is None
