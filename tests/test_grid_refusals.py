"""Grids of bad input: refused with the index, the value or the nearest name."""

import math
import re

import pytest

from fewstep.errors import FewstepError, GridError
from fewstep.samplers import DPMSolver, Grid
from fewstep.samplers.schedule import EDM, Flow
from tests.grid_fixtures import SPACINGS, VP


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
