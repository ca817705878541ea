"""Trackers of accelerate: every finished cell is one step with its numbers, and one that fails stops nothing."""

import pytest
from accelerate.tracking import GeneralTracker

from fewstep.eval import Fid, Sweep
from tests.eval_fixtures import random_images, tiny_features, tiny_unconditional


class Diary(GeneralTracker):
    """Writes down what it is told."""

    name = "diary"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.told: list = []

    @property
    def tracker(self):
        return self.told

    def store_init_configuration(self, values):
        self.told.append(values)

    def log(self, values, step=None, **kwargs):
        self.told.append((step, values))

    def finish(self):
        self.told.append("finished")


class Offline(Diary):
    name = "offline"

    def log(self, values, step=None, **kwargs):
        raise ConnectionError("no route")


def request(*trackers, **changes):
    asked = {"steps": [1, 2], "samples": 2, "metrics": [Fid(random_images(20), tiny_features())], "trackers": trackers}
    return Sweep(tiny_unconditional(), ["diffusers:DDIMScheduler"], **asked | changes)


def test_every_finished_cell_is_a_step(tmp_path):
    diary = Diary()
    rows = request(diary).run(tmp_path, progress=False).rows
    settings, *steps, end = diary.told
    assert end == "finished"
    assert settings["schedulers"] == "diffusers:DDIMScheduler"
    assert all(isinstance(value, int | float | str) for value in settings.values())
    assert [step for step, _ in steps] == [0, 1]
    for (_, values), row in zip(steps, rows, strict=True):
        assert values["steps"] == row.steps
        assert values["fid"] == row.value("fid")
        assert values["nfe_per_image"] == row.nfe_per_image
        assert values["status"] == "ok"


def test_a_tracker_that_fails_is_left_out(tmp_path):
    offline, diary = Offline(), Diary()
    with pytest.warns(UserWarning, match=r"tracker offline gave up \(ConnectionError: no route\); the sweep goes on"):
        assert not request(offline, diary).run(tmp_path, progress=False).failed
    assert len(offline.told) == 1
    assert len(diary.told) == 4


def test_tensorboard_by_its_name(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = request("tensorboard").run(tmp_path, progress=False).rows
    events = EventAccumulator(str(tmp_path / "trackers" / "fewstep"))
    events.Reload()
    found = events.Scalars("fid")
    assert [event.step for event in found] == [0, 1]
    # Events are float32.
    assert [event.value for event in found] == [pytest.approx(row.value("fid"), rel=2**-23) for row in rows]


@pytest.mark.parametrize(
    ("trackers", "said"),
    [
        (("tensorbord",), "unknown tracker 'tensorbord'; did you mean 'tensorboard'"),
        ((3,), "unknown tracker 3"),
        (("clearml",), "tracker 'clearml' is not installed; pip install clearml"),
    ],
)
def test_a_tracker_that_cannot_be_is_one_clear_error(tmp_path, trackers, said):
    with pytest.raises(ValueError, match=said):
        request(*trackers).run(tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="trackers is 'tensorboard'; give a list"):
        request(trackers="tensorboard").run(tmp_path / "out", progress=False)
