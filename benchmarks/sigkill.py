"""A sweep killed at random moments, on full disks, and with damaged files: is what it ends with what it would have been?

    python benchmarks/sigkill.py [--kills 50] [--disks 12] [--damages 60] [--seed 0] [--out FOLDER]

One sweep of an embedded model (two cells of 8 images in batches of 2, FID, one held against the other) is run
undisturbed. Then:

- SIGKILL: each time a new process runs it into an empty folder and is killed after a time drawn evenly from the run's length
  (from its first file on, so that no kill falls into the imports), and a second process goes on with the folder;
- full disks: the same on a tmpfs (or, where this process may not mount one, under a limit on the size of files) that is too
  small by an amount drawn at random; then the disk gets room, and a second process goes on;
- damage: in a copy of the finished folder one file is cut short or has one bit flipped, and the sweep is run again.

Compared with the undisturbed folder: every image and latent, every record but its clock and memory, the scores, the lines of
single images, the rows of the results but their clock and memory. "Wrong" counts folders that differ in any of these at the
end; "lost" counts chunk files that were whole when the process died and were made again all the same. After damage, and
before the repair, each reader must say that a file is damaged or read what was written: "unnoticed" counts the others.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, machine, provenance, table, write
from safetensors.torch import load

from fewstep import pipelines
from fewstep.errors import ArtifactError
from fewstep.eval import Results, Sweep, fingerprint
from fewstep.eval.metrics import make_metrics
from fewstep.eval.sweeps import manifest, state
from fewstep.eval.sweeps.store import opened, stored_seeds

CLOCKS = ("seconds", "memory")
COLUMNS = ("seconds_per_image", "peak_bytes", "redone")
STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="processes to kill (%(default)s)")
    parser.add_argument("--disks", type=int, default=12, help="disks that fill up (%(default)s)")
    parser.add_argument("--damages", type=int, default=60, help="files to damage (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked processes: torch's threads would not survive
    pipelines.load("fashion-dit-small")  # what is imported on the way need not be imported in each of them
    make_metrics(["fid"])
    about = machine()
    chooser = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        whole = work / "whole"
        assert finished(whole) == 0
        length = time.perf_counter()
        assert finished(work / "again") == 0
        length = time.perf_counter() - length
        expected = account(whole)
        assert account(work / "again") == expected, "two undisturbed runs differ"
        body = {
            "machine": about,
            "seconds": round(length, 2),
            "kills": kills(work / "kill", expected, length, chooser, options.kills),
            "disks": [full_disk(work / "disk", expected, whole, chooser) for _ in range(options.disks)],
            "damages": [damaged(work / "damage", expected, whole, chooser) for _ in range(options.damages)],
        }
    page = report(body) + "\n" + provenance(about)
    write(options.out, "sigkill", body, page)
    print(page)
    if any(one["wrong"] for kind in ("kills", "disks", "damages") for one in body[kind]):
        sys.exit(1)


def sweep() -> Sweep:
    return Sweep(
        "fashion-dit-small", ["diffusers:DDIMScheduler"], [STEPS], guidance=1.0, samples=8, batch_size=2,
        metrics=["fid"], fidelity="diffusers:DDIMScheduler@4", device="cpu",
    )  # fmt: skip


def run(out: Path) -> None:
    """In a process of its own: exit code 3 for a disk that is full."""
    try:
        sweep().run(out, progress=False, command=["sweep"])
    except OSError:
        os._exit(3)
    os._exit(0)


def start(out: Path, prepare: Callable[[], None] | None = None) -> multiprocessing.Process:
    """Forked from this process, which has imported everything: moments are those of the sweep, not of imports."""

    def prepared() -> None:
        if prepare is not None:
            prepare()
        run(out)

    context: Any = multiprocessing.get_context("fork")
    process: multiprocessing.Process = context.Process(target=prepared)
    process.start()
    return process


def finished(out: Path, prepare: Callable[[], None] | None = None) -> int:
    """The exit code of a whole run."""
    process = start(out, prepare)
    process.join()
    return int(process.exitcode or 0)


# -- what a folder holds ------------------------------------------------------------------------------------------------------


def account(out: Path) -> dict[str, str]:
    """Hashes of everything that may not depend on what happened on the way, by what it is of."""
    found = {"rows": fingerprint.of_json(rows(out)), "table": fingerprint.of_json(lines(out))}
    found["cells"] = fingerprint.of_json(
        [{k: v for k, v in cell.items() if k != "error"} for cell in manifest.load(out)["cells"]]
    )
    for folder in sorted((out / "cells").iterdir()):
        store = opened(folder)
        for first, last in stored_seeds(folder):
            chunk = store.peek(first, last)
            assert chunk is not None, (folder.name, first)
            assert chunk.latents is not None
            record = {key: value for key, value in chunk.record.items() if key not in CLOCKS}
            tensors = fingerprint.of_tensors([("images", chunk.images), ("latents", chunk.latents)])
            found[f"{folder.name} {first}"] = tensors + fingerprint.of_json(record)
        for path in sorted(folder.glob("samples-*.jsonl")):
            first, last = map(int, path.stem.split("-")[1:])
            found[f"{folder.name} {path.name}"] = fingerprint.of_json(store.samples(range(first, last + 1)))
        for path in sorted(folder.glob("scores-*.json")):
            kept = json.loads(path.read_text())
            found[f"{folder.name} {path.name}"] = fingerprint.of_json(kept["scores"])
            assert kept["sha256"] == found[f"{folder.name} {path.name}"], path.name  # as a run that goes on asserts
    return found


def rows(out: Path) -> list[Any]:
    """The results but clock, memory and repairs."""
    return [{k: v for k, v in vars(row).items() if k not in COLUMNS} for row in Results.load(out).rows]


def lines(out: Path) -> list[Any]:
    """The same of the table for people."""
    table = csv.DictReader(io.StringIO((out / "results.csv").read_text()))
    return [{k: v for k, v in row.items() if k not in COLUMNS} for row in table]


def chunks(out: Path) -> dict[str, int]:
    """Chunk files that are whole, by name, with the time of their writing."""
    found = {}
    for path in out.glob("cells/*/[0-9]*.safetensors"):
        with suppress(Exception):
            load(path.read_bytes())
            found[str(path.relative_to(out))] = path.stat().st_mtime_ns
    return found


def judged(out: Path, expected: dict[str, str], before: dict[str, int]) -> dict[str, Any]:
    """Whether the folder is what it would have been, and whether anything was made twice."""
    after = chunks(out)
    try:
        differing = sorted(k for k, v in expected.items() if account(out).get(k) != v)
    except (ArtifactError, AssertionError, OSError, ValueError) as error:
        differing = [f"{type(error).__name__}: {error}"]
    lost = sum(after.get(name) != written for name, written in before.items())
    return {"there": len(before), "lost": lost, "wrong": differing}


# -- what happens to it -------------------------------------------------------------------------------------------------------


def kills(
    out: Path, expected: dict[str, str], length: float, chooser: random.Random, count: int
) -> list[dict[str, Any]]:
    """Until so many have come in time: on a busy machine no two runs are of one length."""
    found: list[dict[str, Any]] = []
    while sum(not one["survived"] for one in found) < count:
        found.append(killed(out, expected, length, chooser))
    return found


def killed(out: Path, expected: dict[str, str], length: float, chooser: random.Random) -> dict[str, Any]:
    """Killed at a random moment, and gone on with."""
    shutil.rmtree(out, ignore_errors=True)
    moment = chooser.uniform(0, length)
    process = start(out)
    begin = time.perf_counter()
    process.join(moment)
    assert process.pid is not None
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    spent = time.perf_counter() - begin
    survived = process.exitcode != -signal.SIGKILL
    leftovers = len([path for path in out.rglob(".*") if path.name != ".lock"]) if out.exists() else 0
    before = chunks(out)
    code = finished(out)
    found = {"seconds": round(spent, 3), "survived": survived, "leftovers": leftovers, "code": code}
    found |= judged(out, expected, before)
    print(found, flush=True)
    return found


def full_disk(out: Path, expected: dict[str, str], whole: Path, chooser: random.Random) -> dict[str, Any]:
    """A disk that is too small by a random amount, then large enough."""
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole.rglob("*") if path.is_file())
    room = int(size * chooser.uniform(0.05, 0.95))
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with small_disk(out, room) as (kind, limit, grow):
        code = finished(out, limit)
        leftovers = len([path for path in out.rglob(".*") if path.name != ".lock"])
        before = chunks(out)
        grow()
        second = finished(out)
        found: dict[str, Any] = {"kind": kind, "bytes": room, "first": code, "leftovers": leftovers, "code": second}
        found |= judged(out, expected, before)
    print(found, flush=True)
    return found


@contextmanager
def small_disk(out: Path, room: int) -> Iterator[tuple[str, Callable[[], None] | None, Callable[[], None]]]:
    """A tmpfs of so many bytes; where it may not be mounted, a limit on the size of single files for the first process."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(out)]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield (
                "tmpfs",
                None,
                lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(out)], check=True) and None,
            )
        finally:
            subprocess.run(["umount", str(out)], check=True)
        return

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error then, and no signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(room, 8192), resource.RLIM_INFINITY))

    yield "file size limit", limit, lambda: None


