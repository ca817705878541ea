"""The diffusers schedulers against diffusers' own, which computes coefficients in float32: its rounding through N <= 20 rows
stays below 1e-4."""

import diffusers
import numpy as np
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError
from tests.scheduler_fixtures import FLOW, SD, run, run_with_the_same_noise, scheduler
from tests.tensor_fixtures import relative


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [5, 10, 20])
def test_ddim_equals_diffusers(net, noise, prediction, steps):
    for extra in ({}, {"set_alpha_to_one": False, "steps_offset": 1}, {"timestep_spacing": "trailing"}):
        config = {**SD, "prediction_type": prediction, **extra}
        theirs = diffusers.DDIMScheduler(**config, clip_sample=False)
        ours = samplers.DDIMScheduler(**config)
        assert relative(run(ours, net, noise, steps), run(theirs, net, noise, steps)) < 1e-4
        assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_equals_diffusers(net, noise, prediction, algorithm, kind, order):
    final = "zero" if algorithm == "dpmsolver++" else "sigma_min"
    config = {
        **SD, "prediction_type": prediction, "algorithm_type": algorithm, "solver_type": kind, "solver_order": order,
        "final_sigmas_type": final,
    }  # fmt: skip
    for steps in (5, 20):
        theirs = run(diffusers.DPMSolverMultistepScheduler(**config), net, noise, steps)
        ours = run(samplers.DPMSolverScheduler(**config, third_order="as_published"), net, noise, steps)
        assert relative(ours, theirs) < 1e-4


def test_the_exact_third_order_differs_from_the_published_one(net, noise):
    exact = run(scheduler("DPMSolver", solver_order=3), net, noise, 10)
    published = run(scheduler("DPMSolver", solver_order=3, third_order="as_published"), net, noise, 10)
    assert relative(exact, published) > 1e-3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_equals_diffusers(net, noise, order):
    for steps in (5, 10):  # at 20 steps of order 3 diffusers' own float32 coefficients are off by more than 1e-4
        theirs = run(diffusers.DEISMultistepScheduler(**SD, solver_order=order), net, noise, steps)
        assert relative(run(samplers.DEISScheduler(**SD, solver_order=order), net, noise, steps), theirs) < 1e-4


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("data", [True, False])
def test_unipc_equals_diffusers(net, noise, order, kind, data):
    config = {
        **SD, "solver_order": order, "solver_type": kind, "predict_x0": data, "disable_corrector": [1],
        # diffusers' bh1 is NaN at sigma = 0 and its noise basis is refused there
        "final_sigmas_type": "zero" if data and kind == "bh2" else "sigma_min",
    }  # fmt: skip
    assert run(samplers.UniPCScheduler(**{**config, "final_sigmas_type": "zero"}), net, noise, 5).isfinite().all()
    for steps in (5, 20):
        theirs = run(diffusers.UniPCMultistepScheduler(**config), net, noise, steps)
        assert relative(run(samplers.UniPCScheduler(**config), net, noise, steps), theirs) < 1e-4


def test_sde_equals_diffusers_with_the_same_noise(net, noise):
    config = {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    theirs, ours = diffusers.DPMSolverMultistepScheduler(**config), samplers.DPMSolverScheduler(**config)
    assert relative(*run_with_the_same_noise(ours, theirs, net, noise, 8)) < 1e-4


def test_flow_models_equal_diffusers(net, noise):
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = np.linspace(1, 1 / 6, 6)
    theirs = run(euler, net, noise, sigmas=sigmas)
    ours = samplers.DDIMScheduler.from_config(euler.config)
    # Euler on a flow is DDIM; the pipelines' default list stands for the configured, shifted grid
    assert relative(run(ours, net, noise, sigmas=sigmas.tolist()), theirs) < 1e-4
    assert torch.allclose(ours.timesteps, euler.timesteps)
    dpm = diffusers.DPMSolverMultistepScheduler(**FLOW)
    theirs = run(dpm, net, noise, 8)
    ours = scheduler("DPMSolver", dpm.config)
    # diffusers feeds the network int64 timesteps here; the same are given to ours
    levels = [float(v) for v in dpm.sigmas[:-1]]
    assert relative(run(ours, net, noise, sigmas=levels, timesteps=dpm.timesteps.tolist()), theirs) < 1e-4


def test_ddim_eta_from_the_pipeline(net, noise):
    theirs, ours = diffusers.DDIMScheduler(**SD, clip_sample=False), samplers.DDIMScheduler(**SD)
    assert relative(*run_with_the_same_noise(ours, theirs, net, noise, 6, eta=0.7)) < 1e-4
    ours.set_timesteps(6)
    assert torch.equal(run(ours, net, noise), run(samplers.DDIMScheduler(**SD), net, noise, 6))


def test_predicted_x0(net, noise):
    theirs, ours = diffusers.DDIMScheduler(**SD, clip_sample=False), samplers.DDIMScheduler(**SD)
    theirs.set_timesteps(5)
    ours.set_timesteps(5)
    with pytest.raises(FewstepError, match="no step"):
        _ = ours.pred_original_sample
    x = noise
    for t in ours.timesteps:
        out, peer = ours.step(net(x, t), t, x), theirs.step(net(x, t), t, x)
        assert relative(out.pred_original_sample, peer.pred_original_sample) < 1e-5
        assert torch.equal(ours.pred_original_sample, out.pred_original_sample)
        x = out.prev_sample


def test_thresholding_and_clipping_equal_diffusers(net, noise):
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    theirs = run(diffusers.DPMSolverMultistepScheduler(**SD, **options), net, noise, 8)
    assert relative(run(samplers.DPMSolverScheduler(**SD, **options), net, noise, 8), theirs) < 1e-4
    theirs = diffusers.DDIMScheduler(**SD, clip_sample=True)
    ours = samplers.DDIMScheduler.from_config(theirs.config)
    theirs.set_timesteps(8)
    ours.set_timesteps(8)
    a = b = noise
    for t in ours.timesteps:
        a = ours.step(net(a, t), t, a).prev_sample
        # diffusers recomputes eps from the clipped x0 only when asked to; that is the consistent update
        b = theirs.step(net(b, t), t, b, use_clipped_model_output=True).prev_sample
    assert relative(a, b) < 1e-4


def test_add_noise_and_velocity_equal_diffusers(noise):
    ddpm = diffusers.DDPMScheduler(**SD)
    ours = scheduler("DPMSolver")
    t = torch.tensor([17, 803])
    x0 = noise.flip(0)
    assert relative(ours.add_noise(x0, noise, t), ddpm.add_noise(x0, noise, t)) < 1e-5
    assert relative(ours.get_velocity(x0, noise, t), ddpm.get_velocity(x0, noise, t)) < 1e-5
    assert torch.allclose(ours.alphas_cumprod, ddpm.alphas_cumprod, rtol=1e-4)
    assert len(ours) == len(ddpm)
