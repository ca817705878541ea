"""Quality against cost as SVG that lives in a page: it takes the page's colours, light or dark, and its font."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.eval.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Mid tones that stand out on white and on black alike.
COLOURS = ("#3b82f6", "#e8590c", "#2f9e44", "#c2255c", "#9c36b5", "#1098ad", "#d69e00", "#868e96")
# Matplotlib knows no CSS: these two stand in for the page's colours and are replaced in its output.
_INK, _LINE = "#010203", "#040506"
PEER = "diffusers:"


@dataclass(frozen=True)
class Style:
    """How one scheduler is drawn, the same in every plot: ours solid and filled, diffusers' own dashed and hollow."""

    colour: str
    peer: bool

    @property
    def dash(self) -> tuple[int, tuple[float, ...] | None]:
        return (0, (4.0, 2.5)) if self.peer else (0, None)


def styles(schedulers: Sequence[str]) -> dict[str, Style]:
    """One style a scheduler, in the order of first appearance."""
    return {
        name: Style(COLOURS[index % len(COLOURS)], name.startswith(PEER))
        for index, name in enumerate(dict.fromkeys(schedulers))
    }


def swatch(style: Style) -> str:
    """A legend entry's line and marker as inline SVG."""
    dash = ' stroke-dasharray="5 3"' if style.peer else ""
    fill = "none" if style.peer else style.colour
    return (
        '<svg class="swatch" width="36" height="12" aria-hidden="true">'
        f'<line x1="1" y1="6" x2="35" y2="6" stroke="{style.colour}" stroke-width="2"{dash}/>'
        f'<circle cx="18" cy="6" r="3.5" fill="{fill}" stroke="{style.colour}" stroke-width="1.6"/></svg>'
    )


def quality_plot(rows: Sequence[Row], metric: str, title: str) -> str | None:
    """``metric`` against network evaluations per image, one line a scheduler, as an ``<svg>`` element.

    Values that span more than a factor of 4 get a logarithmic axis, so that the good end can be told apart.

    Returns:
        None where no cell has the metric.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    points = {
        name: sorted(
            (row.nfe_per_image, value)
            for row in rows
            if row.scheduler == name and row.nfe_per_image is not None and (value := row.value(metric)) is not None
        )
        for name in styles([row.scheduler for row in rows])
    }
    values = [value for line in points.values() for _, value in line]
    if not values:
        return None
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": metric, "axes.edgecolor": _INK, "font.size": 11}):
        figure = Figure(figsize=(4.9, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for name, style in styles(list(points)).items():
            if points[name]:
                axes.plot(
                    *zip(*points[name], strict=True),
                    color=style.colour,
                    linestyle=style.dash,
                    linewidth=1.8,
                    marker="o",
                    markersize=6,
                    markerfacecolor="none" if style.peer else style.colour,
                    markeredgewidth=1.5,
                )
        _axes(axes, sorted({x for line in points.values() for x, _ in line}), min(values), max(values))
        axes.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold")
        axes.set_xlabel("network evaluations per image", color=_INK)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(text.getvalue(), title)


def _axes(axes: Axes, costs: Sequence[float], low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(_spread(costs), labels=[f"{cost:g}" for cost in _spread(costs)])
    if low > 0 and high / low > 4:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _spread(costs: Sequence[float]) -> list[float]:
    """The costs that can be labelled without touching: each at least 20 % above the one before."""
    kept: list[float] = []
    for cost in costs:
        if not kept or cost > 1.2 * kept[-1]:
            kept.append(cost)
    return kept


def _for_page(svg: str, title: str) -> str:
    """Matplotlib's SVG file as an element: no prologue, no metadata, no addresses, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'^<svg([^>]*?)\swidth="[^"]*"', r"<svg\1", svg)
    svg = re.sub(r'^<svg([^>]*?)\sheight="[^"]*"', rf'<svg\1 role="img" aria-label="{title}"', svg)
    svg = re.sub(r"font: (?:bold |\d+ )?([\d.]+px)[^;\"]*", r"font: \1 var(--font)", svg)
    return svg.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
