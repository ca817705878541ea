"""Pictures of decision tables: steps by sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fewstep.caching.plan import CachePlan


def table_html(decisions: Mapping[str, Any], name: str) -> str:
    """The heat map of a report page, for notebooks."""
    from fewstep.eval.reports.decisions import Decisions
    from fewstep.eval.reports.page_plots import heat_map

    return heat_map(Decisions.from_json(decisions), name)


def plan_svg(plan: CachePlan) -> str:
    """The heat map of a plan."""
    return table_html(plan.decisions(), plan.method)


def figure(plan: CachePlan) -> Figure:
    """The heat map of a plan as a matplotlib figure."""
    from fewstep.eval.reports.plots import decisions_figure

    return decisions_figure(plan.sites, plan.actions.tolist(), plan.method)
