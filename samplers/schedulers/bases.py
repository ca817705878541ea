"""The multistep method that another method is built on, named in a config."""

from __future__ import annotations

import itertools
from typing import Any

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.schedulers.dpm_solver import basis_and_eta
from fewstep.samplers.schedulers.options import LOWERING, lowering, uncorrected_of
from fewstep.samplers.solver import Multistep
from fewstep.samplers.solvers.deis import DEIS
from fewstep.samplers.solvers.dpm_solver import DPMSolver
from fewstep.samplers.solvers.ipndm import IPNDM
from fewstep.samplers.solvers.unipc import UniPC

BASE: dict[str, Any] = {
    "base": "DPMSolver", "solver_order": 2, "solver_type": None, "algorithm_type": "dpmsolver++", "predict_x0": True,
    "disable_corrector": None, **LOWERING,
}  # fmt: skip

_TYPES: dict[str, tuple[str, ...]] = {
    "DPMSolver": ("midpoint", "heun"), "UniPC": ("bh1", "bh2"), "DEIS": ("logrho", "rho", "t"), "IPNDM": (),
}  # fmt: skip
"""The solver types of every base."""


def base_solver(config: Any) -> Multistep:
    """The method that ``config.base`` names, with the options of :data:`BASE`.

    A solver_type of None, or of another base, is its default. ``algorithm_type="dpmsolver"`` says what ``predict_x0=False``
    does: the outputs are combined as noise.
    """
    if config.base not in _TYPES:
        raise FewstepError(unknown("base solver", config.base, _TYPES))
    if config.solver_type not in (None, *itertools.chain(*_TYPES.values())):
        raise FewstepError(unknown(f"solver_type of {config.base}", config.solver_type, _TYPES[config.base]))
    basis, eta = basis_and_eta(config)
    if eta:
        raise FewstepError(
            f"algorithm_type={config.algorithm_type!r} adds noise, and this method changes the steps of an ODE solver; "
            "use 'dpmsolver++' or 'dpmsolver'"
        )
    options = lowering(config)
    kind = config.solver_type if config.solver_type in _TYPES[config.base] else None
    basis = basis if config.predict_x0 else "noise"
    if config.base == "DPMSolver":
        return DPMSolver(**options, basis=basis, **({"solver_type": kind} if kind else {}))
    if config.base == "UniPC":
        corrected = {"disable_corrector": uncorrected_of(config), **({"solver_type": kind} if kind else {})}
        return UniPC(**options, basis=basis, **corrected)
    if config.base == "DEIS":
        return DEIS(**options, variable="lambda" if kind in (None, "logrho") else kind)
    return IPNDM(**options)
