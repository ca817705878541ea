"""Cells as tasks of a local Ray: two workers, one of which is killed on the way, make what one process makes."""

import json
import os
import signal
import sys

import pytest
import torch

from fewstep.eval import Fid, Results, Sweep
from fewstep.eval.sweeps.store import opened, stored_seeds
from tests import eval_fixtures
from tests.eval_fixtures import random_images, tiny_features, tiny_unconditional

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fewstep[ray]'")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


@pytest.fixture(scope="module")
def two_workers():
    """This folder's modules travel with the tasks: the workers may not find them."""
    ray.cloudpickle.register_pickle_by_value(eval_fixtures)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(eval_fixtures)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class KilledOnce:
    """Ends its process at the network's first call that finds no marker, and leaves the marker."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __call__(self, module, args):
        if not os.path.exists(self.marker):
            with open(self.marker, "x") as file:
                file.write(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)


def request(**changes):
    """Without text encoders, whose library takes workers long to import."""
    asked = {
        "schedulers": ["diffusers:DDIMScheduler"], "steps": [1, 2], "samples": 3, "batch_size": 2,
        "fidelity": "diffusers:DDIMScheduler@3", "metrics": [Fid(random_images(20), tiny_features())],
    }  # fmt: skip
    return Sweep(tiny_unconditional(), **asked | changes)


def told(results: Results) -> list:
    """Everything in the rows but the clock and the memory."""
    return [
        [row.cell, row.status, row.folder, row.samples, row.calls, row.nfe_per_image, row.macs_per_image, row.metrics]
        for row in results.rows
    ]


def images(out) -> dict:
    return {
        (folder.name, first): opened(folder).peek(first, last).images
        for folder in sorted((out / "cells").iterdir())
        for first, last in stored_seeds(folder)
    }


def test_a_worker_that_is_killed_changes_nothing(two_workers, tmp_path):
    whole = request().run(tmp_path / "alone", progress=False)
    marker = tmp_path / "killed"
    sweep = request()
    sweep.model.unet.register_forward_pre_hook(KilledOnce(str(marker)))
    found = sweep.run(tmp_path / "ray", progress=False, ray="local")
    assert int(marker.read_text()) != os.getpid()
    assert told(found) == told(whole)
    assert Results.load(tmp_path / "ray") == found
    expected, made = images(tmp_path / "alone"), images(tmp_path / "ray")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in expected)
    assert not [path for path in (tmp_path / "ray").rglob(".*") if path.name != ".lock"]
    manifest = json.loads((tmp_path / "ray" / "manifest.json").read_text())
    assert manifest["sessions"][0]["status"] == "finished"
    assert len(manifest["sweep"]["models"]) == 1
    assert {cell["folder"] for cell in manifest["cells"]} == {row.folder for row in found.rows}
    # On its own, the next run finds everything done.
    assert told(request().run(tmp_path / "ray", progress=False)) == told(whole)


def out_of_memory(module, args):
    raise RuntimeError("out of memory")


def test_a_failing_cell_is_a_failed_row_and_a_full_disk_is_raised(two_workers, tmp_path):
    sweep = request(fidelity=None, metrics=[], steps=[2])
    sweep.model.unet.register_forward_pre_hook(out_of_memory)
    (row,) = sweep.run(tmp_path, progress=False, ray="local").rows
    assert (row.status, row.error) == ("failed", "RuntimeError: out of memory")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "cells").write_text("a file where a folder has to be")
    with pytest.raises(OSError, match="cells"):
        request(fidelity=None, metrics=[], steps=[2]).run(tmp_path / "taken", progress=False, ray="local")
