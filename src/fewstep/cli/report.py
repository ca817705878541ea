"""``fewstep report``."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep.cli import options


def report(
    folder: options.Finished,
    plots: Annotated[
        bool, typer.Option("--plots", help="Also write the plots as PNG and SVG, and their data as CSV.")
    ] = False,
) -> None:
    """Write DIR/report.html: table, plots, the same seeds side by side; one self-contained file."""
    from fewstep.eval.reports.page import report as write

    print(write(folder, plots=plots))
