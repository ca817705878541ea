"""DC-Solver's ratios, predicted for numbers of calls and guidance that were not searched."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewstep.artifact import read_json, write_json
from fewstep.errors import ArtifactError, FewstepError
from fewstep.samplers.learn.methods.dc import BOUND


@dataclass(frozen=True)
class Cascade:
    """Ratios as a cubic in i / N, whose coefficients are quadratics in guidance, theirs quadratics in N.

    Degrees are lower where fewer values were searched. Cubics of ratios are meaningless outside the searched box, so
    nothing is predicted there.

    Source: DC-Solver, 2409.03755, section 3.3 (cascade polynomial regression).
    """

    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    """[power of N / 50][power of guidance / 12][power of i / N]"""
    nfe: tuple[int, int]
    guidance: tuple[float, float]
    first: int = 2
    """Steps before this one are never compensated."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def fit(table: Mapping[tuple[int, float], Sequence[float]], *, first: int = 2) -> Cascade:
        """The least-squares fit to searched ratios, by (number of calls, guidance).

        Raises:
            FewstepError: an empty table, or ratios that are not finite, or not as many as the calls.
        """
        rows: list[npt.NDArray[np.float64]] = []
        right: list[float] = []
        for (n, _), ratios in table.items():
            if len(ratios) != n:
                raise FewstepError(f"{len(ratios)} ratios are given for {n} calls; one a call is needed")
            if not np.isfinite(ratios).all():
                raise FewstepError(f"the ratios of {n} calls are {list(ratios)}; give finite numbers")
        calls, scales = sorted({n for n, _ in table}), sorted({g for _, g in table})
        inner = max((n - first for n in calls), default=0)
        if inner < 1:
            raise FewstepError(f"no step is compensated in {calls} calls; search ratios of more than {first} calls")
        degrees = (min(2, len(calls) - 1), min(2, len(scales) - 1), min(3, inner - 1))
        for (n, g), ratios in table.items():
            for i in range(first, n):
                rows.append(_features(n, g, i, degrees))
                right.append(ratios[i] - 1)
        solved = np.linalg.lstsq(np.stack(rows), np.asarray(right), rcond=1e-10)[0]
        shape = tuple(d + 1 for d in degrees)
        nested = tuple(tuple(tuple(float(c) for c in line) for line in plane) for plane in solved.reshape(shape))
        return Cascade(nested, (calls[0], calls[-1]), (scales[0], scales[-1]), first)

    def predict(self, nfe: int, guidance: float) -> tuple[float, ...]:
        """Ratios for so many calls at this guidance.

        Raises:
            FewstepError: outside the box that was searched, or a number of calls that is not whole.
        """
        if nfe != int(nfe):
            raise FewstepError(f"nfe is {nfe}; give a whole number of calls")
        nfe = int(nfe)
        inside = self.nfe[0] <= nfe <= self.nfe[1] and self.guidance[0] <= guidance <= self.guidance[1]
        if not inside:
            raise FewstepError(
                f"ratios were searched for {self.nfe[0]} to {self.nfe[1]} calls and guidance {self.guidance[0]:g} to "
                f"{self.guidance[1]:g}; {nfe} calls at guidance {guidance:g} lie outside, and cubics do not extrapolate"
            )
        flat = np.asarray(self.coefficients)
        degrees = (flat.shape[0] - 1, flat.shape[1] - 1, flat.shape[2] - 1)
        found = [1.0 + float(_features(nfe, guidance, i, degrees) @ flat.reshape(-1)) for i in range(self.first, nfe)]
        bounded = [min(max(r, 1 - BOUND), 1 + BOUND) for r in found]
        return (*[1.0] * min(self.first, nfe), *bounded)

    def save(self, path: str | Path) -> None:
        """Write the coefficients as JSON."""
        body = {
            "coefficients": self.coefficients, "nfe": self.nfe, "guidance": self.guidance, "first": self.first,
            "provenance": dict(self.provenance),
        }  # fmt: skip
        write_json(path, "CompensationCascade", body)

    @staticmethod
    def load(path: str | Path) -> Cascade:
        """Read what :meth:`save` wrote; raises :class:`~fewstep.errors.ArtifactError` for anything else."""
        body = read_json(path, "CompensationCascade", ("coefficients", "nfe", "guidance", "first", "provenance"))
        try:
            coefficients = np.asarray(body["coefficients"], dtype=np.float64)
            (low, high), (weak, strong) = map(int, body["nfe"]), map(float, body["guidance"])
            first = int(body["first"])
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path} holds no ratios along a curve: {error}") from None
        if coefficients.ndim != 3 or not coefficients.size or not np.isfinite(coefficients).all():
            raise ArtifactError(
                f"{path} has coefficients of shape {coefficients.shape}; three axes of numbers are needed"
            )
        nested = tuple(tuple(tuple(line) for line in plane) for plane in coefficients.tolist())
        return Cascade(nested, (low, high), (weak, strong), first, body["provenance"])


def _features(n: int, guidance: float, i: int, degrees: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    values = (n / 50, guidance / 12, i / n)
    powers = itertools.product(*(range(d + 1) for d in degrees))
    return np.asarray([values[0] ** a * values[1] ** b * values[2] ** c for a, b, c in powers])
