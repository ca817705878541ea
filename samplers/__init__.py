"""Samplers: noise schedules, grids, solver plans and their builders, the executor, and diffusers schedulers over them.

The schedulers need diffusers and are imported on first use; all else needs torch only.
"""

from typing import TYPE_CHECKING

assert __name__.startswith("fewstep."), "import fewstep.samplers instead"

from fewstep.samplers.brownian import BrownianPath as BrownianPath
from fewstep.samplers.brownian import NoiseSource as NoiseSource
from fewstep.samplers.convert import DynamicThreshold as DynamicThreshold
from fewstep.samplers.executor import Executor as Executor
from fewstep.samplers.executor import Run as Run
from fewstep.samplers.executor import sample as sample
from fewstep.samplers.grid import Grid as Grid
from fewstep.samplers.lagrange import lagrange_row as lagrange_row
from fewstep.samplers.lml import LML as LML
from fewstep.samplers.masked import FirstHitting as FirstHitting
from fewstep.samplers.modifiers import analytic_first_step as analytic_first_step
from fewstep.samplers.modifiers import scaled_noise as scaled_noise
from fewstep.samplers.modifiers import to_zero as to_zero
from fewstep.samplers.parallel import ParallelResult as ParallelResult
from fewstep.samplers.parallel import sample_parallel as sample_parallel
from fewstep.samplers.plan import SolverPlan as SolverPlan
from fewstep.samplers.schedule import NoiseSchedule as NoiseSchedule
from fewstep.samplers.skip_tuning import remove_skip_tuning_ as remove_skip_tuning_
from fewstep.samplers.skip_tuning import skip_tuned as skip_tuned
from fewstep.samplers.skip_tuning import skip_tuning_ as skip_tuning_
from fewstep.samplers.solver import Solver as Solver
from fewstep.samplers.solvers.accelerated import AcceleratedDDIM as AcceleratedDDIM
from fewstep.samplers.solvers.accelerated import AcceleratedDDPM as AcceleratedDDPM
from fewstep.samplers.solvers.adaptive import Adaptive as Adaptive
from fewstep.samplers.solvers.adaptive import sample_adaptive as sample_adaptive
from fewstep.samplers.solvers.dc_solver import DCSolver as DCSolver
from fewstep.samplers.solvers.dc_solver import load_ratios as load_ratios
from fewstep.samplers.solvers.dc_solver import save_ratios as save_ratios
from fewstep.samplers.solvers.ddim import DDIM as DDIM
from fewstep.samplers.solvers.deis import DEIS as DEIS
from fewstep.samplers.solvers.dpm_solver import DPMSolver as DPMSolver
from fewstep.samplers.solvers.dpm_solver import DPMSolverSDE as DPMSolverSDE
from fewstep.samplers.solvers.dpm_solver import DPMSolverSinglestep as DPMSolverSinglestep
from fewstep.samplers.solvers.ems import EMS as EMS
from fewstep.samplers.solvers.ems import ModelStatistics as ModelStatistics
from fewstep.samplers.solvers.flow import FlowSolver as FlowSolver
from fewstep.samplers.solvers.flow import FlowTurbo as FlowTurbo
from fewstep.samplers.solvers.ghvb import GHVB as GHVB
from fewstep.samplers.solvers.ipndm import IPNDM as IPNDM
from fewstep.samplers.solvers.lms import LMS as LMS
from fewstep.samplers.solvers.mean_reverting import MeanReverting as MeanReverting
from fewstep.samplers.solvers.mean_reverting import ResShift as ResShift
from fewstep.samplers.solvers.momentum import HeavyBall as HeavyBall
from fewstep.samplers.solvers.neural_solver import NeuralSolver as NeuralSolver
from fewstep.samplers.solvers.restart import Restart as Restart
from fewstep.samplers.solvers.restart import RestartInterval as RestartInterval
from fewstep.samplers.solvers.runge_kutta import RungeKutta as RungeKutta
from fewstep.samplers.solvers.sa_solver import SASolver as SASolver
from fewstep.samplers.solvers.unipc import UniPC as UniPC
from fewstep.samplers.solvers.usf import USF as USF
from fewstep.samplers.solvers.usf import Decision as Decision
from fewstep.samplers.specs import make_scheduler as make_scheduler
from fewstep.samplers.specs import parse_spec as parse_spec
from fewstep.samplers.specs import scheduler_names as scheduler_names
from fewstep.samplers.stability import LinearMultistep as LinearMultistep
from fewstep.samplers.time_shift import TimeShift as TimeShift
from fewstep.samplers.time_shift import averaged_time_shift as averaged_time_shift

if TYPE_CHECKING:
    from fewstep.samplers.schedulers import DCSolverScheduler as DCSolverScheduler
    from fewstep.samplers.schedulers import DDIMScheduler as DDIMScheduler
    from fewstep.samplers.schedulers import DEISScheduler as DEISScheduler
    from fewstep.samplers.schedulers import DPMSolverScheduler as DPMSolverScheduler
    from fewstep.samplers.schedulers import DPMSolverSinglestepScheduler as DPMSolverSinglestepScheduler
    from fewstep.samplers.schedulers import EMSScheduler as EMSScheduler
    from fewstep.samplers.schedulers import FlowScheduler as FlowScheduler
    from fewstep.samplers.schedulers import GHVBScheduler as GHVBScheduler
    from fewstep.samplers.schedulers import HeavyBallScheduler as HeavyBallScheduler
    from fewstep.samplers.schedulers import IPNDMScheduler as IPNDMScheduler
    from fewstep.samplers.schedulers import LMLScheduler as LMLScheduler
    from fewstep.samplers.schedulers import LMSScheduler as LMSScheduler
    from fewstep.samplers.schedulers import MeanRevertingScheduler as MeanRevertingScheduler
    from fewstep.samplers.schedulers import PlanScheduler as PlanScheduler
    from fewstep.samplers.schedulers import RestartScheduler as RestartScheduler
    from fewstep.samplers.schedulers import RungeKuttaScheduler as RungeKuttaScheduler
    from fewstep.samplers.schedulers import SASolverScheduler as SASolverScheduler
    from fewstep.samplers.schedulers import UniPCScheduler as UniPCScheduler
    from fewstep.samplers.schedulers import USFScheduler as USFScheduler

_SCHEDULERS = (
    "DCSolverScheduler",
    "DDIMScheduler",
    "DEISScheduler",
    "DPMSolverScheduler",
    "DPMSolverSinglestepScheduler",
    "EMSScheduler",
    "FlowScheduler",
    "GHVBScheduler",
    "HeavyBallScheduler",
    "IPNDMScheduler",
    "LMLScheduler",
    "LMSScheduler",
    "MeanRevertingScheduler",
    "PlanScheduler",
    "RestartScheduler",
    "RungeKuttaScheduler",
    "SASolverScheduler",
    "USFScheduler",
    "UniPCScheduler",
)


def __getattr__(name: str) -> object:
    if name in _SCHEDULERS:
        from fewstep.samplers import schedulers

        return getattr(schedulers, name)
    if name == "learn":
        import importlib

        return importlib.import_module("fewstep.samplers.learn")
    raise AttributeError(f"module 'fewstep.samplers' has no attribute {name!r}; it has {', '.join(__dir__())}")


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if not name.startswith("_")), *_SCHEDULERS, "learn"})
