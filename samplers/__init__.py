"""Samplers: noise schedules, grids, solver plans and their builders, the executor, and diffusers schedulers over them."""

assert __name__.startswith("fewstep."), "import fewstep.samplers instead"

from fewstep.samplers.ddim import DDIM as DDIM
from fewstep.samplers.deis import DEIS as DEIS
from fewstep.samplers.dpm_solver import DPMSolver as DPMSolver
from fewstep.samplers.executor import Executor as Executor
from fewstep.samplers.executor import Run as Run
from fewstep.samplers.executor import sample as sample
from fewstep.samplers.grid import Grid as Grid
from fewstep.samplers.lagrange import lagrange_row as lagrange_row
from fewstep.samplers.plan import SolverPlan as SolverPlan
from fewstep.samplers.schedule import NoiseSchedule as NoiseSchedule
from fewstep.samplers.unipc import UniPC as UniPC
