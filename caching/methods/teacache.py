"""TeaCache: how far the network's input has moved since, by way of a fitted polynomial, says whether to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from fewstep.caching.families import Family
from fewstep.caching.families.modulation import embedded_time, modulated_input, plain_input
from fewstep.caching.method import Entry
from fewstep.caching.methods.online import OnlineMethod, Watch, positive, whole_stack
from fewstep.caching.methods.voting import decisive, on_host, relative_change
from fewstep.caching.profiling import See, Sight, watch_runs
from fewstep.errors import FewstepError, unknown

Signal = Literal["modulated", "time", "input"]
SIGNALS: dict[str, Callable[[Any, Sequence[Any], Any], Tensor]] = {
    "modulated": modulated_input,
    "time": embedded_time,
    "input": plain_input,
}
"""What is watched: the modulated input of the first block, the embedded time that it is given, or its plain input."""

PUBLISHED: dict[str, tuple[Signal, tuple[float, ...]]] = {
    "flux": ("modulated", (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)),
    "cogvideox-2b": ("time", (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434)),
    "cogvideox-5b": ("time", (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339)),
    "wan2.1-t2v-1.3b": ("time", (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664)),
    "wan2.1-t2v-14b": ("time", (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525)),
    "wan2.1-i2v-480p": ("time", (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977)),
    "wan2.1-i2v-720p": ("time", (8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401)),
}
"""The authors' polynomials, highest power first, and what they were fitted to. Those of Wan want ``warmup=5``."""


@dataclass(frozen=True)
class TeaCache(OnlineMethod):
    """The residual of the whole network is reused until the changes of its input, rescaled, have added up to a threshold.

        d_t = |m_t - m_{t-1}|_1 / |m_{t-1}|_1,    acc += polynomial(d_t),    compute and acc = 0 where acc >= threshold

    m is the modulated input of the first block, which is cheap to have; the polynomial, fitted once a model, makes of its
    change that of the output. On UNets m is what enters the layers that are left out. It reads one number from the device a
    step. Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108.

    Attributes:
        threshold: of the accumulated change; with Flux's polynomial 0.25 to 0.8 give 1.5 to 2.25 times the speed.
        polynomial: coefficients, highest power first; a name of :data:`PUBLISHED`; None for the published one of the model's
            class where that tells it, else the plain change. :func:`fit_polynomial` makes others.
        signal: what is watched; None for what the polynomial was fitted to.
        cooldown: the authors compute the last step always.
    """

    knob: ClassVar[str | None] = "threshold"
    threshold: float = 0.25
    polynomial: tuple[float, ...] | str | None = None
    signal: Signal | None = None
    cooldown: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.threshold, "threshold")
        if isinstance(self.polynomial, str) and self.polynomial not in PUBLISHED:
            raise FewstepError(unknown("polynomial", self.polynomial, PUBLISHED))
        if self.signal is not None and self.signal not in SIGNALS:
            raise FewstepError(unknown("signal", self.signal, SIGNALS))
        if not isinstance(self.polynomial, str | None):
            object.__setattr__(self, "polynomial", tuple(map(float, self.polynomial)))

    def sites(self, family: Family) -> list[str]:
        return [whole_stack(family, type(self).__name__)]

    def watch(self, family: Family, steps: int | None) -> Watch:
        name = published_for(family) if self.polynomial is None else self.polynomial
        signal, polynomial = PUBLISHED[name] if isinstance(name, str) else ("modulated", name or (1.0, 0.0))
        return _InputChange(self, self.signal or signal, polynomial)


def published_for(family: Family) -> str | None:
    """The polynomial that a model's class and configuration tell of; None for all others."""
    config = getattr(family.model, "config", {})
    if family.name == "FluxTransformer2DModel":
        return "flux"
    if family.name == "CogVideoXTransformer3DModel":
        return "cogvideox-5b" if config.get("use_rotary_positional_embeddings") else "cogvideox-2b"
    if family.name == "WanTransformer3DModel" and config.get("image_dim") is None:
        return {12: "wan2.1-t2v-1.3b", 40: "wan2.1-t2v-14b"}.get(int(config["num_attention_heads"]))
    return None


