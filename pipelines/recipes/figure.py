"""What a search tried, drawn: error against work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fewstep.errors import PlanError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fewstep.pipelines.recipes.recipe import Recipe


def tried(recipe: Recipe) -> Figure:
    """See :meth:`Recipe.plot`."""
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    told = recipe.provenance
    if "tried" not in told:
        raise PlanError(
            "the recipe was not tuned, so nothing was tried; pipelines.tune makes recipes that can be drawn"
        )
    figure = NewFigure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        "sampler alone": lambda c: c["cache"] is None and c["quant"] is None,
        "with a cache": lambda c: c["cache"] is not None and c["quant"] is None,
        "quantised": lambda c: c["cache"] is None and c["quant"] is not None,
        "both": lambda c: c["cache"] is not None and c["quant"] is not None,
    }
    for colour, (name, belongs) in enumerate(kinds.items()):
        some = [c for c in told["tried"] if belongs(c)]
        if not some:
            continue
        axes.scatter(
            [c["work"] for c in some], [c["predicted"] for c in some], s=28, facecolors="none", edgecolors=f"C{colour}",
            label=f"{name}, predicted",
        )  # fmt: skip
        known = [c for c in some if c["measured"] is not None]
        axes.scatter(
            [c["work"] for c in known],
            [c["measured"] for c in known],
            s=28,
            marker="x",
            color=f"C{colour}",
            label="measured" if known else None,
        )
    axes.scatter([told["work"]], [told["error"]], s=60, color="k", zorder=3, label="the recipe, measured")
    aim, bound = next(iter(told["tuned_for"].items()))
    (axes.axhline if aim == "quality" else axes.axvline)(bound, color="0.6", linewidth=0.8, linestyle="--")
    axes.set(
        xscale="log", yscale="log", xlabel="work, calls of the unchanged network", ylabel="RMS error of the latents"
    )
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers, not powers
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(StrMethodFormatter(""))
    axes.legend(fontsize=8)
    return figure
