"""Online decisions of a batch and of several ranks: each vote recomputed by hand, ranks that agree."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.caching.methods.voting import agreed, decisive, on_host, relative_change
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, blocks_of, decided, inputs_along, seen_by, timesteps, trajectory

STEPS = 10
REDUCED = {"mean": np.mean, "any": np.max}


def test_changes_of_samples_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 3, 4, 5, generator=generator)
    old[2], new[2] = 0.0, 0.0  # nought stays nought
    found = on_host(relative_change(new, old, "any"))
    alone = [float(relative_change(a, b)) for a, b in zip(new, old, strict=True)]
    np.testing.assert_allclose(found, alone, rtol=1e-6)  # float32 sums of 20 numbers
    assert found[2] == 0
    whole = (new - old).abs().sum() / old.abs().sum()
    assert float(relative_change(new, old)) == pytest.approx(float(whole), rel=1e-6)


def test_any_takes_the_largest_and_mean_the_mean():
    changes = np.array([0.1, 0.4, 0.1])
    assert decisive(changes, "any") == 0.4
    assert decisive(changes, "mean") == pytest.approx(0.2, rel=1e-15)


@pytest.mark.parametrize("vote", ["mean", "any"])
def test_first_block_cache_decides_by_the_vote_of_its_samples(vote):
    tiny = TINY["dit"]
    model, conditioning, times = tiny.model(), tiny.conditioning(), timesteps(STEPS)
    with caching.applied(model, caching.FirstBlockCache(0.3, vote=vote)) as controller:
        samples = inputs_along(tiny, model, conditioning, times)
        found = decided(controller)
    blocks, expected, kept = blocks_of(model), "", None
    for x, t in zip(samples, times, strict=True):
        begin, end = (seen_by(blocks[i], tiny, model, conditioning, x, t).double() for i in (0, 1))
        residual = (end - begin).flatten(1)
        reuse = kept is not None and REDUCED[vote](
            ((residual - kept).abs().sum(1) / kept.abs().sum(1)).numpy()
        ) < 0.3  # fmt: skip
        kept = kept if reuse else residual
        expected += "R" if reuse else "C"
    assert found == expected
    assert set(found) == {"C", "R"}


def test_a_sample_that_moves_makes_the_batch_compute():
    """One of two samples stands still; as a batch they move half as much as the other alone."""
    tiny = TINY["dit"]
    counts = {}
    for vote in ("batch", "mean", "any"):
        model, conditioning = tiny.model(), tiny.conditioning()
        with caching.applied(model, caching.TeaCache(0.6, (1.0, 0.0), "input", vote=vote)) as controller:
            x = tiny.sample()
            still = torch.zeros_like(x[:1])
            for i, t in enumerate(timesteps(STEPS)):
                with torch.no_grad():
                    tiny.call(model, torch.cat([x[:1] * (1 + 0.3 * i), still + x[1:]]), t, conditioning)
            counts[vote] = decided(controller).count("C")
    assert counts["any"] > counts["mean"] >= 2
    assert counts["any"] > counts["batch"]


def test_batches_of_one_are_decided_alike_by_every_vote():
    tiny = TINY["dit"]
    found = set()
    for vote in ("batch", "mean", "any"):
        model = tiny.model()
        with caching.applied(model, caching.FirstBlockCache(0.2, vote=vote)) as controller:
            trajectory(tiny, model, [tiny.conditioning(1)], timesteps(STEPS), x=tiny.sample(1))
            found.add(decided(controller))
    assert len(found) == 1


def test_a_batch_that_is_halved_on_the_way_is_computed_first():
    tiny = TINY["dit"]
    model, conditioning, x = tiny.model(), tiny.conditioning(4), tiny.sample(4)
    half = {name: value[2:] for name, value in conditioning.items()}
    with caching.applied(model, caching.FirstBlockCache(1e9)) as controller, torch.no_grad():
        for i, t in enumerate(timesteps(6)):
            tiny.call(model, x if i < 3 else x[2:], t, conditioning if i < 3 else half)
        assert decided(controller) == "CRRCRR"


def test_an_unknown_vote_is_refused():
    with pytest.raises(FewstepError, match="unknown vote 'majority'"):
        caching.FirstBlockCache(vote="majority")


def test_alone_a_process_asks_nobody():
    for answer in (True, False):
        assert agreed(answer, torch.device("cpu"), ranks=True) is answer


def rank_decides(rank, store, answers):
    """In a process of its own: what a rank decides that sees its own samples, with the others and by itself."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tiny, found = TINY["dit"], []
    for ranks in (True, False):
        model, conditioning = tiny.model(), tiny.conditioning(seed=rank)
        method = caching.FirstBlockCache(0.6 - 0.3 * rank, ranks=ranks)  # as if rank 1 saw larger changes
        with caching.applied(model, method) as controller:
            trajectory(tiny, model, [conditioning], timesteps(STEPS), x=tiny.sample(seed=rank))
            found.append(decided(controller))
    answers.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes cannot be forked here")
def test_two_ranks_decide_as_one_where_they_are_asked_to(tmp_path):
    context = multiprocessing.get_context("fork")  # which need not import everything once more
    answers = context.Queue()
    running = [context.Process(target=rank_decides, args=(rank, tmp_path / "store", answers)) for rank in (0, 1)]
    for process in running:
        process.start()
    told = dict(answers.get(timeout=120) for _ in running)
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0, 0]
    assert told[0][0] == told[1][0]
    assert set(told[0][0]) == {"C", "R"}
    assert told[0][1] != told[1][1]
