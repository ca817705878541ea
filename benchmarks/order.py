"""The order of convergence of every builder and option, measured on data with a known flow.

    python benchmarks/order.py [--out FOLDER]

The model is a Gaussian mixture, whose score is exact; the reference is its probability flow integrated by SciPy's DOP853 to
1e-13. From lambda = -1.5 to 1.5, the error's log-log slope over grids of 128 to 384 steps is the order.

A multistep method starts with one step of first order, whose error of O(h^2) would hide every global order above 2. The
first table therefore begins each grid with short steps that double until they reach h. The second shows plain grids, as
users run them: there the start caps the order at 2, or at 3 with a corrector.

Grids: even (uniform in lambda), and uneven: long and short steps in turn, 1.6 to 1, which no smooth change of variable
makes even. Deterministic methods only; a stochastic one has no order against a single trajectory.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
import torch
from record import RESULTS, machine, provenance, table, write
from rich.progress import track
from scipy.integrate import solve_ivp
from torch import Tensor

from fewstep.artifact import write_bytes
from fewstep.samplers import DDIM, DEIS, GHVB, IPNDM, DPMSolver, Grid, NoiseSchedule, SolverPlan, UniPC, sample
from fewstep.samplers.schedule import EDM, alpha_sigma, f64
from fewstep.samplers.solver import Multistep
from fewstep.samplers.testing import GaussianMixture

BEGIN, END = -1.5, 1.5
COUNTS = (16, 32, 64, 128, 192, 256, 384)
FITTED = 4
"""The slope is that of so many of the finest grids: on coarse ones the higher orders have not set in yet."""
ROUNDING = 1e-11
"""Errors below this are float64 rounding and the reference's own error; they take no part in a slope."""
TOLERANCE = 0.25

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULES: dict[str, NoiseSchedule] = {
    "vp": NoiseSchedule.from_config(VP),
    "flow": NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}),
    "ve": EDM(),
}
OFF: dict[str, Any] = {
    "lower_order_final": False
}  # a first-order last step would hide the order just as the first does
BUILDERS: tuple[Multistep, ...] = (
    DDIM(),
    DPMSolver(order=2, **OFF),
    DPMSolver(order=2, solver_type="heun", **OFF),
    DPMSolver(order=3, **OFF),
    DPMSolver(order=3, third_order="as_published", **OFF),
    DPMSolver(order=2, basis="noise", **OFF),
    DPMSolver(order=2, basis="noise", solver_type="heun", **OFF),
    DPMSolver(order=3, basis="noise", **OFF),
    *(DEIS(order=order, variable=variable, **OFF) for variable in ("lambda", "rho") for order in (1, 2, 3, 4)),
    *(UniPC(order=order, **OFF) for order in (1, 2, 3, 4)),
    *(UniPC(order=order, solver_type="bh1", **OFF) for order in (1, 2, 3)),
    *(UniPC(order=order, basis="noise", **OFF) for order in (2, 3)),
)
VARIANTS: tuple[Multistep, ...] = (
    DPMSolver(order=3, **OFF),
    DPMSolver(order=3, third_order="as_published", **OFF),
    *(IPNDM(order=order, weights=w) for order in (3, 4) for w in ("variable", "equal", "diff_sampler")),
    *(GHVB(order=order, weights=w, **OFF) for order in (2, 3) for w in ("variable", "equal")),
)
"""What the formulas say, and what was published where it differs."""
PLOTTED = (
    "DDIM(order=1)",
    "DPMSolver(order=2)",
    "DPMSolver(order=3, third_order='as_published')",
    "DPMSolver(order=3)",
    "DEIS(order=3)",
    "UniPC(order=3)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
    options = parser.parse_args()

    about = machine()
    mixture = GaussianMixture.random(3, 2, seed=0)
    start = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = {name: reference(mixture, schedule, start) for name, schedule in SCHEDULES.items()}

    def measured(builder: Multistep, ramp: bool) -> list[dict[str, Any]]:
        return [
            {"family": family, "uneven": uneven, "short_start": ramp,
             **measure(builder, schedule, mixture, start, truth[family], uneven=uneven, ramp=ramp)}
            for family, schedule in SCHEDULES.items() for uneven in (False, True)
        ]  # fmt: skip

    found = [e for builder in track(BUILDERS, "orders") for ramp in (True, False) for e in measured(builder, ramp)]
    variants = [e for builder in track(VARIANTS, "variants") for e in measured(builder, True)]
    page = report(found, variants) + "\n" + provenance(about)
    body = {"machine": about, "range": [BEGIN, END], "measured": found, "variants": variants}
    write(options.out, "order", body, page)
    write_bytes(options.out / "order.png", plot(found))
    print(page)


def label(builder: Multistep) -> str:
    """The builder's name with its order and what differs from the defaults, without what all share."""
    shown = [(f.name, getattr(builder, f.name), f.default) for f in fields(builder) if f.name not in OFF]
    options = ", ".join(f"{name}={value!r}" for name, value, default in shown if name == "order" or value != default)
    return f"{type(builder).__name__}({options})"


def reference(mixture: GaussianMixture, schedule: NoiseSchedule, start: Tensor) -> Tensor:
    """The end of the exact flow: y = x / alpha follows d y / d rho = eps, here in lambda = -log rho."""

    def slope(lam: float, y: Any) -> Any:
        alpha, sigma = alpha_sigma(schedule.family, f64(lam))
        x = alpha * f64(y.tolist()).reshape(start.shape)
        eps = (x - alpha * mixture.x0(x, alpha, sigma)) / sigma
        return (-(sigma / alpha) * eps).reshape(-1).numpy()

    alpha, sigma = alpha_sigma(schedule.family, f64([BEGIN, END]))
    y = start * schedule.init_scale(alpha[0], sigma[0]) / alpha[0]
    solved = solve_ivp(slope, (BEGIN, END), y.reshape(-1).numpy(), method="DOP853", rtol=1e-13, atol=1e-15)
    return alpha[1] * f64(solved.y[:, -1].tolist()).reshape(start.shape)


def lambdas(n: int, order: int, *, uneven: bool, ramp: bool) -> list[float]:
    """The grid: n steps of about (END - BEGIN) / n, begun with doubling ones where ``ramp``."""
    h = (END - BEGIN) / n
    steps: list[float] = []
    if ramp:
        # the first step, of first order, errs by its length squared: that is to vanish beside h^order
        first = h * n ** -((order + 1) / 2)
        steps = [first * 2**k for k in range(math.floor(math.log2(h / first)))]
    left = END - BEGIN - sum(steps)
    weights = [(1.6 if i % 2 else 1.0) if uneven else 1.0 for i in range(round(left / h))]
    steps += [left * w / sum(weights) for w in weights]
    return [BEGIN + math.fsum(steps[:i]) for i in range(len(steps))] + [END]


def measure(
    builder: Multistep,
    schedule: NoiseSchedule,
    mixture: GaussianMixture,
    start: Tensor,
    truth: Tensor,
    *,
    uneven: bool,
    ramp: bool,
) -> dict[str, Any]:
    """Errors (root mean square) on every grid, and their slope."""
    declared = builder.convergence_order
    model = mixture.model(schedule)
    counts, errors = [], []
    for n in COUNTS:
        grid = Grid.lambdas(schedule, lambdas(n, declared, uneven=uneven, ramp=ramp))
        plan: SolverPlan = builder.compile(schedule, grid)
        error = float((sample(model, start, plan) - truth).square().mean().sqrt())
        if error > ROUNDING:
            counts.append(n)
            errors.append(error)
    return {
        "method": label(builder),
        "declared": declared,
        "order": slope_of(counts, errors),
        "n": counts,
        "error": errors,
    }


def slope_of(counts: Sequence[int], errors: Sequence[float]) -> float:
    """The slope of log error against log n by least squares."""
    x, y = f64(list(map(float, counts[-FITTED:]))).log(), f64(list(errors[-FITTED:])).log()
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / (x * x).sum())


