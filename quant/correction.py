"""What quantisation does to a network's output on average, taken off again: a gain and an offset a time step and channel.

    y_q = (1 + k_t) y + b_t + r_t        k_t, b_t from the regression of y_q on y at every calibrated step
    y   = (y_q - b_t) / (1 + k_t)        what is left has the variance var(r_t) / (1 + k_t)^2

What is left is noise; a sampler that adds noise of its own adds so much less (:meth:`Correction.absorbed`).

Source: PTQD, 2305.10657, eq. 12 to 17; CacheQuant, 2503.01323, eq. 11, fits gain and offset by channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.artifact import read_json, read_tensors, write_with_tensors
from fewstep.errors import ArtifactError, FewstepError
from fewstep.quant.calibration.calls import as_calls, first_tensor
from fewstep.quant.state import RECORD, Record, evaluating, twin, unwrapped
from fewstep.samplers.convert import conversion
from fewstep.samplers.plan import SolverPlan

HANDLE = "_fewstep_correction"
_ARRAYS = ("times", "gain", "offset", "rest", "shared")


@dataclass(frozen=True, eq=False)
class Correction:
    """A table by time step; a call at a time in between takes the nearest row.

    It belongs to the quantised network and to the sampler whose calls it was fitted on.

    Attributes:
        times: (T,) float64, ascending: what the network was told.
        gain: (T, C) float64, 1 + k.
        offset: (T, C) float64, b.
        fingerprint: of the plan's architecture.
        rest: (T,) float64, the variance that is left in the corrected output, the mean over channels.
        shared: (T,) float64, the part of it that the two halves of a guided batch have in common, their covariance.
    """

    times: Tensor
    gain: Tensor
    offset: Tensor
    fingerprint: str
    rest: Tensor
    shared: Tensor

    def rows(self, timestep: Any, batch: int) -> tuple[Tensor, Tensor]:
        """Gain and offset (B, C) for the times of a call."""
        times = torch.as_tensor(timestep).detach().double().cpu().reshape(-1).expand(batch)
        row = (times[:, None] - self.times[None]).abs().argmin(1)
        return self.gain[row], self.offset[row]

    def corrected(self, output: Tensor, timestep: Any) -> Tensor:
        """An output (B, C, ...) of the quantised network without its mean error."""
        gain, offset = (r.to(output) for r in self.rows(timestep, len(output)))
        shape = (*gain.shape, *[1] * (output.ndim - 2))
        return (output - offset.reshape(shape)) / gain.reshape(shape)

    def left(self, time: float, guidance: float | None = None) -> float:
        """The variance that is left at a time, with ``guidance`` in u + g (c - u): (g^2 + (1-g)^2) rest + 2 g (1-g) shared."""
        row = int((self.times - time).abs().argmin())
        rest, shared = float(self.rest[row]), float(self.shared[row])
        if guidance is None:
            return rest
        g = guidance
        return max(0.0, (g**2 + (1 - g) ** 2) * rest + 2 * g * (1 - g) * shared)

    def absorbed(self, plan: SolverPlan, *, guidance: float | None = None) -> SolverPlan:
        """A stochastic plan that adds less noise by what the corrected network adds itself; a deterministic one as it is.

            noise'_i^2 = max(0, noise_i^2 - sum_k (output[i, k] q_{i-k})^2 var_{i-k})

        where q is what the plan's m changes by for one unit of the network's output. Errors of different calls count as
        independent.

        Args:
            plan: for the same network; with one number a coefficient.
            guidance: classifier-free guidance scale, where the pipeline guides.

        Raises:
            FewstepError: for a plan with coefficients of every dimension's own, or one that adds less already.

        Source: PTQD, 2305.10657, eq. 17, there for DDIM.
        """
        if plan.sample_shape:
            raise FewstepError(f"plan {plan.method} has coefficients for every dimension; give one with plain numbers")
        if "absorbed" in plan.provenance:
            raise FewstepError(f"plan {plan.method} adds less noise already; give the plan as it was made")
        if not plan.has_noise:
            return plan
        noise = plan.noise.detach().clone()
        for i in range(plan.steps):
            added = 0.0
            for k, weight in enumerate(plan.output[i].tolist()):
                if weight and noise[i]:
                    j = i - k
                    _, q = conversion(plan.prediction, plan.basis[j], plan.alpha[j], plan.sigma[j], plan.sigma_data)
                    added += (weight * float(q)) ** 2 * self.left(float(plan.model_time[j]), guidance)
            noise[i] = (noise[i] ** 2 - added).clamp(min=0).sqrt()
        return replace(plan, noise=noise, provenance={**plan.provenance, "absorbed": self.fingerprint})

    def save(self, path: str | Path) -> None:
        """Write JSON, which must end in .json, and the arrays beside it."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        write_with_tensors(_json_path(path), "QuantCorrection", {"fingerprint": self.fingerprint}, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Correction:
        """Read :meth:`save`; ArtifactError where that cannot be."""
        path = _json_path(path)
        body = read_json(path, "QuantCorrection", required=("fingerprint", "arrays", "arrays_sha256"))
        arrays = read_tensors(path.with_name(Path(str(body["arrays"])).name), body["arrays_sha256"], _ARRAYS)
        return cls(**arrays, fingerprint=str(body["fingerprint"]))


