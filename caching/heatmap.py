"""Pictures of decision tables: steps by sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fewstep.caching.plan import CachePlan


def table_html(decisions: Mapping[str, Any], name: str) -> str:
    """The heat map as SVG, for notebooks."""
    from fewstep.eval.reports.plots import decisions_figure
    from fewstep.eval.reports.svg import saved

    svg = saved(decisions_figure(decisions["sites"], decisions["decisions"], name), "svg").decode()
    return svg[svg.index("<svg") :]


def plan_svg(plan: CachePlan) -> str:
    """The heat map of a plan."""
    return table_html(plan.decisions(), plan.method)


def figure(plan: CachePlan) -> Figure:
    """The heat map of a plan as a matplotlib figure."""
    from fewstep.eval.reports.plots import decisions_figure

    return decisions_figure(plan.sites, plan.actions.tolist(), plan.method)
