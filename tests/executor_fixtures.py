"""What tests of the executor share: a schedule for every prediction, data, and a stochastic solver."""

from fewstep.samplers import DPMSolver
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import SCHEDULES

BY_PREDICTION = {SCHEDULES[name].prediction: SCHEDULES[name] for name in ("vp", "vp-x0", "vp-v", "flow", "edm")}
MIXTURE = GaussianMixture.random(3, 4, seed=0)
SDE = DPMSolver(order=2, eta=1.0)
