"""A sweep on Ray: cells as tasks, each retried where its worker dies, in the folder and the format of any other sweep."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import FewstepError
from fewstep.eval.sweeps.cell import Cell
from fewstep.eval.sweeps.results import Row
from fewstep.eval.sweeps.running import CellDone

if TYPE_CHECKING:
    from fewstep.eval.sweeps.sweep import Sweep

LOCAL = "local"
RETRIES = 3  # of a cell whose worker died; what was drawn before is in the folder
_KEPT: dict[tuple[str, str], Callable[[Cell], CellDone]] = {}
"""In a worker: what runs the cells of a model that is loaded, by the run and the model."""


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray itself, connected: to ``address`` (``auto`` finds a cluster that this machine is part of), or with ``local`` to workers
    that are started here, one a core; where the program is connected already, to what it is.

    Raises:
        FewstepError: where Ray is not installed, or nothing answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # hide no GPU from the driver
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise FewstepError("a sweep on Ray needs Ray, which is not installed; pip install 'fewstep[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    local = {"num_cpus": os.cpu_count(), "include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        ray.init(log_to_driver=False, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise FewstepError(f"no Ray at {address!r}: {error}; give {LOCAL!r} or the address of a cluster") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_on(
    ray: Any, sweep: Sweep, out: Path, waves: Sequence[Sequence[Cell]], done: Callable[[CellDone], None]
) -> None:
    """Run cells as tasks of one CPU, and of one GPU each where the cluster has some that the sweep may use.

    Args:
        ray: connected.
        sweep: sent once.
        out: a folder that all workers see under this path.
        waves: cells that may be run at the same time; the next ones begin when these are done.
        done: told of every cell, in the order in which they end.

    Raises:
        OSError: where a worker cannot write ``out``.
    """
    gpus = ray.cluster_resources().get("GPU", 0) if str(sweep.device or "cuda").startswith("cuda") else 0
    options = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_retries": RETRIES}
    task = ray.remote(**options)(_task)
    token, shared = uuid.uuid4().hex, ray.put(sweep)
    for wave in waves:
        waiting = {task.remote(token, shared, str(out.resolve()), cell): cell for cell in wave}
        try:
            while waiting:
                (first, *_), _ = ray.wait(list(waiting))
                done(_collected(ray, first, waiting.pop(first)))
        finally:
            for left in waiting:
                ray.cancel(left)


def _collected(ray: Any, reference: Any, cell: Cell) -> CellDone:
    try:
        found: CellDone = ray.get(reference)
    except OSError:
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines() or [""]
        return CellDone(Row(**cell.axes, status="failed", error=f"{type(error).__name__}: {reason[0]}"), {}, {})
    return found


def _task(token: str, sweep: Sweep, out: str, cell: Cell) -> CellDone:
    """In a worker; the model stays loaded for the next cell of the same run."""
    from fewstep.eval.sweeps.run import worker

    if (token, cell.model) not in _KEPT:
        _KEPT.clear()  # one model at a time: two may not fit
        _KEPT[token, cell.model] = worker(sweep, Path(out), cell.model)
    return _KEPT[token, cell.model](cell)
