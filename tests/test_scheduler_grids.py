"""Where the steps of the diffusers schedulers lie: rules by diffusers' names, given times and noise levels, saved grids."""

import diffusers
import numpy as np
import pytest
import torch

from fewstep import samplers
from fewstep.errors import ArtifactError, FewstepError, GridError
from fewstep.samplers import Grid, NoiseSchedule
from tests.scheduler_fixtures import FLOW, OURS, SD, run, scheduler
from tests.tensor_fixtures import relative


# -- diffusers' rules -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_spacings_equal_diffusers(net, noise, spacing):
    for steps in (7, 20):
        config = {**SD, "timestep_spacing": spacing, "steps_offset": 1}
        theirs, ours = diffusers.DPMSolverMultistepScheduler(**config), samplers.DPMSolverScheduler(**config)
        a, b = run(ours, net, noise, steps), run(theirs, net, noise, steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_flow_grids_by_rule_equal_diffusers(flag):
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **{flag: True})
    ours = samplers.DDIMScheduler.from_config(euler.config)
    euler.set_timesteps(7)
    ours.set_timesteps(7)
    assert torch.allclose(ours.sigmas, euler.sigmas, rtol=1e-5)


@pytest.mark.parametrize(
    ("flag", "grid"),
    [
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "exponential"),
        ("use_beta_sigmas", "beta"),
        ("use_lu_lambdas", "lu"),
    ],
)
def test_diffusers_grid_flags_name_our_grids(flag, grid):
    theirs = diffusers.DPMSolverMultistepScheduler(**SD, **{flag: True})
    a, b = scheduler("DPMSolver", theirs.config), scheduler("DPMSolver", grid=grid)
    a.set_timesteps(9)
    b.set_timesteps(9)
    theirs.set_timesteps(9)
    assert torch.equal(a.sigmas, b.sigmas)
    assert torch.allclose(a.sigmas, theirs.sigmas, rtol=1e-4)  # from float32 alphas_cumprod
    # diffusers rounds these times; ours are where the noise level is
    assert (a.timesteps - theirs.timesteps).abs().max() <= 1


def test_dynamic_shift_needs_and_uses_mu():
    euler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = samplers.UniPCScheduler.from_config(euler.config)
    sigmas = np.linspace(1, 1 / 5, 5).tolist()
    euler.set_timesteps(sigmas=sigmas, mu=0.9)
    ours.set_timesteps(sigmas=sigmas, mu=0.9)
    assert torch.allclose(ours.sigmas, euler.sigmas, atol=1e-6)
    with pytest.raises(FewstepError, match="mu"):
        ours.set_timesteps(6)
    with pytest.raises(FewstepError, match="flow"):
        scheduler("DPMSolver").set_timesteps(5, mu=1.0)
    before = dict(ours.config)
    ours.set_timesteps(5, mu=1.2)
    assert dict(ours.config) == before


# -- given ones -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OURS)
def test_timesteps_and_sigmas_are_taken_literally(name):
    s = scheduler(name, {**SD, "use_karras_sigmas": True})
    s.set_timesteps(timesteps=[900, 500.5, 100])
    assert s.timesteps.tolist() == [900, 500.5, 100]
    s.set_timesteps(sigmas=[10.0, 2.0, 0.5])
    assert torch.allclose(s.sigmas[:3], torch.tensor([10.0, 2.0, 0.5]))
    s.set_timesteps(sigmas=[10.0, 2.0, 0.5, 0.0])
    assert len(s.timesteps) == 3
    assert s.sigmas[-1] == 0
    s.set_timesteps(sigmas=torch.tensor([10.0, 2.0]), timesteps=[800, 300])
    assert s.timesteps.tolist() == [800, 300]


def test_a_users_flow_grid_is_never_shifted():
    s = scheduler("DPMSolver", FLOW)
    s.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    assert torch.allclose(s.sigmas, torch.tensor([1.0, 0.7, 0.2, 0.0]))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"timesteps": [900, 900, 100]}, "repeats at index 1"),
        ({"timesteps": [100, 500]}, "increases at index 1"),
        ({"timesteps": [1200, 500]}, "index 0 is 1200"),
        ({"sigmas": [5.0, float("nan")]}, "index 1"),
        ({"sigmas": [5.0, 6.0]}, "increases at index 1"),
        ({"sigmas": [-1.0]}, "index 0 is -1"),
        ({"sigmas": []}, "at least one"),
        ({"sigmas": [5.0, 1.0], "num_inference_steps": 7}, "contradicts"),
    ],
)
def test_bad_grids_are_named(given, match):
    s = scheduler("DPMSolver")
    with pytest.raises(GridError, match=match):
        s.set_timesteps(**given)


def test_a_failed_set_timesteps_keeps_the_old_plan(net, noise):
    s = scheduler("DPMSolver")
    s.set_timesteps(4)
    before = run(s, net, noise)
    with pytest.raises(GridError):
        s.set_timesteps(timesteps=[1, 2])
    assert torch.equal(run(s, net, noise), before)


def test_a_saved_grid_and_a_grid_object(tmp_path, net, noise):
    schedule = NoiseSchedule.from_config(SD)
    grid = Grid.uniform_lambda(schedule, 6)
    grid.save(tmp_path / "grid.json")
    a = run(scheduler("UniPC", grid=str(tmp_path / "grid.json")), net, noise, 6)
    b = run(scheduler("UniPC"), net, noise, sigmas=grid)
    assert torch.equal(a, b)
    with pytest.raises(GridError, match="6 steps"):
        scheduler("UniPC", grid=str(tmp_path / "grid.json")).set_timesteps(5)
    with pytest.raises(ArtifactError, match="does not exist"):
        scheduler("UniPC", grid=str(tmp_path / "none.json")).set_timesteps(5)
    with pytest.raises(ArtifactError, match="made for the schedule"):
        scheduler("UniPC", FLOW, grid=str(tmp_path / "grid.json")).set_timesteps(6)
