"""Who competes: every ODE scheduler of diffusers with its options, and ours, as specs with the moves from one to the next.

Left out are samplers with noise, whose end no reference trajectory predicts (DDPM, the ancestral ones, SASolver), distilled
models' schedulers (LCM, TCD) and those of other processes (EDM's, diffusers' IPNDMScheduler).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from subjects import AS_FLOW, Mixture, Subject

from fewstep.eval.drawing.scheduling import scheduler_for
from fewstep.samplers import (
    AcceleratedDDIM,
    Grid,
    NeuralSolver,
    NoiseSchedule,
    PlanScheduler,
    SolverPlan,
    analytic_first_step,
    averaged_time_shift,
    parse_spec,
)

Options = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One side of the comparison."""

    solvers: tuple[str, ...]
    grids: dict[str, Options]
    """Names of grids and the options that ask for them."""
    first: tuple[str, ...]
    """The grids that every solver is tried on; the others come as moves."""
    options: tuple[Options, ...]
    """What else can be changed in a scheduler that has such a key."""
    known: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Solvers that are the usual choice, and grids that they are used on."""

    def start(self) -> list[str]:
        return distinct(made(spec, self.grids[grid]) for spec in self.solvers for grid in self.first)

    def usual(self) -> list[str]:
        solvers, grids = self.known
        return distinct(made(spec, self.grids[grid]) for spec in solvers for grid in grids)

    def moves(self, spec: str) -> Iterator[str | None]:
        """``spec`` on every other grid, and with every other option; None where it has no such key."""
        bare = without(spec, {key for grid in self.grids.values() for key in grid})
        for grid in self.grids.values():
            yield made(bare, grid)
        for change in self.options:
            yield made(spec, change)


def made(spec: str, options: Options) -> str | None:
    """``spec`` with ``options`` over its own; None where its class has no such keys."""
    prefix, spec = _prefixed(spec)
    parsed = parse_spec(spec)
    try:
        return prefix + str(
            parse_spec(str(replace(parsed, options=tuple({**dict(parsed.options), **options}.items()))))
        )
    except ValueError:
        return None


def without(spec: str, keys: set[str]) -> str:
    prefix, spec = _prefixed(spec)
    parsed = parse_spec(spec)
    return prefix + str(replace(parsed, options=tuple((k, v) for k, v in parsed.options if k not in keys)))


def distinct(specs: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(spec for spec in specs if spec is not None))


# -- diffusers ---------------------------------------------------------------------------------------------------------
_THEIR_GRIDS: dict[str, Options] = {
    **{spacing: {"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")},
    **{name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")},
    "lu": {"use_lu_lambdas": True},
}
_THEIR_OPTIONS: tuple[Options, ...] = (
    {"solver_type": "heun"}, {"solver_type": "bh1"}, {"algorithm_type": "dpmsolver"}, {"predict_x0": False},
    {"final_sigmas_type": "sigma_min"}, {"euler_at_final": True}, {"lower_order_final": False}, {"lower_order_final": True},
    {"disable_corrector": [0]}, {"disable_corrector": [0, 1]}, {"set_alpha_to_one": False}, {"interpolation_type": "log_linear"},
)  # fmt: skip
_MULTISTEP = (
    *(
        f"diffusers:{name}MultistepScheduler(solver_order={p})"
        for name in ("DPMSolver", "UniPC", "DEIS")
        for p in (2, 3)
    ),
    "diffusers:UniPCMultistepScheduler(solver_order=4)",
)
THEIRS = Side(
    solvers=(
        "diffusers:DDIMScheduler(clip_sample=False)", "diffusers:EulerDiscreteScheduler",
        "diffusers:HeunDiscreteScheduler(clip_sample=False)", "diffusers:KDPM2DiscreteScheduler",
        "diffusers:LMSDiscreteScheduler", "diffusers:PNDMScheduler(skip_prk_steps=True)", *_MULTISTEP,
        *(f"diffusers:DPMSolverSinglestepScheduler(solver_order={p})" for p in (2, 3)),
    ),
    grids=_THEIR_GRIDS, first=tuple(_THEIR_GRIDS), options=_THEIR_OPTIONS,
    known=(_MULTISTEP[:6], ("linspace", "trailing", "karras", "exponential")),
)  # fmt: skip
_SHIFTS: dict[str, Options] = {f"flow_shift {s:g}": {"flow_shift": s} for s in (0.5, 1.0, 1.5, 2.0, 3.0)}
THEIRS_FLOW = Side(
    solvers=(
        "diffusers:FlowMatchEulerDiscreteScheduler", "diffusers:FlowMatchHeunDiscreteScheduler",
        *(f"{spec[:-1]}, {AS_FLOW})" for spec in _MULTISTEP),
        *(f"diffusers:DPMSolverSinglestepScheduler(solver_order={p}, {AS_FLOW})" for p in (2, 3)),
    ),
    grids={
        **_SHIFTS,
        **{f"shift {s:g}": {"shift": s} for s in (0.5, 1.0, 1.5, 2.0, 3.0)},
        # of these use_flow_sigmas has precedence in some schedulers and is overruled in others
        **{name: _THEIR_GRIDS[name] for name in ("karras", "exponential", "beta")},
    },
    first=(*_SHIFTS, "shift 1", "shift 2", "karras", "exponential", "beta"),
    options=_THEIR_OPTIONS,
    known=(
        (
            "diffusers:FlowMatchEulerDiscreteScheduler", "diffusers:FlowMatchHeunDiscreteScheduler",
            *(f"{spec[:-1]}, {AS_FLOW})" for spec in _MULTISTEP[:6]),
        ),
        ("flow_shift 0.5", "flow_shift 1", "flow_shift 1.5", "shift 1", "shift 2"),
    ),
)  # fmt: skip

# -- ours --------------------------------------------------------------------------------------------------------------
_LOW = (0.05, 0.1, 0.2, 0.3)
_OUR_GRIDS: dict[str, Options] = {
    name: {"grid": name}
    for name in (
        "linspace", "leading", "trailing", "beta", "beta(a=1, b=1)", "uniform_lambda", "exponential",
        *(f"exponential(low={low})" for low in _LOW), "karras", *(f"karras(low={low})" for low in _LOW),
        *(f"karras(rho={rho})" for rho in (2, 3, 5, 10)), *(f"karras(rho={rho}, low={low})" for rho in (3, 5) for low in _LOW),
        "beta(low=0.1)", "ays",
    )
}  # fmt: skip
_USF = (
    "USF(decisions=[{'order': 2, 'corrector': True}])",
    "USF(decisions=[{'order': 3, 'corrector': True, 'relaxation': 'bh2'}])",
    "USF(decisions=[{'order': 2, 'nodes': [0, 1, 2]}])",
    "USF(decisions=[{'order': 2, 'derivative_scale': 0.2}])",
    "USF(decisions=[{'order': 2, 'derivative_scale': -0.1, 'corrector': True}])",
)
_OURS = (
    "DDIM", *(f"DPMSolver(solver_order={p})" for p in (2, 3)), *(f"UniPC(solver_order={p})" for p in (2, 3, 4)),
    *(f"DEIS(solver_order={p}, final_sigmas_type='zero')" for p in (2, 3)),
    *(f"DEIS(solver_order=3, solver_type='{k}', final_sigmas_type='zero')" for k in ("rho", "t")),
    *(f"IPNDM(solver_order={p}, weights='equal')" for p in (2, 3, 4)), "IPNDM", "LMS",
    "GHVB(solver_order=2.8)", "GHVB(solver_order=3.9)",
    "GHVB(solver_order=2, beta=0.9, variable='lambda', predict_x0=True)", "HeavyBall(beta=0.9)", "HeavyBall(beta=1.1)",
    "EMS(final_sigmas_type='zero')", "EMS(solver_order=3, corrector='exact', final_sigmas_type='zero')",
    "EMS(solver_order=3, statistics=[0.9, -0.1, 0.0], final_sigmas_type='zero')", "LML(lml_damping=10.0)", *_USF,
    "DPMSolverSinglestep(solver_order=2)", "DPMSolverSinglestep(solver_order=3)", "RungeKutta",
)  # fmt: skip
_OUR_OPTIONS: tuple[Options, ...] = (
    *_THEIR_OPTIONS[:8], {"disable_corrector": []}, {"disable_corrector": [0]}, {"disable_corrector": [0, 1]},
    *({"solver_order": p} for p in (2, 3, 4)), {"corrector": "exact"}, {"nesterov": True},
    *({"beta": beta} for beta in (0.8, 0.95, 1.05)), {"statistics": [0.95, 0.0, 0.0]},
    *({"statistics": [1.0, s, 0.0]} for s in (0.1, -0.1, -0.2)), {"placing": "lambda"},
)  # fmt: skip
_USUAL = (
    "DPMSolver(solver_order=2)", "DPMSolver(solver_order=3)", "UniPC(solver_order=2)", "UniPC(solver_order=3)", "IPNDM",
    "IPNDM(solver_order=3, weights='equal')", "DEIS(solver_order=3, solver_type='t', final_sigmas_type='zero')",
)  # fmt: skip
OURS = Side(
    _OURS, _OUR_GRIDS, ("trailing", "karras", "exponential", "exponential(low=0.1)", "karras(rho=3)"), _OUR_OPTIONS,
    known=(_USUAL, ("linspace", "trailing", "exponential(low=0.1)")),
)  # fmt: skip
OURS_FLOW = Side(
    solvers=(
        *_OURS, *(f"Flow(solver_order={p})" for p in (2, 3, 4)), "Flow(method='adams_equal', solver_order=2)",
        "Flow(method='flowturbo')",
    ),
    grids={
        **{f"trailing, {name}": {"grid": "trailing", **shift} for name, shift in _SHIFTS.items()},
        **{f"linspace, {name}": {"grid": "linspace", **shift} for name, shift in _SHIFTS.items()},
        **{
            name: {"grid": name}
            for name in (
                "beta", "karras", "uniform_lambda",
                *(f"karras(rho={rho}, low={low})" for rho in (1, 2, 3) for low in (0.02, 0.05, 0.1)),
                "beta(low=0.05)", "beta(a=1, b=1, low=0.05)", "beta(a=0.8, b=0.8, low=0.05)", "beta(a=0.8, b=0.8)",
            )
        },
    },
    first=("trailing, flow_shift 1", "trailing, flow_shift 2", "beta", "karras(rho=2, low=0.05)"),
    options=_OUR_OPTIONS,
    known=(
        (
            *_USUAL[:6], "EMS(final_sigmas_type='zero')", *(f"Flow(solver_order={p})" for p in (2, 3, 4)),
            "Flow(method='flowturbo')",
        ),
        ("beta", "beta(a=0.8, b=0.8)"),
    ),
)  # fmt: skip

_SAME = {
    "DDIMScheduler": "DDIM", "DPMSolverMultistepScheduler": "DPMSolver", "DPMSolverSinglestepScheduler": "DPMSolverSinglestep",
    "UniPCMultistepScheduler": "UniPC", "DEISMultistepScheduler": "DEIS", "LMSDiscreteScheduler": "LMS",
}  # fmt: skip
"""Classes of diffusers that one of ours stands in for, option by option."""
_AS_THEIRS: dict[str, Options] = {
    "DPMSolver": {"third_order": "as_published"}, "UniPC": {"disable_corrector": []}, "DEIS": {"final_sigmas_type": "zero"},
}  # fmt: skip
"""What diffusers does where ours has another default."""


def translated(spec: str) -> list[str]:
    """Our schedulers of the same method with the same options, by our defaults and by diffusers'."""
    parsed = parse_spec(spec)
    name = _SAME.get(parsed.name)
    if name is None:
        return []
    options = {
        key: value for key, value in parsed.options if key not in ("clip_sample", "use_flow_sigmas", "prediction_type")
    }
    return distinct([made(name, options), made(name, _AS_THEIRS.get(name, {}) | options)])