def fit_correction(module: nn.Module, calibration: Any, *, by_channel: bool = True) -> Correction:
    """Fit a correction for a quantised network that still has its originals.

    Args:
        module: quantised with ``keep_originals=True``, without a correction.
        calibration: calls that are told a time, see :func:`~fewstep.quant.record`.
        by_channel: a gain for every channel; else one a step, as PTQD has it. Offsets are by channel.

    Raises:
        FewstepError: not quantised, originals gone, corrected already, or calls without a time.
    """
    model, calls = unwrapped(module), as_calls(calibration)
    record: Record | None = getattr(model, RECORD, None)
    if record is None or not record.originals:
        raise FewstepError("a correction is fitted against the float layers; quantise with keep_originals=True")
    if getattr(model, HANDLE, None) is not None:
        raise FewstepError("the network has a correction already; remove_correction_ first")
    if not calls or any(call.timestep != call.timestep for call in calls):
        raise FewstepError(
            "a correction is a table by time step; give calls that are told their time, see quant.record"
        )
    pairs: dict[float, list[tuple[Tensor, Tensor]]] = {}
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad(), twin(model, record) as original:
        for call in calls:
            here = call.to(device)
            pair = (here.run(model).double().cpu(), here.run(original).double().cpu())
            pairs.setdefault(call.timestep, []).append(pair)
    times = sorted(pairs)
    found = [_fit(pairs[time], by_channel) for time in times]
    gain, offset = (torch.stack(parts) for parts in zip(*found, strict=True))
    left = [_left(pairs[time], *fitted) for time, fitted in zip(times, found, strict=True)]
    rest, shared = (torch.tensor(part, dtype=torch.float64) for part in zip(*left, strict=True))
    return Correction(torch.tensor(times, dtype=torch.float64), gain, offset, record.plan.fingerprint, rest, shared)


def correct_(module: nn.Module, correction: Correction) -> None:
    """Apply a correction to every output of a quantised network, until :func:`remove_correction_` or ``dequantize_``.

    Raises:
        FewstepError: for a network that is not quantised, of another architecture, or corrected already.
    """
    model = unwrapped(module)
    record: Record | None = getattr(model, RECORD, None)
    if record is None or record.plan.fingerprint != correction.fingerprint:
        raise FewstepError(f"the correction is for a quantised network with fingerprint {correction.fingerprint}")
    if getattr(model, HANDLE, None) is not None:
        raise FewstepError("the network has a correction already; remove_correction_ first")

    setattr(model, HANDLE, model.register_forward_hook(_Corrector(correction), with_kwargs=True))


@dataclass(frozen=True, eq=False)
class _Corrector:
    """The hook behind a network; an object, which can be pickled and copied with it."""

    correction: Correction

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if time is None:
            raise FewstepError("the network was not told its time; remove_correction_ first")
        better = self.correction.corrected(first_tensor(output), time)
        if isinstance(output, Tensor):
            return better
        return (better, *output[1:]) if isinstance(output, tuple) else type(output)(sample=better)


@contextmanager
def without_correction(model: nn.Module) -> Iterator[None]:
    """A network's outputs as its layers make them inside, corrected again after where they were before."""
    hook = next((hook for hook in model._forward_hooks.values() if isinstance(hook, _Corrector)), None)
    remove_correction_(model)
    try:
        yield
    finally:
        if hook is not None:
            correct_(model, hook.correction)


def remove_correction_(module: nn.Module) -> bool:
    """Take a correction off; whether there was one."""
    model = unwrapped(module)
    handle = getattr(model, HANDLE, None)
    if handle is None:
        return False
    handle.remove()
    delattr(model, HANDLE)
    return True


def _fit(pairs: Sequence[tuple[Tensor, Tensor]], by_channel: bool) -> tuple[Tensor, Tensor]:
    """Gain and offset (C,) of y_q = gain y + offset by least squares; a gain that is not positive counts as 1."""
    got, want = (torch.cat([p[i].transpose(0, 1).flatten(1) for p in pairs], dim=1) for i in (0, 1))
    centred = want - want.mean(1, keepdim=True)
    products, squares = ((got - got.mean(1, keepdim=True)) * centred).sum(1), centred.square().sum(1)
    if not by_channel:
        products, squares = products.sum().expand_as(products), squares.sum().expand_as(squares)
    gain = torch.where(squares > 0, products / squares.clamp(min=1e-30), 1.0)
    gain = torch.where(gain > 0, gain, 1.0)
    return gain, got.mean(1) - gain * want.mean(1)


def _left(pairs: Sequence[tuple[Tensor, Tensor]], gain: Tensor, offset: Tensor) -> tuple[float, float]:
    """Variance of what is left after the correction, and covariance of the halves of the batches; 0 for odd batches."""
    errors = []
    for got, want in pairs:
        shape = (-1, *[1] * (got.ndim - 2))
        errors.append((got - offset.reshape(shape)) / gain.reshape(shape) - want)
    halves = [error.chunk(2) for error in errors if len(error) % 2 == 0]
    shared = sum(float((a * b).mean()) for a, b in halves) / max(1, len(halves))
    return sum(float(error.square().mean()) for error in errors) / len(errors), shared


def _json_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise ArtifactError(f"a correction's path must end in .json, got {str(path)!r}")
    return path
