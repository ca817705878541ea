"""Configs of the diffusers schedulers: of every compatible class, fresh, saved and loaded, and wrong."""

import diffusers
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError, GridError
from fewstep.samplers import Grid, NoiseSchedule
from fewstep.samplers.schedule import EDM
from fewstep.samplers.specs import make_scheduler, scheduler_names
from tests.scheduler_fixtures import FLOW, OURS, SD, run, scheduler


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("theirs", [*samplers.DDIMScheduler._compatibles])
def test_from_config_of_every_compatible_scheduler(net, noise, ours, theirs):
    cls = getattr(diffusers, theirs)
    try:
        config = cls().config
    except ImportError as error:  # a scheduler of diffusers that needs a package which is not installed
        pytest.skip(str(error))
    s = scheduler(ours, config, solver_order=2) if ours != "DDIM" else scheduler(ours, config)
    s.set_timesteps(6)
    x = run(s, net, noise * s.init_noise_sigma)
    assert x.isfinite().all()
    assert s.schedule.prediction in ("epsilon", "flow_prediction", "edm")
    again = type(s).from_config(s.config)
    again.set_timesteps(6)
    assert torch.equal(again.timesteps, s.timesteps)
    assert {k: v for k, v in again.config.items() if k != "_use_default_values"} == {
        k: v for k, v in s.config.items() if k != "_use_default_values"
    }


@pytest.mark.parametrize("ours", ["DDIM", "DPMSolver"])
@pytest.mark.parametrize("theirs", [*samplers.DDIMScheduler._compatibles, "LCMScheduler", "CogVideoXDDIMScheduler"])
def test_the_process_of_a_fresh_config_is_kept(ours, theirs):
    """diffusers replaces what a config was not given by the default of the class that reads it, which may be another."""
    try:
        other = getattr(diffusers, theirs)()
    except ImportError as error:
        pytest.skip(str(error))
    s = scheduler(ours, other.config)
    assert s.schedule.identity() == NoiseSchedule.from_config(other.config).identity()
    assert scheduler(ours, s.config).schedule.identity() == s.schedule.identity()
    if hasattr(other, "alphas_cumprod"):
        # theirs is a product of 1000 factors rounded to float32: half an ulp, 6e-8, each
        assert torch.allclose(s.alphas_cumprod, torch.as_tensor(other.alphas_cumprod).float(), rtol=1000 * 6e-8)
    assert isinstance(s.schedule, EDM) == theirs.startswith("EDM")


@pytest.mark.parametrize("name", scheduler_names())
def test_a_scheduler_is_made_from_a_saved_config_of_another_class(name, tmp_path):
    theirs = diffusers.DDIMScheduler(**SD, timestep_spacing="trailing")
    if name == "Flow":
        theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    options = {"process": "mean_reverting"} if name == "MeanReverting" else {}
    theirs.save_pretrained(tmp_path)
    s = make_scheduler(name, {**type(theirs).load_config(tmp_path), **options})
    if name == "MeanReverting":
        s.set_constant(torch.zeros(1))  # it binds its plan to the mean
    s.set_timesteps(6)
    assert len(s.timesteps) == 6


def test_the_sigmas_of_a_saved_edm_config_are_kept(tmp_path):
    for kind, grid in (("karras", Grid.karras), ("exponential", Grid.exponential)):
        diffusers.EDMDPMSolverMultistepScheduler(sigma_schedule=kind).save_pretrained(tmp_path)
        s = scheduler("DPMSolver", diffusers.EDMDPMSolverMultistepScheduler.load_config(tmp_path))
        s.save_pretrained(tmp_path)
        for again in (s, samplers.DPMSolverScheduler.from_pretrained(tmp_path)):
            again.set_timesteps(9)
            assert torch.equal(again.grid.lam, grid(EDM(), 9).lam)


def test_a_saved_flow_whose_noise_falls_is_refused(tmp_path):
    diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True).save_pretrained(tmp_path)
    config = diffusers.FlowMatchEulerDiscreteScheduler.load_config(tmp_path)
    with pytest.raises(FewstepError, match="invert_sigmas"):
        scheduler("DPMSolver", config)


def test_the_noise_basis_starts_at_pure_noise_in_the_data_basis(net, noise):
    for name, options in (
        ("DEIS", {"solver_order": 3}),
        ("DEIS", {"solver_type": "rho"}),
        ("UniPC", {"predict_x0": False}),
    ):
        s = scheduler(name, FLOW, **options)
        s.set_timesteps(6)
        assert s.plan.basis == ("data", *["noise"] * 5)
        assert not s.plan.problems()
        assert run(s, net, noise).isfinite().all()


def test_eps_prediction_says_nothing_at_zero_terminal_snr(net, noise):
    config = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(FewstepError, match="must predict v or x0"):
        scheduler("DPMSolver", config).set_timesteps(5)
    for name in OURS:
        s = scheduler(name, {**config, "prediction_type": "v_prediction"})
        assert run(s, net, noise, 5).isfinite().all()


def test_options_survive_saving_and_json(tmp_path):
    s = scheduler("UniPC", solver_order=3, grid="karras", disable_corrector=[0])
    s.save_pretrained(tmp_path)
    again = samplers.UniPCScheduler.from_pretrained(tmp_path)
    s.set_timesteps(7)
    again.set_timesteps(7)
    assert again.plan.digest == s.plan.digest
    theirs = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path)
    assert theirs.config.solver_order == 3
    assert theirs.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize("name", OURS)
def test_unknown_keys_and_values_are_named(name):
    with pytest.raises(FewstepError, match="solver_ordr"):
        scheduler(name, solver_ordr=2)
    with pytest.raises(FewstepError, match="did you mean 'scaled_linear'"):
        scheduler(name, {"beta_schedule": "scaled_liner"})
    with pytest.raises(FewstepError, match="prediction_type 'eps'"):
        scheduler(name, prediction_type="eps")
    with pytest.raises(GridError, match="did you mean 'karras'"):
        scheduler(name, grid="karas").set_timesteps(5)
    for steps in (0, -3, 2.5, True):
        with pytest.raises(GridError, match="positive integer"):
            scheduler(name).set_timesteps(steps)
    with pytest.raises(GridError, match="needs num_inference_steps"):
        scheduler(name).set_timesteps()


def test_wrong_solver_options_are_named():
    for options, match in (
        ({"solver_order": 4}, "orders 1 to 3"),
        ({"algorithm_type": "dpm"}, "algorithm_type 'dpm'"),
        ({"algorithm_type": "sde-dpmsolver"}, "sde-dpmsolver\\+\\+"),
        ({"solver_type": "mid"}, "solver_type 'mid'"),
        ({"third_order": "published"}, "did you mean 'as_published'"),
    ):
        with pytest.raises(FewstepError, match=match):
            scheduler("DPMSolver", **options).set_timesteps(5)
    with pytest.raises(FewstepError, match="final_sigmas_type"):
        scheduler("UniPC", final_sigmas_type="none")
