"""Predictors: from the values computed at past steps the value to use now.

A predictor is a frozen value, run on the tensors of one site at a time. All but the affine one are weights of past values,
float64 numbers on the host: sum_j w_j F(s_j), newest first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.caching.store import Cell, Value
from fewstep.errors import FewstepError, unknown

KINDS: dict[str, type[Predictor]] = {}


@dataclass(frozen=True)
class Predictor:
    """Base: weights over past values.

    Attributes:
        kind: its name in plan files.
        depth: how many computed values it reads.
    """

    kind: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        if cls.kind:
            KINDS[cls.kind] = cls

    @property
    def depth(self) -> int:
        return 1

    def weights(self, past: Sequence[int], step: int) -> list[float]:
        """Weights of the values computed at steps ``past`` (newest first) for the value at ``step``."""
        return [1.0]

    def predict(self, cell: Cell, step: int) -> Any:
        """The site's value at ``step``, a tree like those that were kept.

        Raises:
            FewstepError: where a kept tensor was changed in place since.
        """
        return _mixed(cell, self.weights([value.step for value in cell.history], step))

    # -- files --------------------------------------------------------------------------------------------------------
    def spec(self) -> dict[str, Any]:
        """Its kind and options, as JSON."""
        return {"kind": self.kind, **{k: v for k, v in asdict(self).items() if k not in self.array_names()}}

    @classmethod
    def array_names(cls) -> tuple[str, ...]:
        """The fields that hold tensors by site."""
        return ()

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, ``"field/site"`` to tensor."""
        return {f"{name}/{site}": t for name in self.array_names() for site, t in getattr(self, name).items()}


