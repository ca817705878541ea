"""Figures of a sweep: quality against cost with its Pareto front, and where the steps lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fewstep.eval.reports.columns import CostColumn, Facet, Point, lower, shown, title
from fewstep.eval.reports.svg import DIM, INK, LINE, TIP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Mid tones that stand out on white and on black alike.
COLOURS = ("#3b82f6", "#e8590c", "#2f9e44", "#c2255c", "#9c36b5", "#1098ad", "#d69e00", "#868e96")
MARKERS = ("o", "s", "^", "D", "v")
PEER = "diffusers:"
WIDTH = 4.9  # inches; at 72 units an inch as wide as a phone's page, where its text is as large as the page's notes


@dataclass(frozen=True)
class Style:
    """How one series is drawn, the same in every plot: ours solid and filled, diffusers' own dashed and hollow."""

    colour: str
    marker: str
    peer: bool

    @property
    def dash(self) -> tuple[int, tuple[float, ...] | None]:
        return (0, (4.0, 2.5)) if self.peer else (0, None)

    @property
    def point(self) -> dict[str, Any]:
        """Matplotlib's arguments for a marker."""
        return {
            "marker": self.marker,
            "markersize": 6,
            "markeredgewidth": 1.5,
            "color": self.colour,
            "markerfacecolor": "none" if self.peer else self.colour,
        }


