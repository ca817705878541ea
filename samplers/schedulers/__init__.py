"""The diffusers schedulers, one a method: its options under diffusers' names, and the solver that they describe."""

# diffusers looks the base class of a saved scheduler up where the scheduler is
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from fewstep.samplers.scheduler import SolverScheduler as SolverScheduler
from fewstep.samplers.schedulers.dc_solver import DCSolverScheduler as DCSolverScheduler
from fewstep.samplers.schedulers.ddim import DDIMScheduler as DDIMScheduler
from fewstep.samplers.schedulers.deis import DEISScheduler as DEISScheduler
from fewstep.samplers.schedulers.dpm_solver import DPMSolverScheduler as DPMSolverScheduler
from fewstep.samplers.schedulers.dpm_solver import DPMSolverSinglestepScheduler as DPMSolverSinglestepScheduler
from fewstep.samplers.schedulers.ems import EMSScheduler as EMSScheduler
from fewstep.samplers.schedulers.flow import FlowScheduler as FlowScheduler
from fewstep.samplers.schedulers.ipndm import IPNDMScheduler as IPNDMScheduler
from fewstep.samplers.schedulers.lml import LMLScheduler as LMLScheduler
from fewstep.samplers.schedulers.lms import LMSScheduler as LMSScheduler
from fewstep.samplers.schedulers.mean_reverting import MeanRevertingScheduler as MeanRevertingScheduler
from fewstep.samplers.schedulers.momentum import GHVBScheduler as GHVBScheduler
from fewstep.samplers.schedulers.momentum import HeavyBallScheduler as HeavyBallScheduler
from fewstep.samplers.schedulers.options import LOWERING as LOWERING
from fewstep.samplers.schedulers.plan import PlanScheduler as PlanScheduler
from fewstep.samplers.schedulers.restart import RestartScheduler as RestartScheduler
from fewstep.samplers.schedulers.runge_kutta import RungeKuttaScheduler as RungeKuttaScheduler
from fewstep.samplers.schedulers.sa_solver import SASolverScheduler as SASolverScheduler
from fewstep.samplers.schedulers.unipc import UniPCScheduler as UniPCScheduler
from fewstep.samplers.schedulers.usf import USFScheduler as USFScheduler