def report(found: Sequence[dict[str, Any]], variants: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    families = list(SCHEDULES)
    header = ["", "declared", *(f"{f} {grid}" for f in families for grid in ("even", "uneven"))]

    def rows(
        ramp: bool, show: Callable[[dict[str, Any]], str], among: Sequence[dict[str, Any]] = found
    ) -> list[list[str]]:
        methods = dict.fromkeys(e["method"] for e in among)
        mine = {(e["method"], e["family"], e["uneven"]): e for e in among if e["short_start"] == ramp}
        declared = {e["method"]: e["declared"] for e in among}
        return [
            [f"`{m}`", str(declared[m]), *(show(mine[m, f, uneven]) for f in families for uneven in (False, True))]
            for m in methods
        ]

    def judged(entry: dict[str, Any]) -> str:
        good = abs(entry["order"] - entry["declared"]) <= TOLERANCE
        return f"{entry['order']:.2f}" if good else f"**{entry['order']:.2f}**"

    def plainly(entry: dict[str, Any]) -> str:
        return f"{entry['order']:.2f}"

    off = sum(abs(e["order"] - e["declared"]) > TOLERANCE for e in found if e["short_start"])
    count = sum(1 for e in found if e["short_start"])
    return (
        "# Measured order of convergence\n\n"
        f"A Gaussian mixture with exact score, lambda from {BEGIN:g} to {END:g}, {COUNTS[0]} to {COUNTS[-1]} steps, float64.\n\n"
        "## After a start of short steps\n\n"
        f"{count - off} of {count} lie within {TOLERANCE} of what is declared; the others are bold.\n\n"
        f"{table(header, rows(True, judged))}\n"
        "## On plain grids\n\nThe first step is of first order there, which caps what can be seen.\n\n"
        f"{table(header, rows(False, plainly))}\n"
        "## The formulas, and what was published\n\n"
        "Weights of equal steps have their order where steps change smoothly in the variable that they are equal in (rho), and "
        "lose it where long and short steps take turns. After a start of short steps.\n\n"
        f"{table(header, rows(True, plainly, variants))}"
    )


def plot(found: Sequence[dict[str, Any]]) -> bytes:
    """Error against steps, log-log, for the usual methods: a panel for each of vp and flow, even and uneven."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 8), sharex=True, sharey=True, layout="constrained")
    wanted = {(e["method"], e["family"], e["uneven"]): e for e in found if e["short_start"]}
    for row, family in zip(axes, ("vp", "flow"), strict=True):
        for axis, uneven in zip(row, (False, True), strict=True):
            for method, marker in zip(PLOTTED, "osD^vP", strict=True):
                entry = wanted[method, family, uneven]
                name = f"{method}: {entry['declared']}"
                (line,) = axis.loglog(entry["n"], entry["error"], marker=marker, lw=1.2, ms=4, label=name)
                shift = (6, 3 if method.startswith("DEIS") else -6)  # DEIS ends where DPMSolver of order 3 does
                end = (entry["n"][-1], entry["error"][-1])
                note, color = f"{entry['order']:.2f}", line.get_color()
                axis.annotate(note, end, shift, textcoords="offset points", fontsize=7, color=color)
            axis.set_title(f"{family}, {'steps 1 : 1.6 in turn' if uneven else 'even'}", fontsize=10)
            axis.grid(alpha=0.3, which="both", lw=0.4)
            axis.set_xlim(COUNTS[0] * 0.9, COUNTS[-1] * 1.4)
    for axis in axes[1]:
        axis.set_xlabel("steps (at the line's end: the measured order)")
        axis.set_xticks([16, 32, 64, 128, 256], ["16", "32", "64", "128", "256"])
        axis.minorticks_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("error against the exact flow (RMS)")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        lines,
        labels,
        loc="outside lower center",
        ncols=2,
        fontsize=8,
        title="method and declared order",
        title_fontsize=8,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
