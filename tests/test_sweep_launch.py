"""``accelerate launch -m fewstep sweep`` as a user starts it: two processes on the CPU make what one makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.eval import Results, Sweep
from fewstep.eval.sweeps.store import opened, stored_seeds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def told(results: Results) -> list:
    """Everything in the rows but the clock and the memory."""
    return [(row.cell, row.status, row.folder, row.calls, row.macs_per_image, row.metrics) for row in results.rows]


def images(out: Path) -> dict[tuple[str, int], torch.Tensor]:
    return {
        (folder.name, first): opened(folder).peek(first, last).images
        for folder in sorted((out / "cells").iterdir())
        for first, last in stored_seeds(folder)
    }


@pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes is not tried on Windows")
def test_two_launched_processes_make_what_one_makes(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        'model = "fashion-dit-small"\nschedulers = ["diffusers:DDIMScheduler"]\nsteps = [1, 2]\nsamples = 5\n'
        'batch_size = 2\nmetrics = ["fid"]\n'
        'fidelity = "diffusers:DDIMScheduler@3"\ndevice = "cpu"\n'
    )
    # accelerate's --cpu starts a single process; its launcher of several is told by a variable to stay on the CPU.
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    launcher += f"--dynamo_backend no --main_process_port {free_port()} -m fewstep sweep"
    done = subprocess.run(
        [sys.executable, *launcher.split(), str(file), "--out", str(tmp_path / "two")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results.csv") == 1  # one of them speaks
    alone = Sweep.from_file(file).run(tmp_path / "one", progress=False)
    assert told(Results.load(tmp_path / "two")) == told(alone)
    expected, found = images(tmp_path / "one"), images(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    (session,) = json.loads((tmp_path / "two" / "manifest.json").read_text())["sessions"]
    assert session["status"] == "finished"
