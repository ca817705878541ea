"""SolverPlan: a sampler as data. Every step is a row of numbers, decided before the first network call.

    X_{i+1} = sum_k state[i, k] X_{i-k} + sum_k output[i, k] m_{i-k} + noise[i] z_i + constant[i] mu

m_i is the network's output at X_i, converted to the row's basis (data x0, noise eps, or velocity eps - x0). Column k = 0
of ``state`` is the usual case; further columns are Runge-Kutta stages that restart from an older state (the base pointer
of singlestep methods) or methods that mix old states in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.artifact import read_json, read_tensors, write_with_tensors
from fewstep.errors import ArtifactError, PlanError, unknown
from fewstep.samplers.convert import constant_share, conversion
from fewstep.samplers.grid import Grid
from fewstep.samplers.lagrange import Basis, Row
from fewstep.samplers.scalar import stack
from fewstep.samplers.schedule import PREDICTIONS, NoiseSchedule, f64

BASES: tuple[Basis, ...] = ("data", "noise", "velocity")
_ARRAYS = ("state", "output", "noise", "constant", "alpha", "sigma", "model_time", "in_scale", "evaluate")
_IDENTITY = {"data": (1.0, 0.0), "noise": (0.0, 1.0), "velocity": (-1.0, 1.0)}
"""What a unit of m adds to (alpha, sigma) when x0 and eps are constant along the trajectory."""


@dataclass(frozen=True, eq=False)
class SolverPlan:
    """N rows, all float64 on the host. Immutable, so threads share one; run state lives elsewhere.

    Made by ``Solver.compile(schedule, grid)``, checked by :meth:`validate`, kept by :meth:`save`.
    """

    state: Tensor
    """(N, V) or, with coefficients of every dimension's own, (N, V, *sample shape): state[i, k] multiplies X_{i-k}."""
    output: Tensor
    """(N, W) or (N, W, *sample shape): output[i, k] multiplies m_{i-k}; W is the history width."""
    noise: Tensor
    """(N,): multiplies a standard normal draw."""
    constant: Tensor
    """(N,): multiplies the constant tensor mu (mean-reverting diffusion, a residual shift's low-resolution image).

    Or (N, *sample shape): added as it is, there is no mu then.
    """
    alpha: Tensor
    """(N+1,): alpha of every state X_i."""
    sigma: Tensor
    """(N+1,): sigma of every state X_i."""
    model_time: Tensor
    """(N,): what the network is fed at X_i."""
    in_scale: Tensor
    """(N,): factor on X_i before the network."""
    evaluate: Tensor
    """(N,) bool: whether row i calls the network; rows that do not (re-noising, a clean-up) have no m_i."""
    basis: tuple[Basis, ...]
    """(N,): the basis of m_i."""
    prediction: str
    """What the network predicts: epsilon, sample, v_prediction, flow_prediction, edm or edm_v."""
    schedule: Mapping[str, Any]
    """Identity of the noise schedule that the plan was made for."""
    fingerprint: str
    """Its fingerprint."""
    method: str = "custom"
    order: int = 1
    init_scale: float = 1.0
    """Standard normal noise times this is X_0."""
    sigma_data: float = 1.0
    grid_name: str = "custom"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    # -- derived ------------------------------------------------------------------------------------------------------
    @property
    def steps(self) -> int:
        """N, the number of rows."""
        return len(self.noise)

    @property
    def nfe(self) -> int:
        """Network evaluations of one trajectory (a pipeline with classifier-free guidance doubles the batch)."""
        return int(self.evaluate.sum())

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of a sample for which every dimension has coefficients of its own; () for the usual plan of numbers."""
        return tuple(self.output.shape[2:])

    @property
    def history(self) -> int:
        """How many outputs the longest row reads, the newest included."""
        used = _used(self.output).any(0).nonzero()
        return int(used.max()) + 1 if len(used) else 0

    @property
    def has_noise(self) -> bool:
        """Whether any row draws noise."""
        return bool((self.noise != 0).any())

    @property
    def base(self) -> tuple[int, ...]:
        """For each row the index of the oldest state that it starts from (its own index for a multistep method)."""
        return tuple(i - int(row.nonzero().max()) if row.any() else i for i, row in enumerate(_used(self.state)))

    @cached_property
    def noise_spans(self) -> tuple[tuple[float, float, int], ...]:
        """For each row the lambda it starts from, the lambda it leads to, and the lap of the noise levels it is on.

        A stage's row starts from the state that it restarts from. Rows that add noise to go back to more of it have a lap
        of their own, and what follows them the next one.
        """
        lam = (torch.log(self.alpha.detach()) - torch.log(self.sigma.detach())).tolist()
        spans, lap = [], 0
        for i, read in enumerate(_used(self.state).tolist()):
            start, end = lam[i - read.index(True)] if True in read else lam[i], lam[i + 1]
            back = end < start and bool(self.noise[i] != 0)
            spans.append((start, end, lap + back))
            lap += 2 * back
        return tuple(spans)

    @property
    def reverting(self) -> bool:
        """Whether states are alpha x0 + (1 - alpha) mu + sigma eps, with mu the tensor that ``constant`` multiplies."""
        return bool(self.schedule.get("reverting"))

    def reverting_constant(self) -> Tensor:
        """(N,): what ``constant`` has to be in a mean-reverting process, float64.

        The rows solve the process of X - mu: 1 - sum_k state[i, k] - sum_k output[i, k] kappa_{i-k}, where kappa is the share
        of mu in an output (:func:`~fewstep.samplers.convert.constant_share`).
        """
        kappa = torch.stack([self._constant_share(i) for i in range(self.steps)])
        back = torch.arange(self.steps)[:, None] - torch.arange(self.output.shape[1])
        return 1 - self.state.sum(1) - (self.output * kappa[back.clamp(min=0)]).sum(1)

    def _constant_share(self, i: int) -> Tensor:
        if not bool(self.evaluate[i]):
            return torch.zeros_like(self.alpha[i])
        p, q = conversion(self.prediction, self.basis[i], self.alpha[i], self.sigma[i], self.sigma_data)
        return constant_share(self.prediction, p, q)

    @property
    def requires_grad(self) -> bool:
        """Whether the numbers carry gradients; the executor then keeps them as tensors."""
        return any(getattr(self, name).requires_grad for name in _ARRAYS)

    @cached_property
    def digest(self) -> str:
        """sha256 of the numbers and what they mean, shortened to 16 hexadecimal digits."""
        h = hashlib.sha256(
            repr((self.basis, self.prediction, self.fingerprint, self.init_scale, self.sigma_data)).encode()
        )
        for name in _ARRAYS:
            h.update(getattr(self, name).detach().contiguous().numpy().tobytes())
        return h.hexdigest()[:16]

    def __repr__(self) -> str:
        return str(self)  # a notebook shows it; the arrays are attributes

    def __str__(self) -> str:
        kind = "stochastic" if self.has_noise else "deterministic"
        head = (
            f"SolverPlan {self.method}: {self.steps} rows, {self.nfe} network calls, order {self.order}, "
            f"history {self.history}, {kind}, grid {self.grid_name}, predicts {self.prediction}"
        )
        rows = [head]
        state, output, constant = self.state, self.output, self.constant
        unit = " mu"
        if self.sample_shape:  # one number a coefficient
            state, output = (v.detach().flatten(2).mean(2) for v in (state, output))
            constant, unit = constant.detach().flatten(1).mean(1), ""
            rows.append(f"  every dimension of {self.sample_shape} has its own coefficients; their means:")
        for i in range(self.steps):
            m = " ".join(f"{w:+.5f} m{i - k}" for k, w in enumerate(output[i].tolist()) if w)
            x = " ".join(f"{w:+.5f} X{i - k}" for k, w in enumerate(state[i].tolist()) if w)
            z = f" {self.noise[i]:+.5f} z" if self.noise[i] else ""
            mu = f" {constant[i]:+.5f}{unit}" if constant[i] else ""
            time = f"{self.model_time[i]:>9.3f}" if self.evaluate[i] else "  no call"
            rows.append(f"  {i:>3} t={time} {self.basis[i]:<5} X{i + 1} = {x} {m}{z}{mu}")
        return "\n".join(rows)

    # -- checks -------------------------------------------------------------------------------------------------------
    def problems(self) -> list[str]:
        """Every way in which the plan contradicts itself, as sentences; empty for a sound plan.

        A sound row is exact when x0 and eps do not change: what it makes of (alpha_i, sigma_i) is (alpha_{i+1},
        sigma_{i+1}), noise adding in quadrature. Learned coefficients may break that on purpose, therefore a list.
        The tolerance is 1e-10 of the sum of the magnitudes: float64 rounding through a badly conditioned row.
        """
        found = self._malformed()
        if found or self.sample_shape:  # coefficients a dimension come from statistics, which no marginal implies
            return found
        state, output, alpha, sigma = (
            getattr(self, n).detach().tolist() for n in ("state", "output", "alpha", "sigma")
        )
        for i in range(self.steps):
            past = [(w, i - k) for k, w in enumerate(state[i]) if w]
            used = [(w, i - k) for k, w in enumerate(output[i]) if w]
            if self.constant[i] and not self.reverting:
                continue  # what a constant tensor does to the marginal is known for mean-reverting processes only
            for what, column, target, noise in (
                ("alpha", 0, alpha[i + 1], 0.0),
                ("sigma", 1, sigma[i + 1], float(self.noise[i])),
            ):
                marginal = (alpha, sigma)[column]
                terms = [w * marginal[j] for w, j in past] + [w * _IDENTITY[self.basis[j]][column] for w, j in used]
                got = math.hypot(math.fsum(terms), noise)
                got = got if math.fsum(terms) >= 0 or noise else math.fsum(terms)
                if not abs(got - target) <= 1e-10 * (sum(map(abs, terms)) + abs(target) + 1e-300):
                    found.append(f"row {i} leads to {what} = {got:.12g}, its target is {target:.12g}")
        if self.reverting:
            given, needed = self.constant.detach(), self.reverting_constant().detach()
            kappa = 1 / self.alpha[:-1].detach().min()  # at most
            magnitude = 1 + self.state.detach().abs().sum(1) + self.output.detach().abs().sum(1) * kappa
            for i in ((given - needed).abs() > 1e-10 * magnitude).nonzero()[:, 0].tolist():
                found.append(
                    f"row {i} adds {given[i]:.12g} mu, {needed[i]:.12g} is right; MeanReverting(solver) adds it"
                )
        return found

    def validate(self, *, strict: bool = True) -> SolverPlan:
        """Raise :class:`PlanError` with the first contradictions, or with ``strict=False`` only for malformed arrays."""
        found = self.problems() if strict else self._malformed()
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise PlanError(f"plan {self.method}: " + "; ".join(found[:3]) + more)
        return self

    def _malformed(self) -> list[str]:
        if self.noise.ndim != 1 or self.output.ndim < 2:
            return [
                f"noise has shape {tuple(self.noise.shape)} and output {tuple(self.output.shape)}, (N,) and (N, W) are needed"
            ]
        n = len(self.noise)
        own = self.sample_shape
        shapes = {
            "constant": (n, *own), "model_time": (n,), "in_scale": (n,), "evaluate": (n,), "alpha": (n + 1,), "sigma": (n + 1,),
        }  # fmt: skip
        found = [
            f"{name} has shape {tuple(getattr(self, name).shape)}, {shape} is needed"
            for name, shape in shapes.items()
            if tuple(getattr(self, name).shape) != shape
        ]
        found += [
            f"{name} has shape {tuple(getattr(self, name).shape)}, ({', '.join(map(str, (n, 'width', *own)))}) is needed"
            for name in ("state", "output")
            if getattr(self, name).ndim < 2 or len(getattr(self, name)) != n or getattr(self, name).shape[2:] != own
        ]
        found += [
            f"{name} has values that are not finite"
            for name in _ARRAYS
            if not bool(getattr(self, name).isfinite().all())
        ]
        found += [
            f"{name} is {getattr(self, name).dtype}, {dtype} is needed"
            for name in _ARRAYS
            if getattr(self, name).dtype != (dtype := torch.bool if name == "evaluate" else torch.float64)
        ]
        found += [
            f"{name} is {getattr(self, name)!r}, a positive number is needed"
            for name in ("init_scale", "sigma_data")
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < math.inf
        ]
        if n == 0 or len(self.basis) != n or not all(b in BASES for b in self.basis):
            found.append(f"a plan of {n} rows needs {max(n, 1)} bases out of {', '.join(BASES)}, got {self.basis}")
        if self.prediction not in PREDICTIONS:
            found.append(unknown("prediction type", self.prediction, PREDICTIONS))
        if found:
            return found
        if not bool(self.evaluate[0]):
            found.append("row 0 must call the network")
        used = {name: _used(getattr(self, name).detach()) for name in ("state", "output")}
        for i in range(n):
            states, outputs = ([i - k for k in used[name][i].nonzero()[:, 0].tolist()] for name in ("state", "output"))
            if min(states + outputs, default=0) < 0:
                found.append(f"row {i} reads a state or an output from before the start")
            elif bad := [j for j in outputs if not self.evaluate[j]]:
                found.append(f"row {i} reads m_{bad[0]}, but row {bad[0]} does not call the network")
        return found

    # -- other plans --------------------------------------------------------------------------------------------------
    def tail(self, begin: int) -> SolverPlan:
        """The plan from row ``begin`` on (image to image).

        Rows that would read outputs or states from before the start become first-order rows: the warm-up restarts. A
        solver that is at hand does better by compiling ``grid.tail(begin)``; this serves plans from files.
        """
        if not 0 <= begin < self.steps:
            raise PlanError(f"begin index {begin} is outside a plan of {self.steps} rows (0 to {self.steps - 1})")
        if not bool(self.evaluate[begin]):
            raise PlanError(f"row {begin} does not call the network, so a run cannot begin there")
        state, output, constant = (v[begin:].clone() for v in (self.state, self.output, self.constant))
        for i in range(min(self.steps - begin, max(self.state.shape[1], self.output.shape[1]))):
            if not (bool((state[i, i + 1 :] != 0).any()) or bool((output[i, i + 1 :] != 0).any())):
                continue
            j = begin + i
            if not bool(self.evaluate[j]):
                raise PlanError(f"row {j} calls no network and reads from before row {begin}: a run cannot begin there")
            row = first_order_row(self.basis[j], self.alpha[j : j + 2], self.sigma[j : j + 2], self.noise[j])
            state[i], output[i] = 0, 0
            if self.sample_shape:
                constant[i] = 0  # it belonged to the row that is replaced
            state[i, 0], output[i, 0] = row.state, row.outputs[0]
        cut = {name: getattr(self, name)[begin:] for name in _ARRAYS[2:]}
        cut["constant"] = constant
        plan = replace(
            self, state=state, output=output, basis=self.basis[begin:], method=f"{self.method}[{begin}:]", **cut
        )
        return replace(plan, constant=plan.reverting_constant()) if self.reverting else plan

    def __deepcopy__(self, memo: object) -> SolverPlan:
        return self  # immutable

    # -- files --------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """The whole plan as JSON values; floats keep every bit. For configs; :meth:`save` writes files."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return {**{name: getattr(self, name) for name in _HEADER}, "basis": list(self.basis), **arrays}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SolverPlan:
        """The inverse of :meth:`to_dict`; raises :class:`PlanError` for missing or unknown keys and malformed arrays."""
        needed = {*_HEADER, "basis", *_ARRAYS}
        if set(data) != needed:
            raise PlanError(f"a plan needs exactly the keys {sorted(needed)}; differing: {sorted(needed ^ set(data))}")
        fields: dict[str, Any] = {name: data[name] for name in _HEADER}
        try:
            fields.update({name: f64(data[name]) for name in _ARRAYS if name != "evaluate"})
            fields["evaluate"] = torch.tensor(data["evaluate"], dtype=torch.bool, device="cpu")
            fields["basis"] = tuple(data["basis"])
        except (TypeError, ValueError) as error:
            raise PlanError(f"a plan's arrays are lists of numbers: {error}") from None
        return cls(**fields).validate(strict=False)

    def save(self, path: str | Path) -> None:
        """Write ``path`` (JSON, must end in .json) and its arrays beside it (.safetensors).

        Interrupted at any moment, ``path`` is the whole old plan or the whole new one.
        """
        body = {**{name: getattr(self, name) for name in _HEADER}, "basis": list(self.basis)}
        write_with_tensors(_json_path(path), "SolverPlan", body, {name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, path: str | Path, schedule: NoiseSchedule | None = None) -> SolverPlan:
        """Read a plan; with ``schedule`` also refuse one that was made for another noise schedule or prediction type.

        Raises:
            ArtifactError: unreadable, another kind or version, missing or damaged arrays, another model's fingerprint.
            PlanError: the arrays are malformed.
        """
        path = _json_path(path)
        body = read_json(path, "SolverPlan", required=(*_HEADER, "basis", "arrays", "arrays_sha256"))
        name, basis = str(body.pop("arrays")), body.pop("basis")
        if Path(name).name != name:
            raise ArtifactError(f"{path} names its arrays {name!r}; they lie beside it")
        arrays = read_tensors(path.with_name(name), body.pop("arrays_sha256"), _ARRAYS)
        fields: dict[str, Any] = {**arrays, **body, "basis": tuple(basis) if isinstance(basis, list) else ()}
        plan = cls(**fields).validate(strict=False)
        if schedule is not None:
            plan.check_schedule(schedule, str(path))
        return plan

    def check_schedule(self, schedule: NoiseSchedule, source: str = "the plan") -> None:
        """Raise :class:`ArtifactError` unless the plan was made for ``schedule``."""
        if self.fingerprint != schedule.fingerprint:
            raise ArtifactError(
                f"{source} was made for {dict(self.schedule)} (fingerprint {self.fingerprint}), "
                f"this model's schedule is {schedule.identity()} (fingerprint {schedule.fingerprint})"
            )


_HEADER = (
    "prediction", "schedule", "fingerprint", "method", "order", "init_scale", "sigma_data", "grid_name", "provenance",
)  # fmt: skip


def first_order_row(basis: Basis, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Row:
    """DDIM from (alpha[0], sigma[0]) to (alpha[1], sigma[1]), leaving room for ``noise`` in the variance."""
    quiet = torch.sqrt((sigma[1] ** 2 - noise**2).clamp(min=0))
    if basis == "data":
        a = quiet / sigma[0]
        return Row(a, [alpha[1] - a * alpha[0]])
    if basis == "noise":
        a = alpha[1] / alpha[0]
        return Row(a, [quiet - a * sigma[0]])
    return Row(torch.ones_like(quiet), [quiet - sigma[0]])


def plan_from_rows(
    schedule: NoiseSchedule, grid: Grid, basis: Sequence[Basis], rows: Sequence[Row], *, method: str, order: int
) -> SolverPlan:
    """Assemble the plan of a method with one network call per grid interval and one state column."""
    width = max(len(row.outputs) for row in rows)
    return plan_from_arrays(
        schedule,
        grid,
        basis,
        state=stack([row.state for row in rows]).unsqueeze(1),
        output=torch.stack([stack([*row.outputs, *[0.0] * (width - len(row.outputs))]) for row in rows]),
        noise=stack([row.noise for row in rows]),
        constant=f64([0.0] * len(rows)),
        method=method,
        order=order,
    )


def plan_from_arrays(
    schedule: NoiseSchedule,
    grid: Grid,
    basis: Sequence[Basis],
    *,
    state: Tensor,
    output: Tensor,
    noise: Tensor,
    constant: Tensor,
    method: str,
    order: int,
) -> SolverPlan:
    """The plan with these coefficients and one network call per grid interval; arrays as in :class:`SolverPlan`."""
    alpha, sigma = grid.alpha, grid.sigma
    return SolverPlan(
        state=state,
        output=output,
        noise=noise,
        constant=constant,
        alpha=alpha,
        sigma=sigma,
        model_time=grid.model_time,
        in_scale=schedule.in_scale(sigma[:-1]),
        evaluate=torch.ones(len(noise), dtype=torch.bool, device="cpu"),
        basis=tuple(basis),
        prediction=schedule.prediction,
        schedule=schedule.identity(),
        fingerprint=schedule.fingerprint,
        method=method,
        order=order,
        init_scale=float(schedule.init_scale(alpha[0], sigma[0]).detach()),
        sigma_data=schedule.sigma_data,
        grid_name=grid.name,
    )


def widened(columns: Tensor, width: int) -> Tensor:
    """``columns`` (N, W, ...) as (N, ``width``, ...): zeros are added behind, or what is there is cut off; a copy."""
    missing = columns.new_zeros(len(columns), max(0, width - columns.shape[1]), *columns.shape[2:])
    return torch.cat([columns[:, :width], missing], 1)


def _used(coefficients: Tensor) -> Tensor:
    """(N, width) bool: which coefficients are not zero, in any dimension."""
    return (coefficients != 0).flatten(2).any(2) if coefficients.ndim > 2 else coefficients != 0


def _json_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise ArtifactError(f"a plan's path must end in .json (its arrays lie beside it), got {str(path)!r}")
    return path
