"""Rules of grids against the timesteps and sigmas that diffusers computes, and published lists."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules

from fewstep.errors import GridError
from fewstep.samplers import Grid, NoiseSchedule
from fewstep.samplers.config import schedule_from_config
from fewstep.samplers.schedule import EDM, ContinuousVP, Flow, f64
from fewstep.samplers.spacing import AYS_SIGMAS
from tests.grid_fixtures import SCHEDULES, SPACINGS, VP
from tests.solver_fixtures import SD

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 about diffusers

EPS32 = torch.finfo(torch.float32).eps
COUNTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 25, 26, 30, 47, 48, 50, 58, 61, 96, 100, 103, 112, 333, 500, 998, 999)
"""Many of these have ties such as 499.5 or strides that float64 does not represent."""

# diffusers keeps 1 - alpha_bar in float32; where that is small (0.00085 at index 0) half its relative error passes to
# rho = sqrt((1 - alpha_bar) / alpha_bar), and each of up to 1000 products in alpha_bar added a rounding
RHO_TOLERANCE = 0.5 * 2 * EPS32 / 0.00085


def theirs(name, n, **config):
    scheduler = getattr(diffusers, name)(**SD, **config)
    scheduler.set_timesteps(n)
    return scheduler


# -- uniform in t ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_spacing_equals_the_dpm_convention(name, spacing, offset):
    for n in COUNTS:
        if spacing == "leading" and offset and n == 999:
            continue  # diffusers' first timestep is then 1000, which no model was trained at: the next test
        expected = theirs(name, n, timestep_spacing=spacing, steps_offset=offset).timesteps.double()
        expected = expected[expected >= 0]  # for n = 61 and 103 trailing rounds its way to a timestep -1
        grid = Grid.uniform_t(VP, n, spacing=spacing, offset=offset)
        assert grid.model_time.tolist() == expected.tolist(), n
        assert grid.steps == n


def test_a_timestep_outside_the_training_range_is_refused():
    assert theirs("UniPCMultistepScheduler", 999, timestep_spacing="leading", steps_offset=1).timesteps[0] == 1000
    with pytest.raises(GridError, match="index 0 is 1000"):
        Grid.uniform_t(VP, 999, spacing="leading", offset=1)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_spacing_equals_the_ddim_convention(name, spacing, offset):
    for n in COUNTS[1:]:
        expected = theirs(name, n, timestep_spacing=spacing, steps_offset=offset).timesteps.double()
        expected = expected[expected >= 0]
        if spacing == "linspace" and name != "DDIMScheduler":
            expected = (
                expected.round()
            )  # Euler keeps fractions, in float32; where it is a tie, that may round either way
            ties = (torch.linspace(999, 0, n, dtype=torch.float64) % 1 - 0.5).abs() < 1e-3
        else:
            ties = torch.zeros(len(expected), dtype=torch.bool)
        ours = Grid.uniform_t(VP, n, spacing=spacing, convention="ddim", offset=offset).model_time
        assert ours[~ties].tolist() == expected[~ties].tolist(), n
        assert ((ours - expected)[ties].abs() <= 1).all()


def test_leading_equals_pndm_but_for_its_repeated_timestep():
    for n in COUNTS[1:]:
        expected = theirs("PNDMScheduler", n, timestep_spacing="leading", steps_offset=1, skip_prk_steps=True).timesteps
        unique = list(dict.fromkeys(expected.tolist()))
        assert Grid.uniform_t(VP, n, spacing="leading", convention="ddim", offset=1).model_time.tolist() == unique


def test_one_ddim_step_of_linspace_starts_at_the_noise():
    """diffusers' one-step linspace is timestep 0, as if pure noise were a clean picture; ours is the noisiest."""
    assert theirs("DDIMScheduler", 1, timestep_spacing="linspace").timesteps.tolist() == [0]
    assert Grid.uniform_t(VP, 1, spacing="linspace", convention="ddim").model_time.tolist() == [999.0]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_lambda_min_clipped_equals_diffusers_on_the_cosine_schedule(spacing):
    config = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": spacing}
    scheduler = diffusers.DPMSolverMultistepScheduler(**config)
    schedule = NoiseSchedule.from_config(config)
    for n in (3, 8, 20, 50, 250):
        scheduler.set_timesteps(n)
        grid = Grid.uniform_t(schedule, n, spacing=spacing, lambda_min_clipped=-5.1)
        assert grid.model_time.tolist() == scheduler.timesteps.tolist()
        assert grid.lam[0] >= -5.1


def test_a_strong_lambda_clip_gives_fewer_trailing_steps_as_in_diffusers():
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD, lambda_min_clipped=-1.0, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    grid = Grid.uniform_t(VP, 20, spacing="trailing", lambda_min_clipped=-1.0)
    assert grid.model_time.tolist() == scheduler.timesteps.tolist()
    assert grid.steps < 20


