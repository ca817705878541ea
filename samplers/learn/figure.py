"""What learning did, as a picture: the error on the way, and the grid before and after."""

from __future__ import annotations

import io
import math
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.artifact import write_bytes
from fewstep.samplers.plan import SolverPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(plan: SolverPlan, path: str | Path | None = None, *, before: SolverPlan | None = None) -> Figure:
    """The loss and the learned grid of ``plan``, from what its provenance says; written as a PNG where a path is given.

    The right panel has a mark for every call: the noise level of the state, and beside it the one that the network is told
    where the two differ; ``before`` is drawn above it for comparison.
    """
    from matplotlib.figure import Figure as NewFigure

    figure: Any = NewFigure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    history = plan.provenance.get("history", [])
    seconds = [h["seconds"] for h in history]
    held_out = [math.inf if h["held_out"] is None else h["held_out"] for h in history]
    left.plot(seconds, [h["loss"] for h in history], ".", label="learned from", color="#3b82f6")
    left.plot(seconds, held_out, ".", label="held out", color="#e8590c")
    left.step(seconds, list(accumulate(held_out, min)), where="post", label="the best, held out", color="#e8590c")
    if (error := plan.provenance.get("error_before")) is not None:
        left.axhline(error, color="#868e96", linestyle="--", label="best untuned, held out")
    left.set(xlabel="seconds", ylabel="RMS error of latents", yscale="log" if history else "linear")
    left.legend(fontsize=8)
    rows = [("learned", plan, "#e8590c"), *([("before", before, "#868e96")] if before is not None else [])]
    for height, (name, shown, colour) in enumerate(rows):
        lam = [_lambda(float(a), float(s)) for a, s in zip(shown.alpha[:-1], shown.sigma[:-1], strict=True)]
        right.plot(lam, [height] * len(lam), "o", color=colour, label=name)
    right.set(xlabel="lambda = log(alpha / sigma)", yticks=range(len(rows)), yticklabels=[name for name, *_ in rows])
    right.set_ylim(-0.7, len(rows) - 0.3)
    right.set_title(f"{plan.nfe} calls", fontsize=9)
    if path is not None:
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120)
        write_bytes(path, data.getvalue())
    made: Figure = figure
    return made


def _lambda(alpha: float, sigma: float) -> float:
    """At pure noise, which no axis has room for, a value to the left of the rest."""
    return math.log(alpha / sigma) if alpha and sigma else (-6.0 if not alpha else 6.0)