def styles(series: Sequence[str]) -> dict[str, Style]:
    """One style a series, in the order of first appearance: colours first, then markers."""
    return {
        name: Style(
            COLOURS[index % len(COLOURS)],
            MARKERS[index // len(COLOURS) % len(MARKERS)],
            name.startswith(PEER),
        )
        for index, name in enumerate(dict.fromkeys(series))
    }


_SHAPES = {
    "o": '<circle cx="18" cy="6" r="3.5" {}/>',
    "s": '<rect x="14.7" y="2.7" width="6.6" height="6.6" {}/>',
    "^": '<path d="M18 2l4 7.5h-8z" {}/>',
    "D": '<path d="M18 1.5l4.5 4.5-4.5 4.5-4.5-4.5z" {}/>',
    "v": '<path d="M18 10l4-7.5h-8z" {}/>',
}


def swatch(style: Style) -> str:
    """A legend entry's line and marker as inline SVG."""
    dash = ' stroke-dasharray="5 3"' if style.peer else ""
    paint = f'fill="{"none" if style.peer else style.colour}" stroke="{style.colour}" stroke-width="1.6"'
    return (
        '<svg class="swatch" width="36" height="12" aria-hidden="true">'
        f'<line x1="1" y1="6" x2="35" y2="6" stroke="{style.colour}" stroke-width="2"{dash}/>'
        f"{_SHAPES[style.marker].format(paint)}</svg>"
    )


def said(point: Point, metric: str, cost: CostColumn) -> str:
    """A point in words."""
    value = f"{title(metric)} {shown(metric, point.value)}"
    if point.interval:
        low, high = point.interval
        value += f" ({shown(metric, low)} to {shown(metric, high)})"
    return f"{point.series}, {point.steps} steps: {value} at {point.cost:.3g} {cost.unit}"


def front_figure(facet: Facet, metric: str, cost: CostColumn, *, legend: bool = False) -> Figure | None:
    """``metric`` against ``cost``, one line a series, intervals as bars, the Pareto front as a staircase behind them.

    Values that span more than a factor of 4 get a logarithmic axis, so that the good end can be told apart. Point i of
    ``facet.points(metric, cost)`` has the gid of tip i. With ``legend`` the figure names its series, as a file must.

    Returns:
        None where no cell has both.
    """
    points = facet.points(metric, cost)
    if not points:
        return None
    drawn = styles(facet.names)
    figure = _empty(3.4 + (0.22 * len(drawn) if legend else 0))
    axes = figure.add_subplot()
    for name, style in drawn.items():
        line = sorted((p.cost, p.value) for p in points if p.series == name)
        axes.plot(
            [x for x, _ in line], [y for _, y in line],
            color=style.colour, linestyle=style.dash, linewidth=1.6, label=_clipped(name, 60),
        )  # fmt: skip
    for index, p in enumerate(points):
        if p.interval:
            axes.plot([p.cost] * 2, p.interval, color=drawn[p.series].colour, linewidth=1.2, alpha=0.8)
        axes.plot([p.cost], [p.value], gid=f"{TIP}{index}", **drawn[p.series].point)
    _cost_axis(axes, sorted({p.cost for p in points}), cost)
    _value_axis(axes, [value for p in points for value in (p.value, *(p.interval or ()))])
    if front := facet.front(metric, cost):
        _staircase(axes, front, bool(lower(metric)))
    _finish(axes, title(metric), cost.axis)
    if legend:
        figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    return figure


def steps_figure(
    lines: Mapping[str, Sequence[float]], drawn: Mapping[str, Style], span: tuple[float, float], name: str
) -> Figure:
    """A strip a cell with a dot for every time the network was called, at its lambda, noise on the left.

    Args:
        lines: by series the lambdas; an infinite one is drawn as a triangle at its end of the strip.
        drawn: the styles of the series.
        span: the least and the largest finite lambda of all cells, so that several figures share one axis.
        name: the figure's title.
    """
    figure = _empty(0.95 + 0.4 * len(lines))
    axes = figure.add_subplot()
    margin = 0.05 * (span[1] - span[0]) or 1.0
    ends = span[0] - margin, span[1] + margin
    for level, (series, lams) in enumerate(lines.items()):
        style = drawn[series]
        axes.plot(ends, [-level] * 2, color=LINE, linewidth=1, zorder=0)
        axes.text(ends[0], 0.2 - level, _clipped(series, 54), color=DIM, fontsize=10, va="bottom")
        finite = [lam for lam in lams if math.isfinite(lam)]
        axes.plot(finite, [-level] * len(finite), linestyle="", **{**style.point, "markersize": 5})
        for lam in lams:
            if math.isinf(lam):
                mark: dict[str, Any] = {"marker": "<" if lam < 0 else ">", "markersize": 5}
                axes.plot([ends[int(lam > 0)]], [-level], linestyle="", **style.point | mark)
    axes.set_ylim(0.45 - len(lines), 0.8)
    axes.set_xlim(ends[0] - 0.4 * margin, ends[1] + 0.4 * margin)
    axes.set_yticks([])
    _finish(axes, name, "noise  ←  λ = log(α/σ)  →  image")
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    return figure


def decisions_figure(sites: Sequence[str], decisions: Sequence[Sequence[int]], name: str) -> Figure:
    """Steps from left to right, sites from top to bottom; 0, which is computed, stays empty."""
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    figure = _empty(1.0 + 0.16 * max(4, len(sites)))
    axes = figure.add_subplot()
    modes = max(max(row) for row in decisions)
    colours = ListedColormap([LINE, *(COLOURS[index % len(COLOURS)] for index in range(modes))])
    by_site = [list(column) for column in zip(*decisions, strict=True)]
    axes.imshow(by_site, cmap=colours, vmin=-0.5, vmax=modes + 0.5, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(sites)), [_clipped(site, 28) for site in sites], fontsize=7)
    _finish(axes, name, "step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    return figure


def _empty(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _finish(axes: Axes, name: str, below: str) -> None:
    axes.set_title(name, loc="left", color=INK, fontsize=12, fontweight="bold")
    axes.set_xlabel(below, color=INK, fontsize=11)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=3, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_edgecolor(INK)


def _staircase(axes: Axes, front: Sequence[Point], down: bool) -> None:
    """From each point of the front level to the cost of the next one: what can be had for that much."""
    left, right = axes.get_xlim()
    low, high = axes.get_ylim()
    xs = [front[0].cost, *(point.cost for point in front), right]
    ys = [high if down else low, *(point.value for point in front), front[-1].value]
    axes.plot(xs, ys, drawstyle="steps-post", color=DIM, linewidth=5, alpha=0.25, zorder=1, solid_joinstyle="round")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


def _cost_axis(axes: Axes, costs: Sequence[float], cost: CostColumn) -> None:
    """Whole numbers of calls are labelled one by one; anything else as its range asks for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    labels = FuncFormatter(lambda value, _: f"{value:.3g}")
    if len(costs) == 1 or costs[-1] > 2 * costs[0] > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        if all(value == round(value) for value in costs):
            axes.set_xticks(_spread(costs))
        else:
            axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(labels)


def _value_axis(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if min(values) > 0 and max(values) / min(values) > 4:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))


def _spread(costs: Sequence[float]) -> list[float]:
    """The costs that can be labelled without touching: each at least 20 % above the one before."""
    kept: list[float] = []
    for cost in costs:
        if not kept or cost > 1.2 * kept[-1]:
            kept.append(cost)
    return kept


def _clipped(text: str, length: int) -> str:
    """A long name keeps its beginning and its end, where names differ."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[head + 1 - length :]}"