@pytest.mark.parametrize("spacing", SPACINGS)
def test_sigmas_of_integer_timesteps_equal_diffusers(spacing):
    grid = Grid.uniform_t(VP, 20, spacing=spacing)
    expected = theirs("DPMSolverMultistepScheduler", 20, timestep_spacing=spacing).sigmas.double()
    assert torch.allclose(grid.noise_levels, expected, rtol=RHO_TOLERANCE, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_terminal_sigma_min_ends_at_the_smallest_training_sigma(spacing):
    grid = Grid.uniform_t(VP, 12, spacing=spacing, terminal="sigma_min", offset=1)
    expected = theirs("DPMSolverMultistepScheduler", 12, timestep_spacing=spacing, final_sigmas_type="sigma_min")
    assert grid.noise_levels[-1].item() == pytest.approx(float(expected.sigmas[-1]), rel=RHO_TOLERANCE)
    assert grid.lam[-1].isfinite()
    assert grid.t[-1] == 0


# -- rules in sigma ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 3, 10, 33])
@pytest.mark.parametrize("rule", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_sigma_rules_equal_diffusers(name, rule, n):
    expected = theirs(name, n, **{f"use_{rule}_sigmas": True}).sigmas.double()
    grid = Grid.named(rule, VP, n)
    # a rule that is steep in its ends magnifies their error: karras by at most 1 (a mean of the ends in sigma^(1/7))
    assert torch.allclose(grid.noise_levels, expected, rtol=2 * RHO_TOLERANCE, atol=0)


@pytest.mark.parametrize("n", [2, 3, 10, 33])
def test_lu_lambdas_equal_diffusers(n):
    expected = theirs("DPMSolverMultistepScheduler", n, use_lu_lambdas=True).sigmas.double()
    assert torch.allclose(Grid.lu(VP, n).noise_levels, expected, rtol=2 * RHO_TOLERANCE, atol=0)
    assert torch.equal(Grid.lu(VP, n).lam, Grid.exponential(VP, n).lam)


@pytest.mark.parametrize("rule", ["karras", "exponential", "beta", "lu", "uniform_lambda"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rules_place_the_fed_time_where_the_noise_level_is(rule, name):
    """model_time and lambda of a rule say the same: the network is told the noise level that it really gets."""
    schedule = SCHEDULES[name]
    grid = Grid.named(rule, schedule, 7)
    told = schedule.lam(schedule.t_from_model_time(grid.model_time))
    first = 1 if grid.lam[0].isinf() else 0
    assert torch.allclose(told[first:], grid.lam[first:-1], rtol=1e-9, atol=1e-9)
    assert grid.lam[-1] == math.inf
    assert Grid.named(rule, schedule, 7, terminal="sigma_min").lam[-1].isfinite()


def test_uniform_lambda_is_uniform():
    for schedule in SCHEDULES.values():
        h = Grid.uniform_lambda(schedule, 9).lam.diff()
        assert torch.allclose(h, h[0].expand_as(h), rtol=1e-12)
        assert len(h) == 9


def test_edm_karras_equals_edm_euler():
    scheduler = diffusers.EDMEulerScheduler(sigma_schedule="karras")
    scheduler.set_timesteps(11)
    assert torch.allclose(Grid.karras(EDM(), 11).noise_levels, scheduler.sigmas.double(), rtol=32 * EPS32, atol=0)
    scheduler = diffusers.EDMEulerScheduler(sigma_schedule="exponential")
    scheduler.set_timesteps(11)
    assert torch.allclose(Grid.exponential(EDM(), 11).noise_levels, scheduler.sigmas.double(), rtol=32 * EPS32, atol=0)


def test_karras_exponent():
    for rho in (1.0, 3.0, 7.0):
        sigmas = Grid.karras(EDM(), 6, rho=rho, terminal="sigma_min").noise_levels
        root = sigmas ** (1 / rho)
        assert torch.allclose(root.diff(), root.diff()[0].expand(6), rtol=1e-9)
        assert sigmas[[0, -1]].tolist() == pytest.approx([80.0, 0.002], rel=1e-12)


def test_one_step_of_every_rule_goes_from_the_noisiest_to_the_end():
    for schedule in SCHEDULES.values():
        for rule in ("karras", "exponential", "beta", "lu", "uniform_lambda"):
            grid = Grid.named(rule, schedule, 1)
            assert grid.lam[0] == Grid.named(rule, schedule, 5).lam[0]
            assert grid.lam[1] == math.inf


def test_the_smallest_sigma_of_a_rule_can_be_chosen():
    for rule in (Grid.karras, Grid.exponential, Grid.beta, Grid.lu):
        for schedule in (VP, Flow(), EDM()):
            levels = rule(schedule, 7, low=0.2).noise_levels
            plain = rule(schedule, 7).noise_levels
            assert levels[-2].item() == pytest.approx(0.2, rel=1e-9)
            assert levels[0] == plain[0]
            assert levels[-1] == plain[-1] == 0
            ends = rule(schedule, 7, low=0.2, terminal="sigma_min").noise_levels
            assert ends[-1].item() == pytest.approx(0.2, rel=1e-9)
    for low in (0.0, -1.0, math.inf, 1e3):
        with pytest.raises(GridError, match=r"between 0 and the largest.*low="):
            Grid.karras(VP, 7, low=low)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("karras(rho=5, low=0.1)", lambda n: Grid.karras(VP, n, rho=5, low=0.1)),
        ("exponential(low=0.1)", lambda n: Grid.exponential(VP, n, low=0.1)),
        ("lu(low=0.1)", lambda n: Grid.lu(VP, n, low=0.1)),
        ("beta(a=1, b=0.8)", lambda n: Grid.beta(VP, n, a=1, b=0.8)),
        ("karras()", lambda n: Grid.karras(VP, n)),
    ],
)
def test_a_name_takes_the_options_of_its_rule(name, made):
    grid = Grid.named(name, VP, 6)
    assert torch.equal(grid.lam, made(6).lam)
    assert grid.name == name


# -- flow --------------------------------------------------------------------------------------------------------------
FLOWS = (
    {"shift": 1.0}, {"shift": 3.0}, {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"use_dynamic_shifting": True, "shift_terminal": 0.1}, {"shift": 3.0, "shift_terminal": 0.02},
)  # fmt: skip


@pytest.mark.parametrize("n", [2, 4, 5, 28])
@pytest.mark.parametrize("config", FLOWS, ids=str)
def test_flow_linspace_equals_flow_match_euler(config, n):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(n, mu=0.9)
    grid = Grid.uniform_t(schedule_from_config(dict(scheduler.config), mu=0.9), n, spacing="linspace")
    assert torch.allclose(grid.noise_levels, scheduler.sigmas.double(), rtol=8 * EPS32, atol=8 * EPS32)
    assert torch.allclose(grid.model_time, scheduler.timesteps.double(), rtol=8 * EPS32, atol=8000 * EPS32)


@pytest.mark.parametrize("n", [2, 4, 5, 28])
@pytest.mark.parametrize("config", FLOWS, ids=str)
def test_flow_trailing_equals_what_pipelines_ask_for(config, n):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / n, n).tolist(), mu=0.9)
    grid = Grid.uniform_t(schedule_from_config(dict(scheduler.config), mu=0.9), n, spacing="trailing")
    assert torch.allclose(grid.noise_levels, scheduler.sigmas.double(), rtol=8 * EPS32, atol=8 * EPS32)


