"""``fewstep best``."""

from __future__ import annotations

from typing import Annotated

import typer

from fewstep.cli import options
from fewstep.cli.printing import number, say


def best(
    folder: options.Finished,
    quality: Annotated[
        str | None, typer.Option(help="What a cell must reach, such as 'fid<2' or 'fid<2, accuracy>=95'.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="What it may cost: nfe, seconds, calls or steps, such as 'nfe<=10'.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What is best within a budget; the sweep's first metric.")] = None,
) -> None:
    """The cheapest cell that is good enough, or the best one within a budget."""
    from fewstep.eval.sweeps.results import Results
    from fewstep.eval.sweeps.selection import best as choose
    from fewstep.eval.sweeps.specs import split_top_level

    results = Results.load(folder)
    found = choose(results, quality=split_top_level(quality or ""), budget=split_top_level(budget or ""), metric=metric)
    row = found.row
    said = [f"{name} {number(row.value(name))}" for name in results.metrics]
    said += [f"{number(row.nfe_per_image)} NFE/image", f"{number(row.seconds_per_image)} s/image"]
    model = f"{row.model}: " if row.model else ""
    say(f"{model}{row.cell.title}, guidance {row.guidance:g}: {', '.join(said)}")
    say(
        f"best in {found.goal} of {found.met} cells that meet the conditions, of {found.of}; its images: {folder / row.folder}"
    )
