"""The diffusers schedulers: parity with diffusers' own, the calling convention of its pipelines, and bad input."""

import copy
import json
import pickle
import subprocess
import sys
import threading

import diffusers
import numpy as np
import pytest
import torch

from fewstep import samplers
from fewstep.errors import ArtifactError, FewstepError, GridError
from fewstep.samplers import DPMSolver, Grid, NoiseSchedule, SolverPlan
from fewstep.samplers.schedule import EDM
from fewstep.samplers.specs import make_scheduler, parse_spec, scheduler_names
from tests.eval_fixtures import tiny_pipeline
from tests.scheduler_fixtures import FLOW, SD, relative, run

OURS = ("DDIM", "DPMSolver", "DEIS", "UniPC")


def scheduler(name, config=SD, **options):
    return getattr(samplers, f"{name}Scheduler").from_config(config, **options)


@pytest.fixture(scope="module")
def net():
    """A smooth network that depends on the time, so that a wrong time is seen."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 4, 3, padding=1)
    )

    def network(x, t):
        with torch.no_grad():
            return layers(x.float()) * torch.cos(torch.as_tensor(t).double() / 500).float()

    return network


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


# -- parity: diffusers computes coefficients in float32, whose rounding through N <= 20 rows stays below 1e-4 ------------
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


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_spacings_equal_diffusers(net, noise, spacing):
    for steps in (7, 20):
        config = {**SD, "timestep_spacing": spacing, "steps_offset": 1}
        theirs, ours = diffusers.DPMSolverMultistepScheduler(**config), samplers.DPMSolverScheduler(**config)
        a, b = run(ours, net, noise, steps), run(theirs, net, noise, steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert relative(a, b) < 1e-4


def test_sde_equals_diffusers_with_the_same_noise(net, noise):
    config = {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 2}
    theirs, ours = diffusers.DPMSolverMultistepScheduler(**config), samplers.DPMSolverScheduler(**config)
    theirs.set_timesteps(8)
    ours.set_timesteps(8)
    a = b = noise
    g = torch.Generator().manual_seed(5)
    for t in ours.timesteps:
        z = torch.randn(noise.shape, generator=g)
        a = ours.step(net(a, t), t, a, variance_noise=z).prev_sample
        b = theirs.step(net(b, t), t, b, variance_noise=z).prev_sample
    assert relative(a, b) < 1e-4


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


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_flow_grids_by_rule_equal_diffusers(flag):
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **{flag: True})
    ours = samplers.DDIMScheduler.from_config(euler.config)
    euler.set_timesteps(7)
    ours.set_timesteps(7)
    assert torch.allclose(ours.sigmas, euler.sigmas, rtol=1e-5)


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


# -- configs --------------------------------------------------------------------------------------------------------------
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


# -- grids ----------------------------------------------------------------------------------------------------------------
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


# -- the loop -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_keep_their_dtype(net, noise, name, dtype):
    s = scheduler(name)
    full = run(s, net, noise, 5)
    x = run(s, lambda x, t: net(x, t).to(dtype), noise.to(dtype))
    assert x.dtype == dtype
    # 5 casts of the state, each off by half a unit in the last place, through rows of bounded gain
    assert relative(x, full) < 20 * 5 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", OURS)
def test_interleaved_copies_and_threads(net, noise, name):
    s = scheduler(name)
    s.set_timesteps(6)
    other = copy.deepcopy(s)
    assert other.plan is s.plan
    a, b = noise, -2 * noise
    for t in s.timesteps:
        a = s.step(net(a, t), t, a).prev_sample
        b = other.step(net(b, t), t, b).prev_sample
    assert torch.equal(a, run(s, net, noise))
    assert torch.equal(b, run(s, net, -2 * noise))
    results = {}

    def work(k):
        results[k] = run(copy.deepcopy(s), net, noise * k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[k], run(s, net, noise * k)) for k in range(1, 5))


def test_a_copy_taken_in_the_middle_goes_on_alone(net, noise):
    s = scheduler("UniPC", solver_order=3)
    s.set_timesteps(6)
    x, half = noise, None
    for i, t in enumerate(s.timesteps):
        if i == 3:
            half = (pickle.loads(pickle.dumps(s)), x)
        x = s.step(net(x, t), t, x).prev_sample
    y = half[1]
    for t in s.timesteps[3:]:
        y = half[0].step(net(y, t), t, y).prev_sample
    assert torch.equal(x, y)


@pytest.mark.parametrize("name", OURS)
def test_img2img_restarts_the_warm_up(net, noise, name):
    s = scheduler(name)
    s.set_timesteps(8)
    late = run(s, net, noise, begin=3)
    assert s.step_index == 8
    assert torch.equal(late, run(scheduler(name), net, noise, sigmas=s.grid.tail(3)))
    # without a begin index the first timestep finds it
    s.set_timesteps(8)
    x = noise
    for t in s.timesteps[3:]:
        x = s.step(net(x, t), t, x).prev_sample
    assert torch.equal(x, late)


@pytest.mark.parametrize("name", OURS)
def test_stepping_past_the_end_and_starting_again(net, noise, name):
    s = scheduler(name)
    with pytest.raises(FewstepError, match="set_timesteps"):
        s.step(noise, 10, noise)
    s.set_timesteps(4)
    first = run(s, net, noise)
    with pytest.raises(FewstepError, match="past the end"):
        s.step(noise, s.timesteps[-1], noise)
    assert torch.equal(run(s, net, noise), first)  # the first timestep starts a new run
    s.step(net(noise, s.timesteps[0]), s.timesteps[0], noise)
    with pytest.raises(FewstepError, match="expects timestep"):
        s.step(noise, s.timesteps[3], noise)
    s.set_timesteps(4)
    with pytest.raises(FewstepError, match="none of this run"):
        s.step(noise, 1.5, noise)
    s.set_begin_index(9)
    with pytest.raises(FewstepError, match="begin index 9"):
        s.step(noise, s.timesteps[0], noise)


def test_shape_and_device_mismatch(noise):
    s = scheduler("DPMSolver")
    s.set_timesteps(3)
    with pytest.raises(FewstepError, match=r"\(2, 4, 8, 9\)"):
        s.step(torch.zeros(2, 4, 8, 9), s.timesteps[0], noise)
    with pytest.raises(FewstepError, match="on meta"):
        s.step(noise.to("meta"), s.timesteps[0], noise)
    with pytest.raises(FewstepError, match="learned_range"):
        s.step(torch.zeros(2, 8, 8, 8), s.timesteps[0], noise)
    learned = scheduler("DPMSolver", variance_type="learned_range")
    plain = scheduler("DPMSolver")
    for x in (learned, plain):
        x.set_timesteps(3)
    t = plain.timesteps[0]
    both = torch.cat([noise, torch.ones_like(noise)], 1)
    assert torch.equal(learned.step(both, t, noise).prev_sample, plain.step(noise, t, noise).prev_sample)


def test_per_sample_generators_do_not_depend_on_the_batch(net):
    s = scheduler("DPMSolver", algorithm_type="sde-dpmsolver++")
    s.set_timesteps(5)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    generators = lambda: [torch.Generator().manual_seed(100 + i) for i in range(4)]  # noqa: E731
    together = run(s, net, x, generator=generators())
    for i, g in enumerate(generators()):
        alone = run(s, net, x[i : i + 1], generator=[g])
        # equal noise; the convolution may sum in another order for another batch
        assert relative(alone, together[i : i + 1]) < 1e-5
    with pytest.raises(FewstepError, match="3 generators"):
        run(s, net, x, generator=generators()[:3])


def test_ddim_eta_from_the_pipeline(net, noise):
    theirs, ours = diffusers.DDIMScheduler(**SD, clip_sample=False), samplers.DDIMScheduler(**SD)
    theirs.set_timesteps(6)
    ours.set_timesteps(6)
    a = b = noise
    g = torch.Generator().manual_seed(3)
    for t in ours.timesteps:
        z = torch.randn(noise.shape, generator=g)
        a = ours.step(net(a, t), t, a, eta=0.7, variance_noise=z).prev_sample
        b = theirs.step(net(b, t), t, b, eta=0.7, variance_noise=z).prev_sample
    assert relative(a, b) < 1e-4
    ours.set_timesteps(6)
    assert torch.equal(run(ours, net, noise), run(samplers.DDIMScheduler(**SD), net, noise, 6))


@pytest.mark.parametrize("begin", [None, 2])
def test_ddim_eta_of_a_model_whose_input_is_scaled(net, noise, begin):
    """scale_model_input comes before the step that brings eta."""
    s, expected = (samplers.DDIMScheduler.from_config(diffusers.EDMEulerScheduler().config, eta=e) for e in (0.0, 0.7))
    results = []
    for scheduler_, options in ((s, {"eta": 0.7}), (expected, {}), (s, {})):
        scheduler_.set_timesteps(5)
        if begin is not None:
            scheduler_.set_begin_index(begin)
        g, x = torch.Generator().manual_seed(3), noise * float(scheduler_.sigmas[begin or 0])
        for t in scheduler_.timesteps[begin or 0 :]:
            scaled = scheduler_.scale_model_input(x, t)
            x = scheduler_.step(net(scaled, t), t, x, generator=g, return_dict=False, **options)[0]
        results.append(x)
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], rtol=1e-2)  # without eta the run is deterministic again


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


# -- noise ----------------------------------------------------------------------------------------------------------------
def test_add_noise_and_velocity_equal_diffusers(noise):
    ddpm = diffusers.DDPMScheduler(**SD)
    ours = scheduler("DPMSolver")
    t = torch.tensor([17, 803])
    x0 = noise.flip(0)
    assert relative(ours.add_noise(x0, noise, t), ddpm.add_noise(x0, noise, t)) < 1e-5
    assert relative(ours.get_velocity(x0, noise, t), ddpm.get_velocity(x0, noise, t)) < 1e-5
    assert torch.allclose(ours.alphas_cumprod, ddpm.alphas_cumprod, rtol=1e-4)
    assert len(ours) == len(ddpm)


def test_add_noise_uses_the_levels_of_the_run(noise):
    s = scheduler("DPMSolver")
    s.set_timesteps(sigmas=[10.0, 1.0], timesteps=[700, 650])  # told times that are not those of the levels
    x0 = torch.zeros_like(noise)
    rho = torch.tensor([10.0, 1.0])
    expected = (rho / (1 + rho**2).sqrt())[:, None, None, None] * noise
    assert relative(s.add_noise(x0, noise, torch.tensor([700, 650])), expected) < 1e-6


# -- pipelines ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, n=1, **kwargs):
    g = [torch.Generator().manual_seed(i) for i in range(n)]
    out = pipe("a dress", num_images_per_prompt=n, generator=g, output_type="pt", num_inference_steps=5, **kwargs)
    return out.images


@pytest.mark.parametrize("name", OURS)
def test_stable_diffusion_end_to_end_and_back_from_disk(pipe, name, tmp_path):
    pipe.scheduler = scheduler(name, pipe.scheduler.config)
    two = images(pipe, 2)
    assert relative(images(pipe, 1), two[:1]) < 1e-4  # batches sum in another order
    pipe.save_pretrained(tmp_path)
    # a fresh process loads the pipeline with our scheduler in it
    code = (
        "import sys, torch, diffusers, fewstep; p = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1]);"
        "p.set_progress_bar_config(disable=True);"
        "g = [torch.Generator().manual_seed(i) for i in range(2)];"
        "x = p('a dress', num_images_per_prompt=2, generator=g, output_type='pt', num_inference_steps=5).images;"
        "torch.save(x, sys.argv[2]); print(type(p.scheduler).__module__, type(p.scheduler).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "x.pt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["fewstep", f"{name}Scheduler"]
    assert relative(torch.load(tmp_path / "x.pt"), two) < 1e-4


def test_image_to_image(pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    for name in OURS:
        parts["scheduler"] = scheduler(name, pipe.scheduler.config)
        i2i = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
        i2i.set_progress_bar_config(disable=True)
        start = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(4))
        call = {"image": start, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        out = i2i("a bag", strength=0.5, num_inference_steps=8, **call).images
        assert out.shape == (1, 1, 32, 32)
        assert out.isfinite().all()
        assert parts["scheduler"].step_index == 8
        assert len(parts["scheduler"]._active.calls) == 4


def test_stable_diffusion_3_passes_its_own_grid():
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0,
    )  # fmt: skip
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=euler, **dict.fromkeys(names))
    pipe.set_progress_bar_config(disable=True)

    def latents(**kwargs):
        g = torch.Generator().manual_seed(0)
        return pipe(
            prompt_embeds=torch.ones(1, 3, 32), pooled_prompt_embeds=torch.ones(1, 16), guidance_scale=1.0, generator=g,
            height=8, width=8, output_type="latent", **kwargs,
        ).images  # fmt: skip

    sigmas = np.linspace(1, 1 / 6, 6).tolist()
    theirs = latents(sigmas=sigmas)
    pipe.scheduler = samplers.DDIMScheduler.from_config(euler.config)
    assert relative(latents(sigmas=sigmas), theirs) < 1e-4
    assert relative(latents(num_inference_steps=6), theirs) < 1e-4
    # more steps come nearer to the fine solution, and a second-order solver nearer still
    fine = latents(num_inference_steps=200)
    first = relative(latents(num_inference_steps=12), fine)
    pipe.scheduler = samplers.DPMSolverScheduler.from_config(euler.config)
    assert relative(latents(num_inference_steps=12), fine) < first


# -- PlanScheduler --------------------------------------------------------------------------------------------------------
def test_plan_scheduler_runs_and_keeps_a_plan(net, noise, tmp_path):
    schedule = NoiseSchedule.from_config(SD)
    plan = DPMSolver(order=3).compile(schedule, Grid.karras(schedule, 6))
    expected = run(scheduler("DPMSolver", solver_order=3, grid="karras"), net, noise, 6)
    plan.save(tmp_path / "plan.json")
    for s in (
        samplers.PlanScheduler.from_plan(plan, SD),
        samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "plan.json")),
    ):
        assert torch.equal(run(s, net, noise, 6), expected)
        s.save_pretrained(tmp_path / "saved")
        json.loads((tmp_path / "saved" / "scheduler_config.json").read_text())
        again = samplers.PlanScheduler.from_pretrained(tmp_path / "saved")
        assert again.plans[plan.nfe].digest == plan.digest
        assert torch.equal(run(again, net, noise, 6), expected)
    with pytest.raises(GridError, match="6 network calls"):
        s.set_timesteps(5)
    with pytest.raises(GridError, match="own grid"):
        s.set_timesteps(timesteps=[3, 2, 1])
    late = run(s, net, noise, 6)
    assert not torch.equal(run(s, net, noise, begin=2), late)
    with pytest.raises(ArtifactError, match="made for"):
        samplers.PlanScheduler.from_plan(plan, {**SD, "prediction_type": "v_prediction"})
    with pytest.raises(ArtifactError, match="does not exist"):
        samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "none.json"))
    with pytest.raises(FewstepError, match="needs plan="):
        samplers.PlanScheduler.from_config(SD)
    assert SolverPlan.load(tmp_path / "plan.json", schedule).digest == plan.digest


def test_plan_scheduler_chooses_among_plans_by_their_calls(net, noise, tmp_path):
    schedule = NoiseSchedule.from_config(SD)
    plans = {n: DPMSolver(order=2).compile(schedule, Grid.karras(schedule, n)) for n in (4, 12)}
    for n, plan in plans.items():
        plan.save(tmp_path / f"mine-{n}.json")
    (tmp_path / "mine-x.json").write_text("not a number, not read")
    s = samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "mine-{nfe}.json"))
    s.save_pretrained(tmp_path / "saved")
    for each in (s, samplers.PlanScheduler.from_pretrained(tmp_path / "saved")):
        for n in plans:
            expected = run(samplers.PlanScheduler.from_plan(plans[n], SD), net, noise, n)
            assert torch.equal(run(each, net, noise, n), expected)
    with pytest.raises(GridError, match="4 or 12 network calls, 5 steps were asked for"):
        s.set_timesteps(5)
    plans[4].save(tmp_path / "mine-04.json")
    with pytest.raises(FewstepError, match="3 plans, some with the same number of calls"):
        samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "mine-{nfe}.json"))
    with pytest.raises(FewstepError, match="no file is named"):
        samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "yours-{nfe}.json"))
    with pytest.raises(FewstepError, match=r"learned plans .fashion-ds.*fashion-sd"):
        samplers.PlanScheduler.from_config(SD, plan="fashion-ds")


def test_plan_scheduler_knows_the_plans_that_come_with_a_model():
    from fewstep import pipelines
    from fewstep.samplers import learn

    config = pipelines.load("fashion-dit-small").scheduler.config
    s = samplers.PlanScheduler.from_config(config, plan="fashion-dit-small")
    s.set_timesteps(8)
    assert s.plan.digest == learn.load("fashion-dit-small", 8).digest


# -- names ----------------------------------------------------------------------------------------------------------------
def test_specs():
    spec = parse_spec("UniPC(solver_order=3, grid=karras, predict_x0=true)")
    assert dict(spec.options) == {"solver_order": 3, "grid": "karras", "predict_x0": True}
    assert parse_spec(str(spec)) == spec
    s = make_scheduler(spec, SD)
    assert type(s) is samplers.UniPCScheduler
    assert s.config.solver_order == 3
    peer = make_scheduler("diffusers:DPMSolverMultistepScheduler(solver_order=3)", SD)
    assert type(peer) is diffusers.DPMSolverMultistepScheduler
    assert peer.config.solver_order == 3
    assert set(OURS) <= set(scheduler_names())
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5).config
    assert make_scheduler("diffusers:UniPCMultistepScheduler", flow).config.flow_shift == 2.5


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("UniPCC", "did you mean 'UniPC'"),
        ("UniPC(solver_ordr=3)", "did you mean 'solver_order'"),
        ("UniPC(3)", "key=value"),
        ("UniPC(order=", "key=value"),
        ("", "key=value"),
        ("UniPC(solver_order=open('x'))", "values are numbers"),
        ("diffusers:Nope", "diffusers scheduler 'Nope'"),
        ("diffusers:DDIMScheduler(grid=karras)", "option of DDIMScheduler 'grid'"),
    ],
)
def test_bad_specs_are_named(text, match):
    with pytest.raises(FewstepError, match=match):
        parse_spec(text)
