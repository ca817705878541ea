"""Noise schedules against diffusers' own tables, and against themselves: inverses, derivatives, identities."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar

from fewstep.errors import FewstepError
from fewstep.samplers import DDIM, Grid, NoiseSchedule
from fewstep.samplers.betas import BETA_SCHEDULES, betas
from fewstep.samplers.config import schedule_from_config
from fewstep.samplers.schedule import EDM, ContinuousVP, DiscreteVP, Flow, alpha_sigma, f64
from tests.solver_fixtures import SD

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps


def vp(**config):
    return NoiseSchedule.from_config({"num_train_timesteps": 1000, "beta_schedule": "linear", **config})


def all_schedules():
    return {
        "vp": vp(**SD),
        "vp-cosine": vp(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        "svd": ContinuousVP(),
        "edm": EDM(),
        "flow": Flow(shift=3.0),
    }


def mid_times(schedule, n=41):
    """Times inside the training range that avoid the knots of tabulated schedules."""
    hi, lo = schedule.t_range
    if isinstance(schedule, DiscreteVP):
        return f64([i + 0.37 for i in range(0, int(hi), max(1, int(hi) // n))])
    return torch.exp(torch.linspace(math.log(lo), math.log(0.999 * hi), n, dtype=torch.float64))


def assert_same_bar(schedule, alphas_cumprod):
    """Equal to a float32 cumulative product, whose k-th entry has k rounded factors 1 - beta.

    Each factor and each product adds half an ulp, so the relative error of entry k is at most (k + 1) eps. That bounds
    alpha_bar; the float32 betas themselves (absolute error eps/2 each near 1 - beta) are in the same count.
    """
    bar = torch.sigmoid(-2 * schedule.log_rho)
    k = torch.arange(1, len(bar) + 1, dtype=torch.float64)
    assert ((bar - alphas_cumprod.double()).abs() <= 2 * k * EPS32 * bar + 1e-12).all()


# -- the tables that diffusers computes --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_every_beta_schedule_equals_diffusers(name):
    try:
        theirs = diffusers.DDPMScheduler(beta_schedule=name, beta_start=0.00085, beta_end=0.012)
    except NotImplementedError:
        pytest.skip(f"this release of diffusers does not know {name}")
    assert_same_bar(NoiseSchedule.from_config(dict(theirs.config)), theirs.alphas_cumprod)


@pytest.mark.parametrize("kind", ["cosine", "exp", "laplace"])
def test_betas_given_by_alpha_bar_equal_diffusers_function(kind):
    ours = betas({"cosine": "squaredcos_cap_v2"}.get(kind, kind), 500, 0.0, 0.0)
    try:
        theirs = betas_for_alpha_bar(500, alpha_transform_type=kind).double()
    except ValueError:
        pytest.skip(f"this release of diffusers does not know {kind}")
    assert torch.allclose(ours, theirs, rtol=EPS32, atol=1e-12)


@pytest.mark.parametrize("name", sorted(BETA_SCHEDULES))
@pytest.mark.parametrize("n", [1, 2, 1000])
def test_betas_are_probabilities(name, n):
    values = betas(name, n, 1e-4, 0.02)
    assert values.shape == (n,)
    assert values.dtype == torch.float64
    assert ((values > 0) & (values < 1)).all()


def test_trained_betas_win_over_the_named_schedule():
    trained = torch.linspace(0.001, 0.03, 77, dtype=torch.float64).tolist()
    theirs = diffusers.DDIMScheduler(trained_betas=trained, num_train_timesteps=77, beta_schedule="linear")
    ours = NoiseSchedule.from_config(dict(theirs.config))
    assert_same_bar(ours, theirs.alphas_cumprod)
    assert ours == DiscreteVP.from_betas(trained)
    assert ours.t_range == (76.0, 0.0)


def test_zero_terminal_snr_equals_diffusers_and_ends_without_signal():
    theirs = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    ours = NoiseSchedule.from_config(dict(theirs.config))
    bar = torch.sigmoid(-2 * ours.log_rho)
    # theirs goes through float32 betas again, so what is small near the end has an absolute error of about T eps
    assert ((bar - theirs.alphas_cumprod.double()).abs() <= 1000 * EPS32 * bar + 1000 * EPS32**2 + EPS32).all()
    m = ours.at([999.0, 998.0])
    assert m.alpha[0] == 0
    assert m.sigma[0] == 1
    assert m.lam[0] == -math.inf
    assert m.lam[1].isfinite()
    # the first step keeps its noise level: that is what the rescaling promises (2305.08891, algorithm 1)
    assert torch.allclose(ours.log_rho[0], vp(**SD).log_rho[0], rtol=1e-9)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_shifted_snr_of_cogvideox_equals_diffusers(zero_snr):
    theirs = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=zero_snr)
    bar = torch.sigmoid(-2 * NoiseSchedule.from_config(dict(theirs.config)).log_rho)
    assert torch.allclose(bar, theirs.alphas_cumprod.double(), rtol=1000 * EPS32, atol=2 * EPS32)


# -- inverses and derivatives ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", all_schedules())
def test_t_inverts_lam_and_model_time_inverts(name):
    schedule = all_schedules()[name]
    t = mid_times(schedule)
    lam = schedule.lam(t)
    assert (lam[:-1] > lam[1:]).all(), "noise grows with t"
    # an error of eps |lam| in lambda becomes one of eps |lam| / |d lam/dt| in t
    tolerance = 16 * EPS64 * (t.abs() + (1 + lam.abs()) / schedule.d_lam(t).abs())
    assert ((schedule.t(lam) - t).abs() <= tolerance).all()
    assert torch.allclose(schedule.t_from_model_time(schedule.model_time(t)), t, rtol=64 * EPS64, atol=0)
    sigma = schedule.sigma_from_lam(lam)
    assert torch.allclose(schedule.lam_from_sigma(sigma), lam, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", all_schedules())
def test_alpha_and_sigma_follow_the_family(name):
    schedule = all_schedules()[name]
    m = schedule.at(mid_times(schedule))
    assert torch.allclose(torch.log(m.alpha / m.sigma), m.lam, rtol=1e-12, atol=1e-12)
    split = {"vp": m.alpha**2 + m.sigma**2, "flow": m.alpha + m.sigma, "ve": m.alpha}[schedule.family]
    assert torch.allclose(split, torch.ones_like(split), rtol=4 * EPS64, atol=0)


@pytest.mark.parametrize("name", all_schedules())
def test_derivatives_equal_central_differences(name):
    """Away from knots. The error of a central difference is h^2 f'''/6 + eps f/h: least at h ~ eps^(1/3)."""
    schedule = all_schedules()[name]
    t = mid_times(schedule)
    h = 1e-5 * t.clamp(min=1e-3)
    if schedule.family == "flow":
        h = 1e-5 * t * (1 - t)
    m, up, down = schedule.at(t), schedule.at(t + h), schedule.at(t - h)
    for what in ("alpha", "sigma", "lam"):
        slope = (getattr(up, what) - getattr(down, what)) / (2 * h)
        scale = m.d_lam.abs() * (1 + m.lam.abs())  # alpha and sigma change by at most themselves per unit of lambda
        assert ((getattr(m, f"d_{what}") - slope).abs() <= 1e-7 * scale.clamp(min=1e-12) * (1 + m.sigma)).all(), what


@pytest.mark.parametrize("name", all_schedules())
def test_gradients_flow_through_lam_and_back(name):
    schedule = all_schedules()[name]
    t = mid_times(schedule, 5).requires_grad_()
    assert torch.allclose(torch.autograd.grad(schedule.lam(t).sum(), t)[0], schedule.d_lam(t.detach()), rtol=1e-10)
    lam = schedule.lam(t.detach()).requires_grad_()
    assert torch.allclose(torch.autograd.grad(schedule.t(lam).sum(), lam)[0], 1 / schedule.d_lam(t.detach()), rtol=1e-8)


@pytest.mark.parametrize("family", ["vp", "ve", "flow"])
def test_the_clean_end_is_exact(family):
    alpha, sigma = alpha_sigma(family, f64([math.inf]))
    assert alpha.item() == 1
    assert sigma.item() == 0


@pytest.mark.parametrize("family", ["vp", "flow"])
def test_the_noisy_end_is_exact(family):
    alpha, sigma = alpha_sigma(family, f64([-math.inf]))
    assert alpha.item() == 0
    assert sigma.item() == 1


@pytest.mark.parametrize("name", all_schedules())
def test_lambda_of_infinity_is_the_clean_time(name):
    schedule = all_schedules()[name]
    assert schedule.t(f64([math.inf])).item() == schedule.t_clean
    assert schedule.lam(f64([schedule.t_clean])).item() == math.inf


def test_fractional_indices_interpolate_log_rho_as_diffusers_places_karras_sigmas():
    schedule = vp(**SD)
    scheduler = diffusers.EulerDiscreteScheduler(**SD)
    log_sigmas = schedule.log_rho.numpy()
    for sigma in (0.05, 0.5, 3.3, 12.0):
        ours = schedule.t(schedule.lam_from_sigma(f64([sigma]))).item()
        assert ours == pytest.approx(float(scheduler._sigma_to_t(np.float64(sigma), log_sigmas)), abs=1e-9)


def test_the_network_is_never_fed_an_index_outside_the_table():
    schedule = vp(**SD)
    hi, lo = schedule.sigma_range
    assert schedule.t(schedule.lam_from_sigma(f64([hi * 10, lo / 10]))).tolist() == [999.0, 0.0]


# -- configs of the other families -------------------------------------------------------------------------------------
def test_edm_config_gives_edm_preconditioning():
    theirs = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    ours = NoiseSchedule.from_config(dict(theirs.config))
    assert ours == EDM(0.002, 80.0, "edm", 0.5)
    sigma = f64([0.01, 0.5, 30.0])
    for i, s in enumerate(sigma.tolist()):
        x = torch.ones(1, dtype=torch.float64)
        assert theirs.precondition_inputs(x, s).item() == pytest.approx(ours.in_scale(sigma)[i].item(), rel=1e-12)
        assert theirs.precondition_noise(s).item() == pytest.approx(ours.model_time(sigma)[i].item(), abs=4 * EPS32)
    assert ours.sigma_range == pytest.approx((80.0, 0.002), rel=1e-12)


def test_edm_v_prediction_is_its_own_parametrisation():
    ours = NoiseSchedule.from_config(
        {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}
    )
    assert ours.prediction == "edm_v"
    assert ours.sigma_data == 1.0


def test_stable_video_diffusion_config_is_continuous():
    theirs = diffusers.EulerDiscreteScheduler(
        sigma_min=0.002, sigma_max=700.0, timestep_type="continuous", timestep_spacing="leading",
        use_karras_sigmas=True, prediction_type="v_prediction", **SD,
    )  # fmt: skip
    ours = NoiseSchedule.from_config(dict(theirs.config))
    assert ours == ContinuousVP(0.002, 700.0, "v_prediction")
    theirs.set_timesteps(7)
    assert torch.allclose(ours.model_time(theirs.sigmas[:-1].double()), theirs.timesteps.double(), atol=8 * EPS32)


def test_static_flow_shift_equals_flow_match_euler():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = NoiseSchedule.from_config(dict(theirs.config))
    sigma = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    assert torch.allclose(ours.shifted(sigma), theirs.sigmas.double(), rtol=4 * EPS32)
    assert torch.allclose(ours.model_time(ours.shifted(sigma)), theirs.timesteps.double(), rtol=4 * EPS32)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_equals_flow_match_euler(kind):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    ours = schedule_from_config(dict(theirs.config), mu=1.15)
    sigma = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    theirs.set_timesteps(sigmas=sigma.tolist(), mu=1.15)
    assert torch.allclose(ours.shifted(sigma), theirs.sigmas[:-1].double(), rtol=4 * EPS32)


def test_dynamic_shift_without_mu_is_refused():
    config = dict(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    with pytest.raises(FewstepError, match="mu"):
        NoiseSchedule.from_config(config)


def test_mu_is_ignored_by_a_statically_shifted_model():
    config = dict(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert schedule_from_config(config, mu=0.7).shift == 3.0


def test_shift_terminal_equals_flow_match_euler():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    ours = schedule_from_config(dict(theirs.config), mu=0.8)
    sigma = torch.linspace(1, 0.05, 20, dtype=torch.float64)
    theirs.set_timesteps(sigmas=sigma.tolist(), mu=0.8)
    assert torch.allclose(ours.shifted(sigma), theirs.sigmas[:-1].double(), rtol=8 * EPS32)
    assert ours.shifted(sigma)[-1].item() == pytest.approx(0.1, rel=1e-14)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0,
         "prediction_type": "flow_prediction"},
    ],
)  # fmt: skip
def test_the_spellings_of_a_flow_model_mean_the_same(config):
    schedule = NoiseSchedule.from_config(config)
    assert schedule == Flow(1000)
    assert schedule.shift == 3.0


# -- identity ----------------------------------------------------------------------------------------------------------
def test_equal_configs_of_different_classes_have_equal_fingerprints():
    a = NoiseSchedule.from_config(dict(diffusers.DDIMScheduler(**SD).config))
    b = NoiseSchedule.from_config(dict(diffusers.UniPCMultistepScheduler(**SD).config))
    assert a is not b
    assert a == b
    assert a.fingerprint == b.fingerprint
    assert hash(a) == hash(b)
    assert len({a, b}) == 1


def test_what_differs_has_another_fingerprint():
    different = [
        vp(**SD), vp(**SD, prediction_type="v_prediction"), vp(**SD, rescale_betas_zero_snr=True), vp(),
        EDM(), EDM(rho_max=40.0), EDM(sigma_data=1.0), ContinuousVP(), Flow(), Flow(500),
    ]  # fmt: skip
    assert len({s.fingerprint for s in different}) == len(different)
    assert vp(**SD) != "a schedule"


def test_the_shift_of_a_flow_belongs_to_grids_and_not_to_its_identity():
    assert Flow(shift=3.0).fingerprint == Flow(shift=1.0).fingerprint


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_unknown_beta_schedule_names_the_value_and_the_nearest():
    with pytest.raises(FewstepError, match=r"'scaled_linaer'; did you mean 'scaled_linear'\?"):
        vp(beta_schedule="scaled_linaer")


def test_unknown_prediction_type_is_refused():
    with pytest.raises(FewstepError, match="'eps'"):
        vp(prediction_type="eps")


def test_prediction_that_the_family_does_not_have_is_refused():
    with pytest.raises(FewstepError, match="v_prediction"):
        Flow(prediction="v_prediction")
    with pytest.raises(FewstepError, match="flow_prediction"):
        DiscreteVP.from_betas([0.1, 0.2], "flow_prediction")


def test_unknown_time_shift_is_refused():
    config = {"prediction_type": "flow_prediction", "use_dynamic_shifting": True, "time_shift_type": "quadratic"}
    with pytest.raises(FewstepError, match="'quadratic'"):
        schedule_from_config(config, mu=1.0)


@pytest.mark.parametrize("named", [True, False], ids=["with class name", "without"])
@pytest.mark.parametrize("name", ["IPNDMScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler", "SCMScheduler"])
def test_a_process_of_no_family_is_refused(name, named):
    """Also where the config does not name its class, as that of a scheduler that was never saved."""
    config = dict(getattr(diffusers, name)().config, **({"_class_name": name} if named else {}))
    with pytest.raises(FewstepError, match=name if named else "no noise schedule|trigflow"):
        NoiseSchedule.from_config(config)


def test_betas_that_add_no_noise_are_refused_with_the_index():
    with pytest.raises(FewstepError, match="index 1 to 2"):
        DiscreteVP.from_betas([0.1, 0.1, 0.0, 0.1])


@pytest.mark.parametrize("table", [[0.1], [0.0, 0.1, 0.2], [0.1, 1.0, 0.2], [0.1, 1.5, 0.2], [0.1, math.nan]])
def test_tables_that_are_no_noise_schedule_are_refused(table):
    with pytest.raises(FewstepError, match="noise"):
        DiscreteVP.from_betas(table)


def test_inverted_flows_are_refused():
    config = dict(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)
    with pytest.raises(FewstepError, match="invert_sigmas"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (float("nan"), 1.0)])
def test_impossible_sigma_ranges_are_refused(low, high):
    with pytest.raises(FewstepError, match="sigma_min"):
        EDM(low, high)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_impossible_shifts_are_refused(shift):
    with pytest.raises(FewstepError, match="shift"):
        Flow(shift=shift)


# -- surroundings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", all_schedules())
def test_default_dtype_and_device_do_not_leak_in(name):
    """Libraries build models under ``torch.device("meta")`` and half-precision defaults; schedules are made there."""
    plain = all_schedules()[name]
    plain_plan = DDIM().compile(plain, Grid.karras(plain, 4))
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        torch.set_default_device("meta")
        schedule = all_schedules()[name]
        grid = Grid.karras(schedule, 4)
        plan = DDIM().compile(schedule, grid)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
    assert grid.lam.device.type == "cpu"
    assert grid.lam.dtype == torch.float64
    assert schedule.fingerprint == plain.fingerprint
    assert plan.digest == plain_plan.digest
