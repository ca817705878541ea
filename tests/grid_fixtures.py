"""What tests of grids share: a schedule of every family, and the spacings of integer timesteps."""

from fewstep.samplers.schedule import EDM, ContinuousVP, Flow
from tests.solver_fixtures import SCHEDULES as OF_SOLVERS
from tests.solver_fixtures import VP as VP

ZERO_SNR = OF_SOLVERS["zero-snr"]
SPACINGS = ("linspace", "leading", "trailing")
SCHEDULES = {"vp": VP, "zero-snr": ZERO_SNR, "svd": ContinuousVP(), "edm": EDM(), "flow": Flow(shift=3.0)}