def from_spec(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Predictor:
    """The predictor that :meth:`Predictor.spec` and :meth:`Predictor.tensors` describe.

    Raises:
        FewstepError: for an unknown kind or option.
    """
    import fewstep.caching.spectral  # noqa: F401  (its kinds)

    options = dict(spec)
    kind = str(options.pop("kind", "hold"))
    if kind not in KINDS:
        raise FewstepError(unknown("predictor", kind, KINDS))
    cls = KINDS[kind]
    for name in cls.array_names():
        options[name] = {key.split("/", 1)[1]: t for key, t in tensors.items() if key.startswith(name + "/")}
    known = {f.name for f in fields(cls)}
    if extra := sorted(set(options) - known):
        raise FewstepError(f"predictor {kind} has no option {extra[0]!r}; it has {', '.join(sorted(known)) or 'none'}")
    return cls(**options)


def _mixed(cell: Cell, weights: Sequence[float]) -> Any:
    """The newest values of a site with these weights, a tree."""
    values = list(cell.history)[: len(weights)]
    for value in values:
        value.check(cell.site)
    if len(weights) == 1 and weights[0] == 1.0:
        return values[0].tree()
    count = len(values[0].leaves)
    return values[0].tree([_mix(weights, [value.leaves[i] for value in values]) for i in range(count)])


def _mix(weights: Sequence[float], leaves: Sequence[Any]) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    total = leaves[0] * weights[0]
    for weight, leaf in zip(weights[1:], leaves[1:], strict=True):
        total = torch.add(total, leaf, alpha=weight)
    return total


@dataclass(frozen=True)
class Hold(Predictor):
    """The last computed value, unchanged."""

    kind: ClassVar[str] = "hold"


@dataclass(frozen=True)
class Polynomial(Predictor):
    """Base of predictors that go through the last ``order + 1`` computed values; 0 holds the last."""

    order: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or not 0 <= self.order <= 4:
            raise FewstepError(f"order is {self.order!r}; give 0 (hold) to 4")

    @property
    def depth(self) -> int:
        return self.order + 1


@dataclass(frozen=True)
class Extrapolate(Polynomial):
    """The polynomial of degree ``order`` through the last ``order + 1`` computed values, at the step asked for.

        F(s) = sum_j F(s_j) prod_{m != j} (s - s_m) / (s_j - s_m)

    Exact for features that are polynomials of that degree in the step. With fewer values the degree is what they allow.
    """

    kind: ClassVar[str] = "extrapolate"

    def weights(self, past: Sequence[int], step: int) -> list[float]:
        weights = []
        for j, own in enumerate(past):
            w = 1.0
            for m, other in enumerate(past):
                w *= (step - other) / (own - other) if m != j else 1.0
            weights.append(w)
        return weights


@dataclass(frozen=True)
class Taylor(Polynomial):
    """TaylorSeer's forecast, as published: backward differences stand for derivatives at the newest value.

        D^0 = F,  D^{k+1}_j = (D^k_j - D^k_{j+1}) / (s_j - s_{j+1}),  F(s) = sum_k D^k_0 (s - s_0)^k / k!

    Exact for linear features only: a backward difference is a derivative between two values, not at the newest one
    (:class:`Extrapolate` is exact for every order). From Reusing to Forecasting: Accelerating Diffusion Models with
    TaylorSeers, arXiv 2503.06923, eq. 5-8.
    """

    kind: ClassVar[str] = "taylor"

    def basis(self, offset: float) -> list[float]:
        """What the differences of order 0, 1, ... are multiplied with, ``offset`` steps after the newest value."""
        return [offset**k / math.factorial(k) for k in range(self.order + 1)]

    def weights(self, past: Sequence[int], step: int) -> list[float]:
        basis, newest = self.basis(float(step - past[0])), _differences(past)
        return [sum(b * d[j] for b, d in zip(basis, newest, strict=False)) for j in range(len(past))]


@dataclass(frozen=True)
class Hermite(Taylor):
    """HiCache's forecast: TaylorSeer's with scaled Hermite polynomials for powers.

        F(s) = sum_k D^k_0 sigma^k H_k(sigma (s - s_0)) / k!,    H_0 = 1, H_1 = 2x, H_{k+1} = 2x H_k - 2k H_{k-1}

    The slope is taken 2 sigma^2 times, so ``sigma`` 0.5 follows half of the change and 1 / sqrt(2) all of it; even orders
    add a part that does not vanish at s_0. HiCache: A Plug-in Scaled-Hermite Upgrade for Taylor-Style Cache-then-Forecast
    Diffusion Acceleration, arXiv 2508.16984.
    """

    order: int = 2
    sigma: float = 0.5
    kind: ClassVar[str] = "hermite"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise FewstepError(f"sigma is {self.sigma}; give a number above 0, 0.5 as published")

    def basis(self, offset: float) -> list[float]:
        unit = np.eye(self.order + 1)
        values = [float(np.polynomial.hermite.hermval(self.sigma * offset, row)) for row in unit]
        return [self.sigma**k * value / math.factorial(k) for k, value in enumerate(values)]


def _differences(past: Sequence[int]) -> list[list[float]]:
    """D^k_0 for k = 0, 1, ..., each as weights of the values computed at the steps ``past``, newest first."""
    count = len(past)
    differences = [[float(i == j) for i in range(count)] for j in range(count)]
    newest = [differences[0]]
    for k in range(1, count):
        differences = [
            [(a - b) / (past[j] - past[j + 1]) for a, b in zip(differences[j], differences[j + 1], strict=True)]
            for j in range(count - k)
        ]
        newest.append(differences[0])
    return newest


@dataclass(frozen=True)
class Momentum(Predictor):
    """The last value moved on by a share of the last change: F_0 + weight (F_0 - F_1).

    FasterCache's dynamic feature reuse; ``weight`` 0.3 in its CogVideoX script. FasterCache: Training-Free Video Diffusion
    Model Acceleration with High Quality, arXiv 2410.19355, eq. 3.
    """

    weight: float = 0.5
    kind: ClassVar[str] = "momentum"

    @property
    def depth(self) -> int:
        return 2

    def weights(self, past: Sequence[int], step: int) -> list[float]:
        return [1.0] if len(past) < 2 else [1.0 + self.weight, -self.weight]


@dataclass(frozen=True)
class Scale(Predictor):
    """The last value times the growth that is expected since: F(s_0) prod_{i = s_0 + 1}^{s} gamma_i.

    Attributes:
        ratios: gamma of every step, the expected magnitude of its value over that of the step before; see
            :class:`~fewstep.caching.MagCache`.
    """

    ratios: tuple[float, ...] = ()
    kind: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(map(float, self.ratios)))

    def weights(self, past: Sequence[int], step: int) -> list[float]:
        return [math.prod(self.ratios[past[0] + 1 : step + 1])]


