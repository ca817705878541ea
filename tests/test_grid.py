"""Grids against the timesteps and sigmas that diffusers computes, published lists, files and bad input."""

import json
import math
import random
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules

from fewstep.errors import ArtifactError, FewstepError, GridError
from fewstep.samplers import DEIS, DPMSolver, Grid, NoiseSchedule, UniPC
from fewstep.samplers.config import schedule_from_config
from fewstep.samplers.schedule import EDM, ContinuousVP, DiscreteVP, Flow, f64
from fewstep.samplers.spacing import AYS_SIGMAS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 about diffusers

EPS32 = torch.finfo(torch.float32).eps
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = NoiseSchedule.from_config(SD)
ZERO_SNR = NoiseSchedule.from_config({**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
SPACINGS = ("linspace", "leading", "trailing")
COUNTS = (1, 2, 3, 4, 5, 7, 10, 15, 20, 25, 26, 30, 47, 48, 50, 58, 61, 96, 100, 103, 112, 333, 500, 998, 999)
"""Many of these have ties such as 499.5 or strides that float64 does not represent."""
SCHEDULES = {"vp": VP, "zero-snr": ZERO_SNR, "svd": ContinuousVP(), "edm": EDM(), "flow": Flow(shift=3.0)}

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


# -- given values ------------------------------------------------------------------------------------------------------
def test_sigmas_are_taken_as_they_are_and_never_shifted():
    assert Grid.sigmas(Flow(shift=3.0), [1.0, 0.5, 0.25]).noise_levels.tolist() == pytest.approx([1.0, 0.5, 0.25, 0.0])
    assert Grid.sigmas(EDM(), [3.0, 1.0, 0.0]).steps == 2, "a list that ends at 0 gets no further end"


def test_timesteps_are_taken_as_they_are():
    grid = Grid.timesteps(VP, [999, 500.5, 1])
    assert grid.model_time.tolist() == [999.0, 500.5, 1.0]
    mean = (VP.log_rho[500] + VP.log_rho[501]) / 2
    assert grid.lam[1].item() == pytest.approx(-mean.item(), rel=1e-14)
    assert Grid.timesteps(Flow(), [1000, 250]).noise_levels.tolist() == pytest.approx([1.0, 0.25, 0.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_that_float32_rounded_beyond_the_range_are_its_ends(name):
    schedule = SCHEDULES[name]
    hi = schedule.model_time(f64([schedule.t_range[0]]))
    given = torch.nextafter(hi.float(), torch.tensor(math.inf)).double()
    grid = Grid.timesteps(schedule, given)
    assert grid.lam[0] == Grid.timesteps(schedule, hi).lam[0]
    assert torch.equal(grid.model_time, given)


def test_zero_snr_grid_starts_at_pure_noise():
    grid = Grid.uniform_t(ZERO_SNR, 5)
    assert grid.alpha[0] == 0
    assert grid.sigma[0] == 1
    assert grid.lam[1:].isfinite()[:-1].all()


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schedule", "sigmas", "message"),
    [
        (VP, [3.0, math.nan, 1.0], "sigma at index 1 is nan"),
        (VP, [3.0, 2.0, 2.0], "repeats at index 2"),
        (VP, [3.0, 1.0, 2.0], "increases at index 2"),
        (VP, [1.0, 0.0, 0.0], "repeats at index 2"),
        (VP, [3.0, -1.0], "sigma at index 1 is -1"),
        (Flow(), [1.5, 0.5], "between 0 and 1"),
        (Flow(), [math.inf, 0.5], "index 0 is inf"),
        (VP, [], "at least one sigma"),
        (VP, [0.0], "N [+] 1 times"),
    ],
)
def test_bad_sigmas_are_refused_with_their_index(schedule, sigmas, message):
    with pytest.raises(GridError, match=message):
        Grid.sigmas(schedule, sigmas)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([999, math.nan], "index 1 is nan"),
        ([1000, 5], "index 0 is 1000"),
        ([999, -3], "index 1 is -3"),
        ([999, 500, 500], "repeats at index 2"),
        ([999, 500, 600], "increases at index 2"),
        ([], "at least one|N >= 1"),
    ],
)
def test_bad_timesteps_are_refused_with_their_index(timesteps, message):
    with pytest.raises(GridError, match=message):
        Grid.timesteps(VP, timesteps)


@pytest.mark.parametrize("lam", [[0.0, math.nan], [1.0, 0.0], [0.0, 0.0], [0.0], [], [-math.inf, -math.inf, 0.0]])
def test_bad_lambdas_are_refused(lam):
    with pytest.raises(GridError):
        Grid.lambdas(VP, lam)


@pytest.mark.parametrize("n", [0, -1, True, 2.0, "5", None])
@pytest.mark.parametrize("rule", ["trailing", "karras", "uniform_lambda", "ays"])
def test_bad_step_counts_are_refused(rule, n):
    with pytest.raises(GridError, match="positive integer"):
        Grid.named(rule, VP, n)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_more_steps_than_training_timesteps_are_refused(spacing):
    with pytest.raises(GridError, match="at most 999"):
        Grid.uniform_t(VP, 1000, spacing=spacing)
    with pytest.raises(GridError, match="at most 1000"):
        Grid.uniform_t(VP, 1001, spacing=spacing, convention="ddim")


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(GridError, match=r"'karas'; did you mean 'karras'\?"):
        Grid.named("karas", VP, 5)
    with pytest.raises(GridError, match="'ending'"):
        Grid.uniform_t(VP, 5, spacing="ending")
    with pytest.raises(GridError, match="'one'"):
        Grid.sigmas(VP, [1.0], terminal="one")
    with pytest.raises(GridError, match="leading"):
        Grid.uniform_t(Flow(), 5, spacing="leading")
    with pytest.raises(GridError, match="training timesteps"):
        Grid.uniform_t(EDM(), 5)


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("karras(rh=5)", "did you mean 'rho'"),
        ("karras(rho=0)", "positive number, got 0"),
        ("karras(low=true)", "positive number, got True"),
        ("karras(5)", "key=value"),
        ("exponential(rho=5)", "unknown option of the grid exponential 'rho'"),
        ("uniform_lambda(low=1)", "the grid uniform_lambda takes no options"),
        ("karass(rho=5)", "did you mean 'karras'"),
    ],
)
def test_bad_options_of_a_name_are_refused(name, message):
    with pytest.raises(FewstepError, match=re.escape(message)):
        Grid.named(name, VP, 6)


