"""MACs in sweeps: counted once for cells that execute alike, remembered, and those that were really executed."""

import shutil

import pytest

from fewstep.eval import CallCounter, MacCounter
from fewstep.eval.drawing.batch import draw
from fewstep.eval.sweeps import painting
from fewstep.eval.sweeps.transforms import Transform
from tests.eval_fixtures import PROMPTS, tiny_pipeline, tiny_sweep

DDIM = "diffusers:DDIMScheduler"


def every_second(pipe):
    """A cache that gives the last output again at every second call."""
    forward, kept = pipe.unet.forward, []

    def cached(*args, **kwargs):
        if kept:
            return kept.pop()
        output = forward(*args, **kwargs)
        kept.append(output)
        return output

    pipe.unet.forward = cached


def give_back(pipe):
    del pipe.unet.forward


SKIP = Transform.pair("skip", every_second, give_back)


def request(pipe, **changes):
    asked = {"model": pipe, "schedulers": (DDIM,), "steps": (2, 3), "samples": 2, "metrics": ()}
    return tiny_sweep(**asked | changes)


@pytest.fixture
def pipe():
    return tiny_pipeline()


def test_cells_that_execute_alike_are_counted_once(tmp_path, pipe):
    with CallCounter(pipe) as counter:
        two, three = request(pipe).run(tmp_path, progress=False).rows
    assert counter.calls == 2 + 2 + 3  # the first cell's rehearsal, and the batch of each
    with MacCounter(pipe) as counted:
        draw(pipe, PROMPTS[:1], [0], steps=3, guidance=3.0)
    assert three.macs_per_image == counted.executed
    assert two.macs_per_image == pytest.approx(counted.executed * 2 / 3, rel=1e-15)
    assert (two.effective_nfe_per_image, three.effective_nfe_per_image) == (4, 6)


def test_a_cache_is_counted_in_every_cell(tmp_path, pipe):
    plain, skipping, _, other = (
        request(pipe, steps=(2, 3), caches=("none", SKIP)).run(tmp_path, progress=False).rows[:4]
    )
    cells = {(row.cache, row.steps): row for row in (plain, skipping, _, other)}
    assert cells["none", 2].effective_nfe_per_image == cells["none", 2].nfe_per_image == 4
    assert [cells["skip", n].nfe_per_image for n in (2, 3)] == [4, 6]
    assert [cells["skip", n].effective_nfe_per_image for n in (2, 3)] == [2, 4]  # calls 1 and 3 are executed
    assert cells["skip", 2].macs_per_image * 2 == cells["skip", 3].macs_per_image == cells["none", 2].macs_per_image


def test_a_resumed_sweep_remembers_them_and_a_damaged_memory_is_none(tmp_path, pipe, monkeypatch):
    sweep = request(pipe, caches=("none", SKIP))
    macs = [row.macs_per_image for row in sweep.run(tmp_path, progress=False).rows]
    shutil.rmtree(tmp_path / "cells")
    counted = []
    monkeypatch.setattr(painting, "MacCounter", lambda pipe: counted.append(pipe) or MacCounter(pipe))
    assert [row.macs_per_image for row in sweep.run(tmp_path, progress=False).rows] == macs
    assert not counted
    for path in (tmp_path / "macs").iterdir():
        path.write_text(path.read_text().replace('"macs": ', '"macs": 1'))
    shutil.rmtree(tmp_path / "cells")
    assert [row.macs_per_image for row in sweep.run(tmp_path, progress=False).rows] == macs
    assert len(counted) == 3  # one for the plain cells, one for each with the cache


def test_many_batches_need_no_rehearsal_of_their_own(tmp_path, pipe):
    """The plain network's first batch warms it; a changed one's slow first batch does not move the median of three."""
    sweep = request(pipe, steps=(2,), samples=6, caches=("none", SKIP))
    with CallCounter(pipe) as counter:
        assert not sweep.run(tmp_path, progress=False).failed
    plain, skipping = 2 * 4, 2 + 2 * 3  # a whole batch before three; one image, to count it, before three
    assert counter.calls == plain + skipping
    assert counter.samples == 2 * 2 * 2 * 4 + 2 * 2 * 1 + 2 * 2 * 2 * 3
