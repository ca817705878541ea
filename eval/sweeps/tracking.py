"""Experiment trackers, those of accelerate: each finished cell's numbers, beside what the sweep writes itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError, unknown
from fewstep.eval.sweeps.results import Row

PROJECT = "fewstep"
FOLDER = "trackers"
_COSTS = ("nfe_per_image", "effective_nfe_per_image", "macs_per_image", "seconds_per_image", "peak_bytes")


def check_trackers(trackers: Sequence[Any]) -> None:
    """Raises FewstepError for what is no tracker, or one whose package is not installed."""
    from accelerate.tracking import GeneralTracker, get_available_trackers

    if isinstance(trackers, str) or not isinstance(trackers, Sequence):
        raise FewstepError(f"trackers is {trackers!r}; give a list")
    known = sorted(_classes())
    for tracker in trackers:
        if isinstance(tracker, GeneralTracker):
            continue
        if tracker not in known:
            raise FewstepError(unknown("tracker", tracker, known))
        if tracker not in map(str, get_available_trackers()):
            raise FewstepError(f"tracker {tracker!r} is not installed; pip install {tracker}")


class Trackers:
    """Open while a sweep runs. One that fails is told once and then left out: no number depends on it.

    Args:
        trackers: names that accelerate knows (``tensorboard``, ``wandb``, ...), or trackers of its class.
        out: the sweep's folder; files of trackers that write some go to ``out/trackers``.
        request: the sweep as JSON, for their overview.
    """

    def __init__(self, trackers: Sequence[Any], out: Path, request: Mapping[str, Any]) -> None:
        self._asked, self._folder = trackers, out / FOLDER
        self._settings = {key: _plain(value) for key, value in request.items() if key != "cells"}
        self._open: list[Any] = []

    def __enter__(self) -> Trackers:
        for asked in self._asked:
            self._try(asked, self._start)
        return self

    def log(self, row: Row, step: int) -> None:
        """One step a cell: its axes, and the numbers that it has."""
        values: dict[str, Any] = {axis: _plain(value) for axis, value in row.cell.axes.items()}
        values |= {"status": row.status}
        values |= {name: value for name in row.metrics if (value := row.value(name)) is not None}
        values |= {name: float(value) for name in _COSTS if (value := getattr(row, name)) is not None}
        for tracker in list(self._open):
            self._try(tracker, lambda tracker: tracker.log(values, step=step))

    def __exit__(self, *raised: object) -> None:
        for tracker in list(self._open):
            self._try(tracker, lambda tracker: tracker.finish())

    def _start(self, asked: Any) -> None:
        if isinstance(asked, str):
            made = _classes()[asked]
            where = {"logging_dir": str(self._folder)} if made.requires_logging_directory else {}
            tracker = made(PROJECT, **where)
        else:
            tracker = asked
        if hasattr(tracker, "start"):  # older accelerates start where they are made
            tracker.start()
        self._open.append(tracker)
        tracker.store_init_configuration(self._settings)

    def _try(self, tracker: Any, action: Callable[[Any], object]) -> None:
        try:
            action(tracker)
        except Exception as error:  # of a service far away, most likely
            name = getattr(tracker, "name", tracker)
            warnings.warn(f"tracker {name} gave up ({type(error).__name__}: {error}); the sweep goes on", stacklevel=3)
            self._open = [one for one in self._open if one is not tracker]


def _classes() -> dict[str, Any]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return dict(LOGGER_TYPE_TO_CLASS)


def _plain(value: Any) -> Any:
    """What every tracker takes: numbers and texts."""
    return value if isinstance(value, int | float | str) else ", ".join(map(str, value or ()))