def test_the_grid_of_another_schedule_is_refused_by_solvers():
    with pytest.raises(GridError, match="not for"):
        DPMSolver().compile(VP, Grid.karras(EDM(), 5))


def test_model_times_of_another_number_are_refused():
    with pytest.raises(GridError, match="3 lambdas and 3 model times"):
        Grid.karras(VP, 2).with_model_time([3.0, 2.0, 1.0])
    with pytest.raises(GridError, match="NaN"):
        Grid.karras(VP, 2).with_model_time([3.0, math.nan])


# -- tail, order, text -------------------------------------------------------------------------------------------------
def test_tail_is_the_end_of_the_grid():
    grid = Grid.karras(VP, 6)
    tail = grid.tail(2)
    assert tail.steps == 4
    assert torch.equal(tail.lam, grid.lam[2:])
    assert torch.equal(tail.model_time, grid.model_time[2:])
    assert torch.equal(grid.tail(0).lam, grid.lam)
    for begin in (-1, 6, 7):
        with pytest.raises(GridError, match=f"begin index {begin}"):
            grid.tail(begin)


def test_a_grid_is_a_sequence_of_points():
    grid = Grid.karras(VP, 3)
    points = list(grid)
    assert len(grid) == 3
    assert len(points) == 4
    for i, p in enumerate(points):
        assert p.lam == grid.lam[i]
        assert p.alpha == grid.alpha[i]
        assert p.sigma == grid.sigma[i]
        assert p.rho == pytest.approx(grid.noise_levels[i].item(), rel=1e-12)
    assert len(str(grid).splitlines()) == 5


# -- files -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULES)
def test_saved_grids_keep_every_bit(name, tmp_path):
    schedule = SCHEDULES[name]
    for grid in (Grid.karras(schedule, 7), Grid.uniform_lambda(schedule, 5)):
        grid.save(tmp_path / "grid.json")
        again = Grid.load(tmp_path / "grid.json", schedule)
        for what in ("t", "lam", "model_time"):
            assert torch.equal(getattr(again, what), getattr(grid, what)), what
        assert again.name == grid.name
        assert again.schedule == schedule


