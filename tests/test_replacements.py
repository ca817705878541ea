"""What docs/samplers.md names instead of schedulers of diffusers that have no namesake here."""

import diffusers
import pytest
import torch

from fewstep import samplers
from tests.scheduler_fixtures import SD, run
from tests.tensor_fixtures import relative


@pytest.mark.parametrize("steps", [4, 9])
def test_kdpm2_is_dpm_solver_2_with_stages_halfway_in_lambda(net, noise, steps):
    theirs = diffusers.KDPM2DiscreteScheduler(**SD)
    theirs.set_timesteps(steps)
    # every step's sigma, the geometric mean with the next one, ..., the last step's, which is Euler's
    levels = torch.unique_consecutive(theirs.sigmas)[:-1].double()
    between = (levels[:-1] * levels[1:]).sqrt()
    sigmas = [*torch.stack([levels[:-1], between], 1).flatten().tolist(), float(levels[-1])]
    ours = samplers.DPMSolverSinglestepScheduler(**SD, algorithm_type="dpmsolver", placing="grid")
    start = noise * theirs.init_noise_sigma
    expected = run(theirs, net, start, steps)
    # theirs holds x0 + sigma eps, ours what the network sees
    made = run(
        ours, net, start / (1 + levels[0] ** 2).sqrt().float(), sigmas=sigmas, timesteps=theirs.timesteps.tolist()
    )
    assert relative(made, expected) < 1e-4  # theirs computes in float32
