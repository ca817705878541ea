"""SA-Solver: UniPC where there is no noise, diffusers' with the same noise, and the right law of a Gaussian."""

import diffusers
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError
from fewstep.samplers import DPMSolver, Grid, NoiseSchedule, SASolver, UniPC
from tests.scheduler_fixtures import SD
from tests.tensor_fixtures import relative

SCHEDULE = NoiseSchedule.from_config(SD)


def same(one, other):
    """Whether rows differ by rounding alone: both are sums of a few products of numbers of size 1."""
    columns = ("state", "output", "noise")
    return all(torch.allclose(getattr(one, c), getattr(other, c), rtol=1e-12, atol=1e-13) for c in columns)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [6, 20])
def test_without_noise_it_is_unipc_with_bh1(order, steps):
    grid = Grid.named("trailing", SCHEDULE, steps)
    ours = SASolver(order, tau=0.0, corrector_order=order + 1, simplified=True).compile(SCHEDULE, grid)
    theirs = UniPC(order, solver_type="bh1").compile(SCHEDULE, grid)
    assert same(ours, theirs)


def test_without_a_corrector_it_is_dpm_solver_of_the_same_noise():
    grid = Grid.named("trailing", SCHEDULE, 12)
    for order in (1, 3):
        ours = SASolver(order, corrector_order=0, lower_order_below=15).compile(SCHEDULE, grid)
        theirs = DPMSolver(order, solver_type="heun", eta=1.0).compile(SCHEDULE, grid)
        assert same(ours, theirs)


@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (1, 2), (2, 2), (3, 1), (3, 3), (2, 4)])
@pytest.mark.parametrize("window", [True, False])
def test_it_equals_diffusers_with_the_same_noise(net, noise, predictor, corrector, window):
    config = {**SD, "predictor_order": predictor, "corrector_order": corrector}
    published = {"simplified": True, "disable_corrector": [], "final_sigmas_type": "sigma_min"}
    tau = None if window else (lambda t: torch.tensor(0.6))
    theirs = diffusers.SASolverScheduler(**config, tau_func=tau)
    own = {} if window else {"tau": 0.6, "tau_window": None}
    ours = samplers.SASolverScheduler(**config, **published, **own)
    drawn = [torch.Generator().manual_seed(5) for _ in range(2)]
    for s in (ours, theirs):
        s.set_timesteps(8)
    a = b = noise
    for t in ours.timesteps:
        a = ours.step(net(a, t), t, a, variance_noise=torch.randn(noise.shape, generator=drawn[0])).prev_sample
        b = theirs.step(net(b, t), t, b, generator=drawn[1]).prev_sample
    assert relative(a, b) < 1e-4  # theirs computes coefficients in float32


def test_noise_is_added_between_the_two_levels_alone():
    grid = Grid.named("trailing", SCHEDULE, 20)
    rho = grid.noise_levels[:-1]
    plan = SASolver(low=0.3, high=3.0).compile(SCHEDULE, grid)
    inside = (rho >= 0.3) & (rho <= 3.0)
    assert inside.any()
    assert (~inside).any()
    assert torch.equal(plan.noise != 0, inside)


def test_it_takes_over_a_config_of_diffusers(net, noise):
    theirs = diffusers.SASolverScheduler(**SD, predictor_order=3, corrector_order=4)
    ours = samplers.SASolverScheduler.from_config(theirs.config)
    ours.set_timesteps(6)
    assert ours.plan.method == str(ours.solver())
    assert ours.solver().order == 3
    assert ours.solver().corrector_order == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": -1.0}, "tau is -1.0; give a number of at least 0"),
        ({"corrector_order": 5}, "corrector_order is 5; give 0 .none. to 4"),
        ({"low": 2.0, "high": 1.0}, "noise between 2.0 and 1.0"),
        ({"basis": "noise"}, "basis of SASolver"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(FewstepError, match=said):
        SASolver(**options)


def test_bad_configs_are_refused():
    with pytest.raises(FewstepError, match="algorithm_type='data_prediction' alone, got 'noise_prediction'"):
        samplers.SASolverScheduler(algorithm_type="noise_prediction").set_timesteps(5)
    with pytest.raises(FewstepError, match=r"tau_window is .800, 200."):
        samplers.SASolverScheduler(tau_window=[800, 200]).set_timesteps(5)