@pytest.mark.parametrize("spacing", SPACINGS)
def test_saved_grids_of_training_timesteps_keep_every_bit_that_counts(spacing, tmp_path):
    """t is recomputed from lambda; its error is eps |lambda| over the slope of at least 0.001 an index."""
    grid = Grid.uniform_t(VP, 20, spacing=spacing)
    grid.save(tmp_path / "grid.json")
    again = Grid.load(tmp_path / "grid.json", VP)
    assert torch.equal(again.lam, grid.lam)
    assert torch.equal(again.model_time, grid.model_time)
    assert torch.allclose(again.t, grid.t, rtol=0, atol=1e-11)


def test_infinities_of_both_ends_survive_a_file(tmp_path):
    grid = Grid.uniform_t(ZERO_SNR, 4)
    assert grid.lam[[0, -1]].tolist() == [-math.inf, math.inf]
    grid.save(tmp_path / "grid.json")
    assert torch.equal(Grid.load(tmp_path / "grid.json", ZERO_SNR).lam, grid.lam)
    json.loads((tmp_path / "grid.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_told_time_that_differs_from_the_real_one_survives_a_file(tmp_path):
    grid = Grid.karras(VP, 3).with_model_time([990.25, 400.125, 0.1])
    grid.save(tmp_path / "grid.json")
    again = Grid.load(tmp_path / "grid.json", VP)
    assert again.model_time.tolist() == [990.25, 400.125, 0.1]
    assert torch.equal(again.lam, Grid.karras(VP, 3).lam)
    plan = DPMSolver().compile(VP, again)
    assert plan.model_time.tolist() == [990.25, 400.125, 0.1]


def test_named_loads_a_file_and_checks_its_length(tmp_path):
    path = str(tmp_path / "grid.json")
    Grid.karras(VP, 3).save(path)
    assert torch.equal(Grid.named(path, VP, 3).lam, Grid.karras(VP, 3).lam)
    with pytest.raises(GridError, match="3 steps, 4"):
        Grid.named(path, VP, 4)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "grid.json"
    with pytest.raises(ArtifactError, match="does not exist"):
        Grid.load(path, VP)
    Grid.karras(VP, 3).save(path)
    with pytest.raises(ArtifactError, match="made for"):
        Grid.load(path, EDM())
    good = json.loads(path.read_text())
    for change, message in (
        ({"schema_version": 99}, "version 99"),
        ({"kind": "SolverPlan"}, "SolverPlan"),
        ({"more": 1}, "unknown keys more"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ArtifactError, match=message):
            Grid.load(path, VP)
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "lam"}))
    with pytest.raises(ArtifactError, match="lacks lam"):
        Grid.load(path, VP)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArtifactError, match="not a readable JSON"):
        Grid.load(path, VP)
    for lam in ("oops", [1.0, "oops"], [[1.0]], None):
        path.write_text(json.dumps({**good, "lam": lam}))
        with pytest.raises((ArtifactError, GridError)):
            Grid.load(path, VP)


# -- near-duplicates ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_give_finite_coefficients_and_duplicates_are_refused(name, seed):
    """Random lambdas, some of them 1e-6 apart: the compiler's own check of every row must still hold."""
    schedule = SCHEDULES[name]
    rng = random.Random(seed)
    low, high = -4.0, 4.5
    lam = sorted(rng.uniform(low, high) for _ in range(6))
    lam = sorted([*lam, *(x + 1e-6 for x in rng.sample(lam, 3))])
    grid = Grid.lambdas(schedule, [*lam, math.inf])
    for solver in (
        DPMSolver(order=2), DPMSolver(order=3), DPMSolver(order=2, solver_type="heun", eta=1.0), UniPC(order=3),
        UniPC(order=2, solver_type="bh1", basis="noise"), DEIS(order=3), DEIS(order=3, variable="rho"),
    ):  # fmt: skip
        plan = solver.compile(schedule, grid)
        assert plan.output.isfinite().all()
        assert plan.problems() == []
    i = rng.randrange(len(lam))
    with pytest.raises(GridError, match=f"repeats at index {i + 1}"):
        Grid.lambdas(schedule, [*lam[: i + 1], *lam[i:]])


def test_gradients_reach_the_lambdas_of_a_grid():
    lam = f64([-2.0, 0.0, 2.0]).requires_grad_()
    for schedule in SCHEDULES.values():
        grid = Grid.lambdas(schedule, lam)
        (gradient,) = torch.autograd.grad(grid.model_time.sum() + grid.alpha.sum() + grid.sigma.sum(), lam)
        assert gradient.isfinite().all()
        assert (gradient != 0).all() or isinstance(schedule, DiscreteVP)