class _InputChange(Watch):
    """Adds up the rescaled changes of the signal."""

    def __init__(self, method: TeaCache, signal: str, polynomial: Sequence[float]) -> None:
        super().__init__(method)
        self.threshold = method.threshold
        self.look, self.polynomial = SIGNALS[signal], polynomial
        self.seen: Tensor | None = None
        self.change: Tensor | None = None
        self.accumulated: Any = 0.0  # of each sample, where these vote

    def observe(self, entry: Entry) -> None:
        new, old = self.look(entry.module, entry.args, entry.kwargs), self.seen
        comparable = old is not None and old.shape == new.shape
        self.change = relative_change(new, old, self.limits.vote) if old is not None and comparable else None
        self.seen = new

    def admits(self, entry: Entry) -> bool:
        if self.change is None:
            return False
        self.accumulated = self.accumulated + np.polyval(self.polynomial, on_host(self.change))
        return decisive(np.asarray(self.accumulated), self.limits.vote) < self.threshold

    def recompute(self, entry: Entry) -> None:
        self.accumulated = 0.0


@dataclass(frozen=True, eq=False)
class PolynomialFit:
    """A polynomial from the change of the input to that of the output, and how well it tells.

    Attributes:
        coefficients: highest power first.
        r2: share of the output changes' variance that it explains on the pairs that it was fitted to; near 0 the signal says
            nothing about the output, and TeaCache will do no better than an interval.
        pairs: (n, 2) changes of input and output.
        signal: what was watched.
    """

    coefficients: tuple[float, ...]
    r2: float
    pairs: np.ndarray[Any, np.dtype[np.float64]]
    signal: Signal

    def method(self, threshold: float, **options: Any) -> TeaCache:
        """TeaCache with this polynomial."""
        return TeaCache(threshold, self.coefficients, self.signal, **options)

    def __str__(self) -> str:
        terms = ", ".join(f"{c:.6g}" for c in self.coefficients)
        return f"polynomial [{terms}] of {self.signal} changes: R^2 {self.r2:.3f} on {len(self.pairs)} pairs"


def fit_polynomial(
    pipe: Any,
    prompts: Sequence[str] | None = None,
    *,
    num_inference_steps: int,
    degree: int = 4,
    signal: Signal = "modulated",
    samples: int = 8,
    batch: int = 1,
    **options: Any,
) -> PolynomialFit:
    """TeaCache's polynomial for a pipeline: least squares over the changes from step to step of uncached trajectories.

    Args:
        pipe: a diffusers pipeline; left as it was.
        prompts: drawn in turn.
        num_inference_steps: steps of the trajectories; the polynomial belongs to that number and the scheduler.
        degree: of the polynomial.
        signal: what is watched.
        samples: trajectories; each step of each is a pair.
        batch: at once. A pair is of a batch's sums, as the method's decisions are.
        options: ``guidance_scale``, ``seed``, ``call`` as of :func:`fewstep.caching.profile`.

    Raises:
        FewstepError: for fewer pairs than coefficients.
    """
    if signal not in SIGNALS:
        raise FewstepError(unknown("signal", signal, SIGNALS))
    pairs: list[tuple[Tensor, Tensor]] = []

    def begin() -> See:
        last: list[tuple[Tensor, Tensor]] = []

        def see(sight: Sight) -> None:
            entry = sight.entry
            new = SIGNALS[signal](entry.module, entry.args, entry.kwargs), sight.output
            if last:
                old = last.pop()
                pairs.append((relative_change(new[0], old[0]), relative_change(new[1], old[1])))
            last.append(new)

        return see

    watch_runs(
        pipe, lambda family: whole_stack(family, "TeaCache"), begin, prompts=prompts, samples=samples, batch=batch,
        num_inference_steps=num_inference_steps, **options,
    )  # fmt: skip
    found = np.array([[float(a), float(b)] for a, b in pairs], dtype=np.float64).reshape(-1, 2)
    return fitted(found, degree, signal)


def fitted(
    pairs: np.ndarray[Any, np.dtype[np.float64]], degree: int = 4, signal: Signal = "modulated"
) -> PolynomialFit:
    """The polynomial through (n, 2) pairs of changes, by least squares.

    Raises:
        FewstepError: for fewer pairs than coefficients.
    """
    if len(pairs) <= degree:
        raise FewstepError(
            f"{len(pairs)} pairs do not determine a polynomial of degree {degree}; draw more samples or steps"
        )
    x, y = pairs.T
    polynomial = np.polynomial.Polynomial.fit(x, y, degree)
    left, spread = ((y - polynomial(x)) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    coefficients = np.zeros(degree + 1)
    power = polynomial.convert().coef[::-1]
    coefficients[degree + 1 - len(power) :] = power
    return PolynomialFit(tuple(map(float, coefficients)), float(1 - left / spread) if spread else 1.0, pairs, signal)
