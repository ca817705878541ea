"""What torch makes of a run: one graph to compile, and gradients of everything that a plan is made from."""

from dataclasses import replace

import pytest
import torch

from fewstep.samplers import DDIM, DEIS, DPMSolver, Executor, Grid, Run, UniPC, sample
from fewstep.samplers.schedule import f64
from tests.executor_fixtures import BY_PREDICTION, MIXTURE, SDE
from tests.solver_fixtures import FULL, VP, normal


# -- compilation -------------------------------------------------------------------------------------------------------
def small_network(x, t):
    return torch.tanh(x * 0.7 + t / 1000)


@pytest.mark.parametrize("solver", [DPMSolver(order=2), UniPC(order=3), DEIS(order=2)], ids=str)
def test_a_compiled_loop_equals_the_eager_one(solver):
    """The whole trajectory is one graph: coefficients are host floats, so nothing breaks it."""
    plan = solver.compile(VP, Grid.karras(VP, 5))
    executor = Executor(plan)
    times = plan.model_time.tolist()

    def trajectory(x):
        run = Run()
        for i in range(5):
            x = executor.advance(run, small_network(executor.model_input(run, x), times[i]), x)
        return x

    x = normal(2, 4, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(trajectory, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), trajectory(x), rtol=1e-6, atol=1e-6)
    assert torch.allclose(compiled(x), sample(small_network, x, plan), rtol=1e-6, atol=1e-6)


def test_sample_itself_compiles():
    plan = DPMSolver(order=2).compile(VP, Grid.karras(VP, 4))
    x = normal(2, 4, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: sample(small_network, x, plan), backend="eager")
    assert torch.allclose(compiled(x), sample(small_network, x, plan), rtol=1e-6, atol=1e-6)


# -- gradients ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "solver", [DDIM(), DPMSolver(order=2), DPMSolver(order=3, **FULL), UniPC(order=2), DEIS(order=3, variable="rho"),
               UniPC(order=2, solver_type="bh1", basis="noise")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["epsilon", "flow_prediction", "edm"])
def test_gradients_reach_the_grid(solver, name):
    """The inner lambdas move rows, conversions and told times; the outer two are fixed ends."""
    schedule = BY_PREDICTION[name]
    x, ends = normal(2, 4), f64([-1.5, 2.0])

    def trajectory(inner):
        grid = Grid.lambdas(schedule, torch.cat([ends[:1], inner, ends[1:]]))
        return sample(MIXTURE.model(schedule), x, solver.compile(schedule, grid))

    # inside the table's intervals, away from the knots at which a tabulated schedule's time has kinks
    inner = f64([-0.613, 0.217, 1.131]).requires_grad_()
    assert torch.autograd.gradcheck(trajectory, (inner,), eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "solver",
    [DDIM(eta=1.0), DDIM(eta=0.5), SDE, DPMSolver(order=3, **FULL), DPMSolver(basis="noise"), UniPC(order=3, **FULL),
     UniPC(order=2, solver_type="bh1", basis="noise"), DEIS(order=3, variable="rho")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["v_prediction", "flow_prediction", "edm"])
def test_gradients_survive_infinite_ends(solver, name):
    """From alpha = 0 where the family has it, and to sigma = 0: limits, whose naive derivatives are 0 times infinity."""
    schedule = BY_PREDICTION[name]
    x, start = normal(2, 4), f64([-1.5 if name == "edm" else -float("inf")])

    def trajectory(inner):
        grid = Grid.lambdas(schedule, torch.cat([start, inner, f64([float("inf")])]))
        plan = solver.compile(schedule, grid)
        return sample(small_network, x, plan, generator=torch.Generator().manual_seed(0))

    inner = f64([-1.013, 0.217, 1.131]).requires_grad_()
    assert torch.autograd.gradcheck(trajectory, (inner,), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_noise_column():
    lam = f64([-1.0, 0.2, 1.3]).requires_grad_()
    z = [normal(2, 4, seed=i) for i in range(2)]

    def trajectory(lam):
        executor, run, x = Executor(SDE.compile(VP, Grid.lambdas(VP, lam))), Run(), normal(2, 4)
        for i in range(2):
            x = executor.advance(run, torch.sin(x), x, noise=z[i])
        return x

    assert torch.autograd.gradcheck(trajectory, (lam,), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_coefficients():
    plan = UniPC(order=2).compile(VP, Grid.karras(VP, 4, terminal="sigma_min"))
    x = normal(2, 4)

    def trajectory(output, told):
        return sample(MIXTURE.model(VP), x, replace(plan, output=output, model_time=told))

    band = torch.ones_like(plan.output).tril(0).bool()
    output = plan.output.clone().requires_grad_()
    told = (plan.model_time + 0.37).requires_grad_()
    (slope,) = torch.autograd.grad(trajectory(output, told.detach()).sum(), output)
    assert (slope[plan.output != 0] != 0).all()
    direction = torch.where((plan.output != 0) & band, normal(*plan.output.shape, seed=4), 0.0)
    h = 1e-6
    with torch.no_grad():
        up, down = (trajectory(output + s * h * direction, told).sum() for s in (1, -1))
    (slope,) = torch.autograd.grad(trajectory(output, told.detach()).sum(), output)
    assert (slope * direction).sum().item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-5)
    assert torch.autograd.gradcheck(lambda t: trajectory(output.detach(), t), (told,), eps=1e-5, atol=1e-6, rtol=1e-3)


def test_gradients_reach_the_start_through_a_fixed_plan():
    plan = UniPC(order=3).compile(VP, Grid.karras(VP, 4))
    x = normal(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sample(MIXTURE.model(VP), x, plan), (x,), eps=1e-6, atol=1e-6)
