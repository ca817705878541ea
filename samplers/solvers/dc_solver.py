"""DC-Solver: dynamic compensation of the outputs that a predictor-corrector method keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fewstep.artifact import read_json, write_json
from fewstep.errors import ArtifactError, FewstepError, GridError
from fewstep.samplers.forms import Form, combine, direction, plan_from_forms, predict_correct
from fewstep.samplers.grid import Grid, Point
from fewstep.samplers.lagrange import Basis
from fewstep.samplers.plan import SolverPlan
from fewstep.samplers.scalar import Scalar, value
from fewstep.samplers.schedule import NoiseSchedule
from fewstep.samplers.solver import Multistep, Solver, checked, points_of
from fewstep.samplers.solvers.unipc import UniPC


@dataclass(frozen=True)
class DCSolver(Solver):
    """A multistep method, with or without a corrector, whose newest kept output is moved to another time.

    The outputs that a predictor-corrector method keeps were computed at states that the corrector moved afterwards. Before
    the predictor of step i the output there is therefore replaced by the value at

        t' = r_i t_i + (1 - r_i) t_{i-1}

    of the polynomial in t through it and the last ``compensation_order`` outputs kept, themselves compensated. The next
    predictor, the next corrector and all later steps read the replacement; the corrector of the interval that ends at i
    has read the output as it was. All of this is linear in the outputs, so it is compiled to rows as dense as the
    history is long, whose older weights fall off quickly.

    ``ratios`` are r_0, ..., r_{N-1}; None, and 1 anywhere, compensates nothing, and the first ``compensation_order``
    steps never are. They belong to a model, a number of steps and a guidance scale, and may be 0-d float64 tensors that
    carry gradients. A list longer than the grid counts from its end: image to image runs the last steps of the grid that
    the ratios were made for.

    Source: DC-Solver, 2409.03755, section 3.2, algorithm 1.

    Raises:
        FewstepError: a ratio that is no finite number, or a compensation order below 1.
        GridError: (from ``compile``) fewer ratios than steps.
    """

    base: Multistep = field(default_factory=UniPC)
    ratios: tuple[Scalar, ...] | None = None
    compensation_order: int = 2
    bases: ClassVar[tuple[Basis, ...]] = ("data", "noise")

    def __post_init__(self) -> None:
        if self.compensation_order < 1:
            raise FewstepError(f"compensation_order must be at least 1, got {self.compensation_order}")
        for i, r in enumerate(self.ratios or ()):
            if isinstance(r, bool) or not isinstance(r, (int, float, Tensor)) or not math.isfinite(value(r)):
                raise FewstepError(f"compensation ratio {i} is {r!r}; a finite number is needed, 1 compensates nothing")

    @property
    def convergence_order(self) -> int:
        """The base's without compensation; else 1, since a fixed ratio moves an output by a share of the step."""
        return self.base.convergence_order if all(r == 1 for r in self.ratios or ()) else 1

    @property
    def consistent(self) -> bool:
        return self.base.consistent

    def compile(self, schedule: NoiseSchedule, grid: Grid) -> SolverPlan:
        points, base = points_of(schedule, grid), self.base.on(schedule)
        orders = base.orders(grid)
        rows, correctors = base.rows(points, orders), base.correctors(points, orders)
        kept = self._kept(points)
        forms = predict_correct(
            [row.state for row in rows],
            [direction(row, kept[i::-1]) for i, row in enumerate(rows)],
            [
                None if row is None else direction(row, [Form.output(i), *kept[:i][::-1]])
                for i, row in enumerate(correctors)
            ],
        )
        return checked(
            plan_from_forms(
                schedule, grid, base.output_bases(points), forms, noise=[row.noise for row in rows], method=str(self),
                order=self.convergence_order,
            ),
            strict=self.consistent,
        )  # fmt: skip

    def _kept(self, points: Sequence[Point]) -> list[Form]:
        """What the history holds for every output."""
        steps = len(points) - 1
        if self.ratios is not None and len(self.ratios) < steps:
            raise GridError(f"{len(self.ratios)} compensation ratios were given for a grid of {steps} steps")
        ratios: Sequence[Scalar] = (1.0,) * steps if self.ratios is None else self.ratios[len(self.ratios) - steps :]
        begin = int(points[0].pure_noise)  # no later row reads the output at lambda = -inf
        kept: list[Form] = []
        for i, r in enumerate(ratios):
            k = self.compensation_order
            unchanged = not isinstance(r, Tensor) and r == 1  # a ratio that is being learned has a gradient at 1 too
            if unchanged or i - k < begin:
                kept.append(Form.output(i))
                continue
            times = [points[i - a].t for a in range(k + 1)]
            if len({value(t) for t in times}) <= k:
                raise GridError(f"compensation needs different times; those of steps {i - k} to {i} are {times}")
            weights = lagrange_basis(times, r * times[0] + (1 - r) * times[1])
            kept.append(
                combine(zip(weights, [Form.output(i), *kept[: i - k - 1 if i > k else None : -1]], strict=False))
            )
        return kept


def lagrange_basis(nodes: Sequence[Scalar], at: Scalar) -> list[Scalar]:
    """The Lagrange basis polynomials of ``nodes``, evaluated at ``at``."""
    result: list[Scalar] = []
    for j, node in enumerate(nodes):
        weight: Scalar = 1.0
        for k, other in enumerate(nodes):
            if k != j:
                weight = weight * (at - other) / (node - other)
        result.append(weight)
    return result


def save_ratios(path: str | Path, ratios: Sequence[float], provenance: Mapping[str, Any] | None = None) -> None:
    """Write compensation ratios as JSON; ``provenance`` says for which model, guidance and grid they were found."""
    write_json(path, "CompensationRatios", {"ratios": [float(r) for r in ratios], "provenance": dict(provenance or {})})


def load_ratios(path: str | Path) -> tuple[float, ...]:
    """Read what :func:`save_ratios` wrote, or the bare JSON list that the authors' search writes.

    Raises:
        ArtifactError: unreadable, or something else than a list of numbers.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        data = None  # read_json says what is wrong
    ratios = (
        data if isinstance(data, list) else read_json(path, "CompensationRatios", ("ratios", "provenance"))["ratios"]
    )
    if not isinstance(ratios, list) or any(isinstance(r, bool) or not isinstance(r, (int, float)) for r in ratios):
        raise ArtifactError(f"{path} holds {ratios!r}; a list of numbers is needed")
    return tuple(float(r) for r in ratios)