def damaged(out: Path, expected: dict[str, str], whole: Path, chooser: random.Random) -> dict[str, Any]:
    """One file cut short or with one bit flipped: noticed by readers, and repaired by the next run."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out)
    victim = chooser.choice(sorted(path for path in out.rglob("*") if path.is_file() and path.name != ".lock"))
    data = victim.read_bytes()
    at = chooser.randrange(len(data))
    if cut := chooser.random() < 0.5:
        victim.write_bytes(data[:at])
    else:
        victim.write_bytes(data[:at] + bytes([data[at] ^ (1 << chooser.randrange(8))]) + data[at + 1 :])
    unnoticed = not noticed(out, expected)
    intact = {name: when for name, when in chunks(out).items() if out / name != victim}
    code = finished(out)
    found: dict[str, Any] = {
        "file": str(victim.relative_to(out)), "how": "cut" if cut else "flipped", "unnoticed": unnoticed, "code": code,
    }  # fmt: skip
    found |= judged(out, expected, intact)
    print(found, flush=True)
    return found


def noticed(out: Path, expected: dict[str, str]) -> bool:
    """Whether readers refuse a damaged folder, say what is damaged, or read what was written all the same."""
    try:
        said = state.status(out)
        return bool(said.damaged) or account(out) == expected
    except (ArtifactError, AssertionError, KeyError, ValueError):
        return True


# -- the page -----------------------------------------------------------------------------------------------------------------


def report(body: dict[str, Any]) -> str:
    kinds = (("kills", "SIGKILL"), ("disks", "full disk"), ("damages", "cut or flipped file"))
    shown = [
        [
            name,
            str(len(body[kind])),
            str(sum(one["there"] for one in body[kind])),
            str(sum(one["lost"] for one in body[kind])),
            str(sum(bool(one["wrong"]) or bool(one["code"]) for one in body[kind])),
            str(sum(one["unnoticed"] for one in body[kind])) if kind == "damages" else "",
        ]
        for kind, name in kinds
    ]
    survived = sum(one["survived"] for one in body["kills"])
    stopped = sum(one["first"] == 3 for one in body["disks"])
    disks = ", ".join(sorted({one["kind"] for one in body["disks"]}))
    header = ["", "times", "chunks there", "made twice", "wrong at the end", "unnoticed"]
    return (
        "# Sweeps that are disturbed\n\n"
        f"A sweep of {body['seconds']} s (2 cells, 8 images each, 8 chunk files) against itself undisturbed. Of the kills, "
        f"{survived} came when the sweep had ended; {stopped} of the full disks ({disks}) stopped it.\n\n"
        + table(header, shown)
    )


if __name__ == "__main__":
    main()