_PREFIXES = ("free:", "shifted:")
"""Changes of a scheduler's plan: the first output assumed in place of one call, and the network told shifted times."""


def extras(steps: int, best: Iterable[str]) -> list[str]:
    """What has no scheduler of its own: NeuralSolver's tables, accelerated DDIM, and changes of the best plans so far."""
    return ["NeuralSolver", "AcceleratedDDIM", *(prefix + spec for spec in best for prefix in _PREFIXES)]


def prepared(spec: str, subject: Subject | Mixture, steps: int, which: list[int]) -> Any:
    """The scheduler of ``spec`` or of the plan that it stands for; ``which`` are the seeds that may be looked at."""
    prefix, bare = _prefixed(spec)
    schedule = NoiseSchedule.from_config(subject.config)
    if bare == "NeuralSolver":
        return _planned(NeuralSolver().compile(schedule, NeuralSolver.grid(schedule, steps)), subject)
    if bare == "AcceleratedDDIM":
        return _planned(
            AcceleratedDDIM().compile(schedule, Grid.named("trailing", schedule, (steps + 1) // 2)), subject
        )
    scheduler = scheduler_for(bare, subject.config)
    if not prefix:
        return scheduler
    scheduler.set_timesteps(steps + 1 if prefix == "free:" else steps)
    if prefix == "free:":
        return _planned(analytic_first_step(scheduler.plan), subject)
    rows = torch.tensor(which)
    shifted = averaged_time_shift(
        lambda x, t: subject.network(x, t, rows), subject.noise[rows], scheduler.plan, schedule, window=20, cutoff=300
    )
    return _planned(shifted, subject)


def _planned(plan: SolverPlan, subject: Subject | Mixture) -> Any:
    return PlanScheduler.from_plan(plan, subject.config)


def _prefixed(spec: str) -> tuple[str, str]:
    prefix = next((p for p in _PREFIXES if spec.startswith(p)), "")
    return prefix, spec.removeprefix(prefix)
