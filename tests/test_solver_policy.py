"""Which order each step of a run has, as in diffusers, and which options a solver takes."""

import math

import diffusers
import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.samplers import DDIM, DEIS, DPMSolver, Grid, UniPC
from tests.solver_fixtures import FULL, SCHEDULES, SD, VP


# -- orders --------------------------------------------------------------------------------------------------------------
class RecordingDPM(diffusers.DPMSolverMultistepScheduler):
    """Notes which update diffusers' own scheduler makes."""

    def dpm_solver_first_order_update(self, *args, **kwargs):
        self.made.append(1)
        return super().dpm_solver_first_order_update(*args, **kwargs)

    def multistep_dpm_solver_second_order_update(self, *args, **kwargs):
        self.made.append(2)
        return super().multistep_dpm_solver_second_order_update(*args, **kwargs)

    def multistep_dpm_solver_third_order_update(self, *args, **kwargs):
        self.made.append(3)
        return super().multistep_dpm_solver_third_order_update(*args, **kwargs)


class RecordingUniPC(diffusers.UniPCMultistepScheduler):
    def multistep_uni_p_bh_update(self, *args, **kwargs):
        self.made.append(self.this_order)
        return super().multistep_uni_p_bh_update(*args, **kwargs)


class RecordingDEIS(diffusers.DEISMultistepScheduler):
    def deis_first_order_update(self, *args, **kwargs):
        self.made.append(1)
        return super().deis_first_order_update(*args, **kwargs)

    def multistep_deis_second_order_update(self, *args, **kwargs):
        self.made.append(2)
        return super().multistep_deis_second_order_update(*args, **kwargs)

    def multistep_deis_third_order_update(self, *args, **kwargs):
        self.made.append(3)
        return super().multistep_deis_third_order_update(*args, **kwargs)


def orders_of(scheduler, n):
    scheduler.made = []
    scheduler.set_timesteps(n)
    x = torch.zeros(1, 1)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    return scheduler.made


numpy_2 = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


@numpy_2
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("euler", [True, False])
@pytest.mark.parametrize("lowering", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_orders_are_those_of_diffusers(order, lowering, euler, final):
    theirs = RecordingDPM(
        **SD, solver_order=order, lower_order_final=lowering, euler_at_final=euler, final_sigmas_type=final
    )
    ours = DPMSolver(order=order, lower_order_final=lowering, euler_at_final=euler)
    for n in (1, 2, 3, 4, 5, 13, 14, 15, 16):
        grid = Grid.uniform_t(VP, n, spacing="linspace", terminal=final)
        assert ours.orders(grid) == orders_of(theirs, n), n


@numpy_2
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_orders_are_those_of_diffusers(order):
    theirs = RecordingUniPC(**SD, solver_order=order)
    for n in (1, 2, 3, 4, 5, 14, 15, 16):
        grid = Grid.uniform_t(VP, n, spacing="linspace")
        assert UniPC(order=order).orders(grid) == orders_of(theirs, n), n


@numpy_2
@pytest.mark.parametrize("lowering", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_orders_are_those_of_diffusers(order, lowering):
    theirs = RecordingDEIS(**SD, solver_order=order, lower_order_final=lowering)
    for n in (1, 2, 3, 4, 5, 14, 15, 16):
        grid = Grid.uniform_t(VP, n, spacing="linspace", terminal="sigma_min")
        assert DEIS(order=order, lower_order_final=lowering).orders(grid) == orders_of(theirs, n), n


def test_rows_read_as_many_outputs_as_their_order_says():
    grid = Grid.karras(VP, 6)
    for solver in (DPMSolver(order=3), DEIS(order=4, **FULL), DPMSolver(order=2, **FULL)):
        plan = solver.compile(VP, grid)
        assert (plan.output != 0).sum(1).tolist() == solver.orders(grid)
    # the corrector of the interval before reads one output more than its predictor did, one step further back
    grid = Grid.karras(VP, 6, terminal="sigma_min")
    orders = UniPC(order=2).orders(grid)
    read = (UniPC(order=2).compile(VP, grid).output != 0).sum(1).tolist()
    assert read == [1, *(max(now, before + 1) for now, before in zip(orders[1:], orders[:-1], strict=True))]


def test_steps_at_infinite_lambdas_are_of_first_order():
    grid = Grid.uniform_t(SCHEDULES["flow"], 6, spacing="trailing")
    assert DPMSolver(order=3, **FULL).orders(grid) == [1, 2, 3, 3, 3, 1]
    plan = DPMSolver(order=3, **FULL).compile(SCHEDULES["flow"], grid)
    assert plan.output[1, 1] == 0, "an output at lambda = -inf has no weight"
    assert plan.output[2, 2] == 0


# -- options -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"order": 0}, {"order": 4}, {"order": True}, {"order": 2.0}, {"basis": "velocity"}, {"solver_type": "trapezoid"},
        {"third_order": "half"}, {"eta": -0.1}, {"eta": 1.0, "basis": "noise"}, {"eta": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_dpm_options_are_refused(options):
    with pytest.raises(FewstepError):
        DPMSolver(**options)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (DDIM, {"eta": 1.5}), (DDIM, {"eta": math.nan}), (DDIM, {"order": 2}), (DDIM, {"basis": "noise"}),
        (DEIS, {"order": 5}), (DEIS, {"basis": "data"}), (DEIS, {"variable": "time"}),
        (UniPC, {"solver_type": "bh3"}), (UniPC, {"order": 6}),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_options_are_refused(solver, options):
    with pytest.raises(FewstepError):
        solver(**options)


def test_solvers_are_values():
    assert UniPC(order=3) == UniPC(order=3)
    assert len({UniPC(order=3), UniPC(order=3), UniPC(order=2)}) == 2
    assert str(DPMSolver(order=3, solver_type="heun")) == "DPMSolver(order=3, solver_type='heun')"
    assert str(DDIM()) == "DDIM()"
