"""What there is: one entry a builder, from which the table of docs/samplers.md and the tests over all builders are made.

A new builder is one entry of :data:`CAPABILITIES`; orders and bases are read off its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from fewstep.samplers.lagrange import Basis
from fewstep.samplers.schedule import Family
from fewstep.samplers.solver import Solver
from fewstep.samplers.solvers.accelerated import AcceleratedDDIM, AcceleratedDDPM
from fewstep.samplers.solvers.dc_solver import DCSolver
from fewstep.samplers.solvers.ddim import DDIM
from fewstep.samplers.solvers.deis import DEIS
from fewstep.samplers.solvers.dpm_solver import DPMSolver, DPMSolverSDE, DPMSolverSinglestep
from fewstep.samplers.solvers.ems import EMS, ModelStatistics
from fewstep.samplers.solvers.flow import FlowSolver, FlowTurbo
from fewstep.samplers.solvers.ghvb import GHVB
from fewstep.samplers.solvers.ipndm import IPNDM
from fewstep.samplers.solvers.lms import LMS
from fewstep.samplers.solvers.mean_reverting import MeanReverting, ResShift
from fewstep.samplers.solvers.momentum import HeavyBall
from fewstep.samplers.solvers.neural_solver import NeuralSolver
from fewstep.samplers.solvers.restart import Restart, RestartInterval
from fewstep.samplers.solvers.runge_kutta import TABLEAUS, RungeKutta
from fewstep.samplers.solvers.sa_solver import SASolver
from fewstep.samplers.solvers.unipc import UniPC
from fewstep.samplers.solvers.usf import USF, Decision

ALL: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Capability:
    """One builder of plans."""

    solver: type[Solver]
    paper: str
    """arXiv ids, or where it was published."""
    variants: tuple[Solver, ...]
    """Instances that between them reach every row that the builder can write; the tests over all builders run these."""
    families: tuple[Family, ...] = ALL
    scheduler: str = ""
    """The diffusers scheduler over it; empty where there is none."""
    noise: str = ""
    """The option that makes it stochastic; empty for a deterministic method."""
    calls: str = "1"
    """Network calls from one state that is kept to the next."""
    steps: tuple[int, ...] = ()
    """The numbers of network calls that it can be compiled for in all its families; empty where there is no such limit."""

    @property
    def name(self) -> str:
        return self.solver.__name__

    @property
    def orders(self) -> tuple[int, ...]:
        """Orders of convergence, over all options."""
        return tuple(sorted({v.convergence_order for v in self.variants}))

    @property
    def bases(self) -> tuple[Basis, ...]:
        """The converted outputs that its rows can combine."""
        bases: tuple[Basis, ...] = self.solver.bases
        return bases


CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        DDIM, "2010.02502", (DDIM(), DDIM(eta=0.5), DDIM(eta=1.0)), scheduler="DDIMScheduler", noise="`eta`",
    ),
    Capability(
        DPMSolver, "2206.00927, 2211.01095",
        (
            *(
                DPMSolver(order=p, solver_type=k, basis=b)
                for p in (1, 2) for k in ("midpoint", "heun") for b in ("data", "noise")
            ),
            *(DPMSolver(order=3, third_order=k, eta=e) for k in ("exact", "as_published") for e in (0.0, 1.0)),
            DPMSolver(order=3, basis="noise"), DPMSolver(order=3, third_order="diffusers_sde", eta=1.0),
        ),
        scheduler="DPMSolverScheduler", noise="`eta`",
    ),
    Capability(
        DPMSolverSinglestep, "2206.00927, 2211.01095",
        (
            *(
                DPMSolverSinglestep(order=p, solver_type=k, basis=b, placing=at)
                for p in (1, 2, 3) for k in ("midpoint", "heun") for b in ("data", "noise") for at in ("lambda", "grid")
            ),
            DPMSolverSinglestep(order=3, second_stage="midpoint"), DPMSolverSinglestep(order=3, eta=0.5, solver_type="heun"),
            DPMSolverSinglestep(order=2, r1=0.3, lower_order_final=False),
        ),
        scheduler="DPMSolverSinglestepScheduler", noise="`eta`", calls="1 to 3",
    ),
    Capability(
        DPMSolverSDE, "2211.01095", (DPMSolverSDE(), DPMSolverSDE(solver_type="heun", eta=0.5)),
        scheduler="DPMSolverSinglestepScheduler", noise="always", calls="2",
    ),
    Capability(
        DEIS, "2204.13902",
        tuple(DEIS(order=p, variable=k) for p in (1, 2, 3, 4) for k in ("lambda", "rho", "t")),
        scheduler="DEISScheduler",
    ),
    Capability(
        IPNDM, "2204.13902",
        (
            *(IPNDM(order=p, weights=k) for p in (1, 2, 3) for k in ("equal", "variable", "diff_sampler")),
            IPNDM(), IPNDM(weights="variable"),
        ),
        scheduler="IPNDMScheduler",
    ),
    Capability(LMS, "k-diffusion", tuple(LMS(order=p) for p in (1, 2, 3, 4)), scheduler="LMSScheduler"),
    Capability(
        RungeKutta, "2204.13902, 2206.00364", tuple(map(RungeKutta, TABLEAUS)),
        scheduler="RungeKuttaScheduler", calls="1 to 4",
    ),
    Capability(
        UniPC, "2302.04867",
        tuple(UniPC(order=p, solver_type=k, basis=b) for p in (1, 2, 3, 4) for k in ("bh1", "bh2") for b in ("data", "noise")),
        scheduler="UniPCScheduler",
    ),
    Capability(
        SASolver, "2309.05019",
        (
            *(SASolver(order=p, corrector_order=c, tau=tau) for p, c in ((1, 1), (2, 2), (3, 4), (4, 0)) for tau in (0.0, 1.0)),
            SASolver(order=2, corrector_order=3, simplified=True, low=0.1, high=2.0),
        ),
        scheduler="SASolverScheduler", noise="`tau`",
    ),
    Capability(
        FlowSolver, "2505.21114 (baseline)",
        tuple(FlowSolver(order=p, weights=k) for p in (1, 2, 3, 4) for k in ("variable", "equal")),
        families=("flow",), scheduler="FlowScheduler",
    ),
    Capability(
        FlowTurbo, "2409.18128", (FlowTurbo(),), families=("flow",), scheduler="FlowScheduler", calls="1, Heun steps 2",
    ),
    Capability(
        NeuralSolver, "2505.21114", (NeuralSolver(),), families=("vp", "flow"), steps=(5, 6, 7, 8, 9, 10),
    ),
    Capability(
        Restart, "2306.14878",
        (
            Restart(DPMSolver(order=2), (RestartInterval(3, 2, 0.1, 0.5), RestartInterval(2, 1, 0.3, 0.8))),
            Restart(DPMSolver(order=2, basis="noise"), (RestartInterval(2, 1, 0.2, 0.6),), "time"),
        ),
        scheduler="RestartScheduler", noise="always", calls="1, and those of the restarts",
    ),
    Capability(
        MeanReverting, "2502.07856",
        (
            MeanReverting(DPMSolver(order=2)), MeanReverting(DPMSolver(order=2, eta=1.0)),
            MeanReverting(DPMSolver(order=3, basis="noise")),
        ),
        families=(), scheduler="MeanRevertingScheduler", noise="the solver's",
    ),
    Capability(ResShift, "2307.12348", (ResShift(),), scheduler="MeanRevertingScheduler", noise="always"),
    Capability(
        HeavyBall, "2307.11118",
        (
            *(HeavyBall(DPMSolver(order=2), beta=b, nesterov=k) for b in (0.3, 1.0) for k in (False, True)),
            HeavyBall(UniPC(order=3)), HeavyBall(DEIS(order=4, variable="rho")),
        ),
        scheduler="HeavyBallScheduler",
    ),
    Capability(
        GHVB, "2307.11118",
        (
            *(GHVB(order=p, weights=k) for p in (1, 2, 3, 4) for k in ("variable", "equal")),
            GHVB(order=3, basis="data", variable="lambda"), GHVB(order=3, variable="lambda", beta=0.5),
        ),
        scheduler="GHVBScheduler",
    ),
    Capability(
        DCSolver, "2409.03755",
        (DCSolver(), DCSolver(UniPC(order=3, basis="noise"), (1.05,) * 60), DCSolver(DPMSolver(), (0.9,) * 60, 1)),
        scheduler="DCSolverScheduler",
    ),
    Capability(
        EMS, "2310.13268",
        (
            *(EMS(order=p, corrector=k) for p in (1, 2, 3) for k in ("pseudo", "exact", "none")),
            EMS(order=3, statistics=ModelStatistics.constant(0.7, -0.2, 0.1), predictor_pseudo=True),
        ),
        scheduler="EMSScheduler",
    ),
    Capability(
        USF, "2312.07243",
        (
            *(USF((Decision(order=p, corrector=c),)) for p in (1, 2, 3) for c in (False, True)),
            USF(tuple(
                Decision(
                    1 + i % 3, basis=("data", "noise")[i % 2], variable=("lambda", "rho")[i % 4 == 3], corrector=i % 5 < 2,
                    start=int(i % 7 == 6),
                )
                for i in range(60)
            )),
        ),
        scheduler="USFScheduler",
    ),
    Capability(AcceleratedDDIM, "2403.03852", (AcceleratedDDIM(),), families=("vp",), calls="2"),
    Capability(AcceleratedDDPM, "2403.03852", (AcceleratedDDPM(),), families=("vp",), noise="always"),
)  # fmt: skip
"""Every builder, in the order of the table."""


def _span(numbers: tuple[int, ...]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def table() -> str:
    """:data:`CAPABILITIES` as a Markdown table; docs/samplers.md holds it, and a test compares the two."""
    rows = [
        "| builder | order | bases | families | noise | calls a step | scheduler | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for c in CAPABILITIES:
        families = "all" if set(c.families) == set(ALL) else ", ".join(c.families) or "mean-reverting"
        scheduler = f"`{c.scheduler}`" if c.scheduler else "`PlanScheduler`"
        cells = (f"`{c.name}`", _span(c.orders), ", ".join(c.bases), families, c.noise, c.calls, scheduler, c.paper)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