@dataclass(frozen=True, eq=False)
class Affine(Predictor):
    """Past values, scaled and shifted per channel by what calibration found for the step: sum_j a_j F(s_j) + b.

    With one value CacheQuant's decoupled error correction (arXiv 2503.01323) and, on a model's output, ERTACache's
    rectification (arXiv 2508.21091); with two it has every linear extrapolation as a special case.

    What was found holds for values of certain steps. Where others are kept, or fewer, because another cache or another batch
    made steps be computed that the plan reuses, the line through the last two takes its place; one value alone is held.

    Attributes:
        scale: by site the factors, (steps, values newest first, channels of all leaves one after the other). A number for
            all channels may stand for them (last dimension 1).
        shift: by site the summands, (steps, channels) likewise.
        past: by site the steps whose values the factors are for, (steps, values) int, -1 for none; where a site is left
            out, any will do as long as there are as many as have factors.
    """

    scale: Mapping[str, Tensor] = field(default_factory=dict)
    shift: Mapping[str, Tensor] = field(default_factory=dict)
    past: Mapping[str, Tensor] = field(default_factory=dict)
    kind: ClassVar[str] = "affine"

    @classmethod
    def array_names(cls) -> tuple[str, ...]:
        return ("scale", "shift", "past")

    def __post_init__(self) -> None:
        if set(self.scale) != set(self.shift):
            raise FewstepError("an affine predictor has a scale and a shift for each of its sites")
        for site, scale in self.scale.items():
            shift = self.shift[site]
            if scale.ndim != 3 or shift.shape != (scale.shape[0], scale.shape[2]):
                raise FewstepError(
                    f"affine tables of site {site!r} have shapes {tuple(scale.shape)} and {tuple(shift.shape)}; "
                    "(steps, values, channels) and (steps, channels) are needed"
                )
            if site in self.past and self.past[site].shape != scale.shape[:2]:
                raise FewstepError(
                    f"past steps of site {site!r} have shape {tuple(self.past[site].shape)}; (steps, values) is needed"
                )
        object.__setattr__(
            self, "_reads", {site: _read(scale, self.past.get(site)) for site, scale in self.scale.items()}
        )
        object.__setattr__(self, "_ready", {})

    @property
    def depth(self) -> int:
        return max((scale.shape[1] for scale in self.scale.values()), default=1)

    def predict(self, cell: Cell, step: int) -> Any:
        newest = cell.history[0]
        if cell.site not in self.scale or step >= len(self.scale[cell.site]):
            newest.check(cell.site)
            return newest.tree()
        count, past = getattr(self, "_reads")[cell.site][step]  # noqa: B009
        kept = [value.step for value in cell.history]
        if len(kept) < count or (past is not None and kept[:count] != past[:count]):
            return _mixed(cell, Extrapolate(1).weights(kept[:2], step))
        values = list(cell.history)[: max(count, 1)]
        for value in values:
            value.check(cell.site)
        return newest.tree([self._correct(cell.site, step, i, values) for i in range(len(newest.leaves))])

    def _correct(self, site: str, step: int, index: int, values: Sequence[Value]) -> Any:
        leaf = values[0].leaves[index]
        if not isinstance(leaf, Tensor):
            return leaf
        scale, shift = self._on(site, leaf)
        channels = slice(None)
        if scale.shape[2] > 1:
            before = [x.shape[channel_axis(x)] for x in values[0].leaves[:index] if isinstance(x, Tensor)]
            channels = slice(sum(before), sum(before) + leaf.shape[channel_axis(leaf)])
        view = [1] * leaf.ndim
        view[channel_axis(leaf)] = -1
        total = shift[step, channels].view(view)
        for j, value in enumerate(values):
            total = torch.addcmul(total, value.leaves[index], scale[step, j, channels].view(view))
        return total

    def _on(self, site: str, leaf: Tensor) -> tuple[Tensor, Tensor]:
        """The tables on the leaf's device in its dtype, moved once."""
        ready: dict[Any, tuple[Tensor, Tensor]] = getattr(self, "_ready")  # noqa: B009
        key = (site, leaf.device, leaf.dtype)
        if key not in ready:
            ready[key] = (self.scale[site].to(leaf), self.shift[site].to(leaf))
        return ready[key]


def _read(scale: Tensor, past: Tensor | None) -> list[tuple[int, list[int] | None]]:
    """For every step how many values have factors, and the steps of these where they are told."""
    used = scale.ne(0).any(2)
    counts = (used * torch.arange(1, scale.shape[1] + 1, device=scale.device)).amax(1).tolist()
    steps: list[list[int] | None] = past.tolist() if past is not None else [None] * len(counts)
    return [
        (count, told if told is not None and told[0] >= 0 else None) for count, told in zip(counts, steps, strict=True)
    ]


def channel_axis(value: Tensor) -> int:
    """Where the channels of a feature are: axis 1 of maps (B, C, H, W), the last one of tokens (B, N, C)."""
    return 1 if value.ndim >= 4 else value.ndim - 1
