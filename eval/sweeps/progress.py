"""One progress bar for a whole sweep, with the time left, and a line for every finished cell."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewstep.eval.sweeps.results import Row


class SweepProgress:
    """Progress in units of work (see ``Cell.work``), so that cells of many steps weigh what they cost.

    Args:
        work: units of the whole sweep.
        show: False for silence.
        processes: how many share the work; what this one does stands for what each of them does meanwhile.
    """

    def __init__(self, work: float, show: bool = True, processes: int = 1) -> None:
        self._processes = processes
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(stderr=True),
            disable=not show,
        )
        self._show = show
        self._task = self._progress.add_task("sweep", total=work)

    def __enter__(self) -> SweepProgress:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def cell(self, title: str) -> None:
        """Say which cell is being worked on."""
        self._progress.update(self._task, description=title)

    def advance(self, work: float) -> None:
        """Some work is done."""
        self._progress.advance(self._task, work * self._processes)

    def remaining(self, work: float) -> None:
        """So much is left: what was found done, or failed, neither waits to be done nor counts for the speed."""
        done = self._progress.tasks[0].completed
        if done + work > 0:
            self._progress.update(self._task, total=done + work)
        else:  # everything was there: a bar of nothing would stand at 0 %
            self._progress.update(self._task, total=1, completed=1)

    def finished(self, row: Row, title: str) -> None:
        """Print a finished cell above the bar."""
        if self._show:
            self._progress.console.print(line(row, title), highlight=False, markup=False, soft_wrap=True)


def line(row: Row, title: str) -> str:
    """A finished cell in one line."""
    if row.status != "ok":
        return f"{title}: failed: {row.error}"
    parts = [f"{name} {row.value(name):.4g}" for name in row.metrics]
    if row.nfe_per_image is not None:
        parts.append(f"{row.nfe_per_image:g} NFE/image")
    if row.seconds_per_image is not None:
        parts.append(f"{row.seconds_per_image:.3g} s/image")
    return f"{title}: {', '.join(parts)}"