@pytest.mark.parametrize("config", FLOWS, ids=str)
def test_one_flow_step_goes_from_one_to_zero(config):
    """diffusers' shift_terminal divides 0 by 0 here."""
    schedule = schedule_from_config({"prediction_type": "flow_prediction", **config}, 0.9)
    assert Grid.uniform_t(schedule, 1, spacing="trailing").noise_levels.tolist() == [1.0, 0.0]


# -- Align Your Steps --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", sorted(AYS_SIGMAS))
def test_ays_is_the_published_list_at_ten_steps_and_log_linear_otherwise(family):
    grid = Grid.named(f"ays:{family}", ContinuousVP(), 10)
    assert grid.noise_levels.tolist() == pytest.approx([*AYS_SIGMAS[family], 0.0], rel=1e-12)
    for n in (1, 2, 7, 25):
        sigmas = Grid.ays(ContinuousVP(), n, family=family).noise_levels[:-1]
        at = np.linspace(0, 9, n)
        expected = np.exp(np.interp(at, np.arange(10), np.log(AYS_SIGMAS[family])))
        assert sigmas.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("family", "key"), [("sd", "StableDiffusionTimesteps"), ("sdxl", "StableDiffusionXLTimesteps")]
)
def test_ays_is_where_diffusers_published_timesteps_are(family, key):
    """The authors' timesteps are these sigmas rounded to an index, so they may differ by one."""
    grid = Grid.ays(VP, 10, family=family)
    assert (grid.model_time - f64([float(t) for t in AysSchedules[key]])).abs().max() <= 1


def test_ays_refuses_flow_and_unknown_lists():
    with pytest.raises(GridError, match="flow"):
        Grid.ays(Flow(), 10)
    with pytest.raises(GridError, match="'sd3'"):
        Grid.named("ays:sd3", VP, 10)
