"""Backends: which of them computes a layer, from what was found out about this machine.

Each pair of formats is tried on a backend once for each device, small, against the reference; one that fails is left
out with a single warning.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError, unknown
from fewstep.quant.backends.base import Backend
from fewstep.quant.backends.extension import Extension
from fewstep.quant.backends.fused import Fused
from fewstep.quant.backends.native import Native
from fewstep.quant.backends.onednn import OneDNN
from fewstep.quant.backends.reference import Reference
from fewstep.quant.backends.torchao import TorchAO
from fewstep.quant.formats import Format, Sign

if TYPE_CHECKING:
    from fewstep.quant.layers.base import QuantLayer

REFERENCE = Reference()
ALL: tuple[Backend, ...] = (OneDNN(), Fused(), Native(), Extension(), REFERENCE, TorchAO())
"""In the order in which they are preferred; what comes after the reference is used by name only."""
BY_NAME = {backend.name: backend for backend in ALL}


@dataclass(frozen=True)
class Support:
    """A row of the table of backends: whether one can multiply a pair of formats on a device, and if not, why."""

    backend: str
    device: str
    activation: str
    weight: str
    problem: str | None

    @property
    def usable(self) -> bool:
        return self.problem is None


def named(name: str) -> Backend:
    """A backend by name; FewstepError for a name that none has."""
    if name not in BY_NAME:
        raise FewstepError(unknown("backend", name, ("auto", *BY_NAME)))
    return BY_NAME[name]


def table(devices: tuple[str, ...] | None = None) -> list[Support]:
    """What every backend can do here, each pair of formats tried; what ``fewstep doctor`` prints."""
    devices = devices or ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))
    rows = []
    for backend in ALL:
        for device in devices:
            there = torch.device(device)
            missing = backend.missing(there)
            if missing:
                rows.append(Support(backend.name, device, "any", "any", missing))
                continue
            for activation, weight in backend.formats:
                pair = "any" not in (activation, weight)
                problem = problem_of(backend, activation, weight, device) if pair else None
                rows.append(Support(backend.name, device, activation or "float", weight, problem))
    return rows


def problem_of(backend: Backend, activation: str | None, weight: str, device: str) -> str | None:
    """Why ``backend`` cannot multiply these formats on ``device``, None where it can; found out once."""
    return _probed(backend.name, activation, weight, device)


@cache
def _probed(name: str, activation: str | None, weight: str, device: str) -> str | None:
    backend, there = named(name), torch.device(device)
    a, w = None if activation is None else Format.parse(activation), Format.parse(weight)
    reason = backend.missing(there) or backend.refuses(a, w)
    if reason or backend is REFERENCE:
        return reason
    columns = 64 * max(1, (a.group if a else 0) // 64, w.group // 64)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(32, columns, generator=generator) for _ in range(2))
    x[:8], y[:8] = x[:8].abs(), y[:8].abs()  # sums as large as they get: where narrow accumulators saturate
    left, right = None if a is None else a.encode(x.to(there)), w.encode(y.to(there))
    try:
        packed = backend.pack(right)
        got = (backend.floats(x.to(there), packed) if left is None else backend.product(left, packed)).cpu()
    except Exception as error:  # whatever a kernel raises here, the layer can still be computed
        reason = f"failed its probe: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    else:
        inputs, decoded = (x if left is None else left.decode()).cpu().double(), right.decode().cpu().double()
        expected = inputs @ decoded.T
        # float32 sums of K products, each off by a rounding: K 2^-24 of their magnitudes
        bound = inputs.abs() @ decoded.abs().T * columns * 2.0**-24
        if bool(((got.double() - expected).abs() <= bound).all()):
            return None
        reason = f"failed its probe: off by {float((got - expected).norm() / expected.norm()):.1%}"
    warnings.warn(f"backend {name} is not used for {activation} x {weight} on {device}: {reason}", stacklevel=2)
    return reason


def why_not(backend: Backend, layer: QuantLayer, x: Tensor) -> str | None:
    """Why ``backend`` cannot compute ``layer`` for these inputs, None where it can."""
    plan = layer.plan
    if backend is not REFERENCE and isinstance(plan.weight.element, Sign):
        return f"{backend.name} has no binary product"
    reason = problem_of(backend, _spelled(plan.activation), str(plan.weight), str(x.device))
    if reason:
        return reason
    if not layer.pointwise:
        return backend.refuses_conv(layer)  # type: ignore[arg-type]
    return backend.refuses_shape(layer.shape[0], layer.columns)


def choose(layer: Any, x: Tensor) -> Backend:
    """The backend that computes ``layer`` for inputs like ``x``: the named one, or the first that can.

    Raises:
        FewstepError: where the named one cannot.
    """
    return layer.remember(("backend", layer.backend, x.device), lambda: _chosen(layer, x))  # type: ignore[no-any-return]


def _chosen(layer: QuantLayer, x: Tensor) -> Backend:
    if layer.backend != "auto":
        backend = named(layer.backend)
        reason = why_not(backend, layer, x)
        if reason:
            raise FewstepError(f"backend {backend.name} cannot compute a layer of {layer.plan}: {reason}")
        return backend
    return next(backend for backend in ALL if why_not(backend, layer, x) is None)


def _spelled(format: Format | None) -> str | None:
    return None if format is None else str(format)
