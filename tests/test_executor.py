"""The executor: conversions, precision, noise, independence of runs, custom plans, compilation and gradients."""

import copy
import itertools
import math
import threading
from dataclasses import replace

import diffusers
import pytest
import torch

from fewstep.errors import FewstepError, PlanError
from fewstep.samplers import DDIM, DEIS, DPMSolver, Executor, Grid, NoiseSchedule, Run, SolverPlan, UniPC, sample
from fewstep.samplers.convert import Clip, DynamicThreshold, conversion
from fewstep.samplers.executor import draw
from fewstep.samplers.lagrange import lagrange_row
from fewstep.samplers.plan import plan_from_rows
from fewstep.samplers.schedule import EDM, Flow, f64
from fewstep.samplers.testing import GaussianMixture

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = NoiseSchedule.from_config(SD)
SCHEDULES = {
    "epsilon": VP,
    "sample": NoiseSchedule.from_config({**SD, "prediction_type": "sample"}),
    "v_prediction": NoiseSchedule.from_config({**SD, "prediction_type": "v_prediction"}),
    "flow_prediction": Flow(),
    "edm": EDM(),
    "edm_v": EDM(prediction="edm_v"),
}
FULL = {"lower_order_final": False}
MIXTURE = GaussianMixture.random(3, 4, seed=0)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def raw_of(prediction, x0, eps, alpha, sigma, s):
    """What the network answers at alpha x0 + sigma eps; the definitions, written out."""
    x = alpha * x0 + sigma * eps
    total = torch.sqrt(s**2 + sigma**2)
    edm = (x0 - s**2 / total**2 * x) * total / (s * sigma)
    return {
        "epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0,
        "edm": edm, "edm_v": -edm,
    }[prediction]  # fmt: skip


def velocity_plan(schedule, grid):
    """Euler's method on eps - x0."""
    points = grid.points()
    rows = [lagrange_row("velocity", "sigma", [s], s, t) for s, t in itertools.pairwise(points)]
    return plan_from_rows(schedule, grid, ["velocity"] * grid.steps, rows, method="euler", order=1).validate()


# -- conversions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("basis", ["data", "noise", "velocity"])
@pytest.mark.parametrize("prediction", SCHEDULES)
def test_conversion_is_the_algebra(prediction, basis):
    schedule = SCHEDULES[prediction]
    x0, eps = normal(5), normal(5, seed=1)
    for lam in (-3.0, -0.5, 0.0, 2.0, 4.0):
        grid = Grid.lambdas(schedule, [lam, lam + 1])
        alpha, sigma = grid.alpha[0], grid.sigma[0]
        raw = raw_of(prediction, x0, eps, alpha, sigma, schedule.sigma_data)
        a, b = conversion(prediction, basis, alpha, sigma, schedule.sigma_data)
        expected = {"data": x0, "noise": eps, "velocity": eps - x0}[basis]
        got = a * (alpha * x0 + sigma * eps) + b * raw
        # subtracting alpha x0 from x and dividing by sigma (or the other way round) loses 1/sigma or 1/alpha <= e^4
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("prediction", "basis"), [*((p, b) for p in SCHEDULES for b in ("data", "noise")), ("flow_prediction", "velocity")]
)
def test_x0_is_right_at_every_step(prediction, basis):
    schedule = SCHEDULES[prediction]
    grid = Grid.lambdas(schedule, [-2.0, -1.0, 0.0, 1.5, 3.0])
    compile_velocity = basis == "velocity"
    plan = velocity_plan(schedule, grid) if compile_velocity else DPMSolver(basis=basis).compile(schedule, grid)
    executor, run = Executor(plan), Run()
    x = normal(3, 2)
    for i in range(plan.steps):
        raw = normal(3, 2, seed=10 + i)
        p, q = conversion(prediction, "data", grid.alpha[i], grid.sigma[i], schedule.sigma_data)
        expected = p * x + q * raw
        x = executor.advance(run, raw, x)
        assert torch.allclose(executor.x0(run), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("prediction", SCHEDULES)
def test_an_identity_hook_changes_nothing(prediction, basis):
    schedule = SCHEDULES[prediction]
    plan = DPMSolver(order=2, basis=basis).compile(schedule, Grid.lambdas(schedule, [-2.0, -1.0, 0.0, 1.5, 3.0]))
    model = lambda x, t: torch.tanh(x)  # noqa: E731
    x = normal(3, 2)
    plain, hooked = sample(model, x, plan), sample(model, x, plan, hook=lambda x0: x0)
    assert torch.allclose(plain, hooked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("basis", ["data", "noise"])
def test_a_hook_sees_and_replaces_the_predicted_picture(basis):
    schedule = SCHEDULES["epsilon"]
    grid = Grid.karras(schedule, 5)
    plan = DPMSolver(order=2, basis=basis).compile(schedule, grid)
    target = normal(3, 2, seed=9)
    seen = []

    def hook(x0):
        seen.append(x0)
        return target

    # the network is overruled at every step, and the last step goes to sigma = 0, where nothing but x0 is left
    assert torch.allclose(sample(lambda x, t: x, normal(3, 2), plan, hook=hook), target, rtol=1e-10, atol=1e-10)
    x = plan.init_scale * normal(3, 2)
    assert torch.allclose(seen[0], (1 - grid.sigma[0]) / grid.alpha[0] * x, rtol=1e-12)


def test_impossible_conversions_are_refused_when_the_executor_is_made():
    plan = DPMSolver().compile(Flow(prediction="epsilon"), Grid.uniform_t(Flow(prediction="epsilon"), 3))
    with pytest.raises(PlanError, match="alpha = 0"):
        Executor(plan)


@pytest.mark.parametrize("max_value", [1.0, 1.5, 3.0, 100.0])
@pytest.mark.parametrize("ratio", [0.5, 0.995, 1.0])
def test_thresholding_equals_diffusers(ratio, max_value):
    theirs = diffusers.DDPMScheduler(dynamic_thresholding_ratio=ratio, sample_max_value=max_value)
    x0 = 2 * normal(3, 3, 8, 8, dtype=torch.float32)
    expected = theirs._threshold_sample(x0)
    assert torch.equal(DynamicThreshold(ratio, max_value)(x0), expected)


def test_thresholding_and_clipping_inside_a_run():
    schedule = SCHEDULES["epsilon"]
    plan = DDIM().compile(schedule, Grid.uniform_t(schedule, 4))
    model = lambda x, t: -x  # noqa: E731
    for hook in (DynamicThreshold(0.9), Clip(1.0)):
        assert sample(model, 3 * normal(2, 3, 4, 4), plan, hook=hook).abs().max() <= 1 + 1e-12
    assert sample(model, 3 * normal(2, 3, 4, 4), plan).abs().max() > 1


@pytest.mark.parametrize(("ratio", "max_value"), [(0.0, 1.0), (1.1, 1.0), (0.9, 0.5), (float("nan"), 1.0)])
def test_impossible_thresholds_are_refused(ratio, max_value):
    with pytest.raises(FewstepError, match="thresholding"):
        DynamicThreshold(ratio, max_value)


# -- noise -------------------------------------------------------------------------------------------------------------
SDE = DPMSolver(order=2, eta=1.0)


def test_samples_do_not_depend_on_their_batch():
    plan = SDE.compile(VP, Grid.karras(VP, 6))
    model, x = MIXTURE.model(VP), normal(8, 4)
    together = sample(model, x, plan, generator=[torch.Generator().manual_seed(100 + k) for k in range(8)])
    for k in range(8):
        alone = sample(model, x[k : k + 1], plan, generator=torch.Generator().manual_seed(100 + k))
        # the same additions in the same order; a batched softmax may round differently in its last bits
        assert torch.allclose(together[k : k + 1], alone, rtol=1e-12, atol=1e-12)


def test_draw_uses_one_generator_a_sample():
    like = torch.empty(3, 2, 2)
    g = [torch.Generator().manual_seed(k) for k in range(3)]
    expected = torch.cat([torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(k)) for k in range(3)])
    assert torch.equal(draw(like, g), expected)
    assert torch.equal(
        draw(like, torch.Generator().manual_seed(1)), torch.randn(3, 2, 2, generator=g[1].manual_seed(1))
    )
    with pytest.raises(FewstepError, match="2 generators were given for a batch of 3"):
        draw(like, g[:2])


def test_deterministic_plans_draw_nothing():
    g = torch.Generator().manual_seed(0)
    before, everywhere = g.get_state(), torch.get_rng_state()
    lam = f64([-2.0, 0.0, 1.0, 2.0]).requires_grad_()
    for grid in (Grid.karras(VP, 5), Grid.lambdas(VP, lam)):
        sample(MIXTURE.model(VP), normal(2, 4), DPMSolver().compile(VP, grid), generator=g)
    assert torch.equal(g.get_state(), before)
    assert torch.equal(torch.get_rng_state(), everywhere)


def test_given_noise_replaces_the_draw():
    plan = SDE.compile(VP, Grid.karras(VP, 3, terminal="sigma_min"))
    x, raw, z = normal(2, 4), normal(2, 4, seed=1), normal(2, 4, seed=2)
    executor = Executor(plan)
    quiet = executor.advance(Run(), raw, x, noise=torch.zeros_like(x))
    assert torch.allclose(executor.advance(Run(), raw, x, noise=z), quiet + plan.noise[0] * z, rtol=1e-14)


# -- precision ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [DDIM(), UniPC(order=2), DPMSolver(order=2, eta=1.0)], ids=str)
def test_a_step_is_computed_in_float32_or_better_and_cast_back(solver, dtype):
    grid = Grid.karras(VP, 6, terminal="sigma_min")
    plan = solver.compile(VP, grid)
    executor, run, exact = Executor(plan), Run(), Run()
    x = normal(64, dtype=dtype)
    for i in range(3):
        raw, z = normal(64, seed=i, dtype=dtype), normal(64, seed=20 + i, dtype=torch.float32)
        expected = executor.advance(exact, raw.double(), x.double(), noise=z)
        x = executor.advance(run, raw, x, noise=z)
        assert x.dtype == dtype
        # one rounding to dtype, and float32 rounding of 8 terms of at most `size`, relative to x0 = (x - sigma eps)/alpha
        size = (x.double().abs() + raw.double().abs()).max() * 20
        work = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        bound = 0.51 * torch.finfo(dtype).eps * expected.abs() + 8 * work * size
        assert ((x.double() - expected).abs() <= bound).all()
        exact = copy.deepcopy(exact)
        exact.outputs = {k: v.double() for k, v in run.outputs.items()}


def test_mixed_precision_of_network_and_state():
    plan = DPMSolver(order=2).compile(VP, Grid.karras(VP, 4))
    for state, network in (
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
    ):
        out = sample(lambda x, t, d=network: torch.tanh(x).to(d), normal(2, 4, dtype=state), plan)
        assert out.dtype == state
        assert out.isfinite().all()


def test_the_network_input_is_scaled_for_edm_only():
    for schedule in (VP, Flow(), EDM()):
        grid = Grid.karras(schedule, 3)
        plan = DDIM().compile(schedule, grid)
        executor, run, x = Executor(plan), Run(), normal(2, 4, dtype=torch.float32)
        scale = torch.rsqrt(grid.sigma[0] ** 2 + 0.25).item() if schedule.family == "ve" else 1.0
        assert torch.allclose(executor.model_input(run, x), x * scale, rtol=1e-6)
        assert (executor.model_input(run, x) is x) == (schedule.family != "ve")


# -- runs --------------------------------------------------------------------------------------------------------------
def walk(executor, run, x, steps, seed):
    for i in range(steps):
        x = executor.advance(run, torch.sin(x) + i, x, generator=torch.Generator().manual_seed(seed + run.i))
    return x


@pytest.mark.parametrize("solver", [UniPC(order=3), SDE, DEIS(order=4)], ids=str)
def test_interleaved_runs_equal_separate_ones(solver):
    plan = solver.compile(VP, Grid.karras(VP, 8))
    executor = Executor(plan)
    separate = [walk(executor, Run(), normal(2, 4, seed=s), 8, s) for s in (1, 2)]
    runs, states = [Run(), Run()], [normal(2, 4, seed=s) for s in (1, 2)]
    done = [0, 0]
    for k in (0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0):
        x, i = states[k], done[k]
        states[k] = executor.advance(
            runs[k], torch.sin(x) + i, x, generator=torch.Generator().manual_seed(k + 1 + runs[k].i)
        )
        done[k] += 1
    for x, expected in zip(states, separate, strict=True):
        assert torch.equal(x, expected)


def test_threads_share_an_executor():
    executor = Executor(UniPC(order=3).compile(VP, Grid.karras(VP, 8)))
    expected = [walk(executor, Run(), normal(2, 4, seed=s), 8, s) for s in range(4)]
    got = [None] * 4

    def work(s):
        got[s] = walk(executor, Run(), normal(2, 4, seed=s), 8, s)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_copied_run_goes_on_by_itself():
    executor = Executor(UniPC(order=3).compile(VP, Grid.karras(VP, 8)))
    run = Run()
    x = walk(executor, run, normal(2, 4), 4, 0)
    other = copy.deepcopy(run)
    expected = walk(executor, run, x, 4, 0)
    assert torch.equal(walk(executor, other, x, 4, 0), expected)


def test_a_run_changes_neither_plan_nor_inputs():
    plan = UniPC(order=3).compile(VP, Grid.karras(VP, 6))
    digest = plan.digest
    before = {name: getattr(plan, name).clone() for name in ("state", "output", "noise", "alpha", "sigma")}
    executor, run, x = Executor(plan), Run(), normal(2, 4)
    for i in range(6):
        raw = normal(2, 4, seed=i)
        kept, kept_raw = x.clone(), raw.clone()
        y = executor.advance(run, raw, x)
        assert torch.equal(x, kept)
        assert torch.equal(raw, kept_raw)
        x = y
    assert all(torch.equal(getattr(plan, name), value) for name, value in before.items())
    assert replace(plan).digest == digest


@pytest.mark.parametrize("basis", ["data", "noise"])
def test_history_is_a_copy_because_compiled_networks_reuse_their_memory(basis):
    """A network under CUDA graphs or with a static output buffer overwrites what it returned."""
    plan = DPMSolver(order=3, basis=basis).compile(VP, Grid.karras(VP, 6))
    buffer = torch.empty(2, 4, dtype=torch.float64)

    def reuses(x, t):
        return buffer.copy_(torch.sin(x) + t / 1000)

    expected = sample(lambda x, t: torch.sin(x) + t / 1000, normal(2, 4), plan)
    assert torch.equal(sample(reuses, normal(2, 4), plan), expected)


def test_stepping_past_the_end_is_refused():
    executor, run = Executor(DDIM().compile(VP, Grid.karras(VP, 2))), Run()
    x = walk(executor, run, normal(2, 4), 2, 0)
    with pytest.raises(FewstepError, match="2 rows are done"):
        executor.advance(run, x, x)


def test_x0_before_the_first_step_is_refused():
    executor = Executor(DDIM().compile(VP, Grid.karras(VP, 2)))
    with pytest.raises(FewstepError, match="no step"):
        executor.x0(Run())


def test_the_callback_sees_every_step():
    plan = DPMSolver().compile(VP, Grid.karras(VP, 4))
    seen = []
    out = sample(MIXTURE.model(VP), normal(2, 4), plan, callback=lambda i, x, x0: seen.append((i, x, x0)))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1], out)
    assert torch.allclose(seen[-1][2], out), "the last step ends at its own prediction"


@pytest.mark.parametrize(
    ("solver", "kept"),
    [(DDIM(), 0), (DPMSolver(order=2, **FULL), 1), (DPMSolver(order=3, **FULL), 2), (UniPC(order=3, **FULL), 3)],
    ids=str,
)
def test_a_run_forgets_what_nobody_reads_again(solver, kept):
    plan = solver.compile(VP, Grid.karras(VP, 10, terminal="sigma_min"))
    executor, run, x = Executor(plan), Run(), normal(2, 4)
    for i in range(10):
        x = executor.advance(run, torch.sin(x), x)
        assert len(run.outputs) == (min(kept, i + 1) if i < 9 else 0), "exactly those that a later row reads"
        assert not run.states


# -- plans by hand -----------------------------------------------------------------------------------------------------
def custom(schedule, grid, **changes):
    """A DDIM plan on ``grid`` with columns replaced."""
    return replace(DDIM().compile(schedule, grid), method="custom", **changes)


def heun_plan(schedule, lam):
    """EDM's Heun on x' = (x - x0)/sigma = eps: two rows a step, the second restarts from the state before the first."""
    sigma = torch.exp(-f64(lam))
    n = len(sigma) - 1
    h = sigma.diff()
    zero, one = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    stage = torch.stack  # rows 2k: X' = X + h m_2k; rows 2k + 1: X'' = X + h/2 (m_2k + m_2k+1)
    interleave = lambda a, b: stage([a, b], 1).reshape(-1)  # noqa: E731
    ends = sigma[1:]
    return SolverPlan(
        state=stage([interleave(one, zero), interleave(zero, one)], 1),
        output=stage([interleave(h, h / 2), interleave(zero, h / 2)], 1),
        noise=torch.zeros(2 * n, dtype=torch.float64),
        constant=torch.zeros(2 * n, dtype=torch.float64),
        alpha=torch.ones(2 * n + 1, dtype=torch.float64),
        sigma=torch.cat([sigma[:1], interleave(ends, ends)]),
        model_time=schedule.model_time(interleave(sigma[:-1], ends)),
        in_scale=schedule.in_scale(interleave(sigma[:-1], ends)),
        evaluate=torch.ones(2 * n, dtype=torch.bool),
        basis=("noise",) * (2 * n),
        prediction=schedule.prediction,
        schedule=schedule.identity(),
        fingerprint=schedule.fingerprint,
        method="heun",
        order=2,
        init_scale=float(sigma[0]),
        sigma_data=schedule.sigma_data,
    )


def test_a_plan_with_stages_is_heun_written_out():
    schedule = EDM()
    lam = [-2.0, -1.0, 0.0, 1.0, 2.0]
    plan = heun_plan(schedule, lam).validate()
    assert plan.base == (0, 0, 2, 2, 4, 4, 6, 6)
    x = normal(5, 4)
    got = sample(MIXTURE.model(schedule), x, plan)
    sigma = torch.exp(-f64(lam))
    x = x * sigma[0]
    one = torch.ones((), dtype=torch.float64)
    for s, t in itertools.pairwise(sigma):
        first = (x - MIXTURE.x0(x, one, s)) / s
        y = x + (t - s) * first
        x = x + (t - s) / 2 * (first + (y - MIXTURE.x0(y, one, t)) / t)
    assert torch.allclose(got, x, rtol=1e-12, atol=1e-12)


def test_a_run_forgets_states_too():
    plan = heun_plan(EDM(), [-2.0, -1.0, 0.0])
    executor, run, x = Executor(plan), Run(), normal(2, 4)
    sizes = []
    for _ in range(4):
        x = executor.advance(run, torch.sin(x), x)
        sizes.append((len(run.states), len(run.outputs)))
    assert sizes == [(1, 1), (0, 0), (1, 1), (0, 0)]


def renoising_plan():
    """DDIM with one more row after the second: sigma goes up again by fresh noise, without a call."""
    grid = Grid.lambdas(VP, [-2.0, 0.0, 1.0, 3.0])
    plan = DDIM().compile(VP, grid)
    back = grid.points()[1]  # from lambda = 1 back to lambda = 0
    low = grid.points()[2]
    ratio = back.alpha / low.alpha
    noise = math.sqrt(back.sigma**2 - (ratio * low.sigma) ** 2)
    last = lagrange_row("data", "lambda", [back], back, grid.points()[3])

    def insert(values, *more):
        return torch.cat([values[:2], torch.stack([f64(m) for m in more])])

    return replace(
        plan,
        state=insert(plan.state[:, 0], ratio, last.state)[:, None],
        output=insert(plan.output[:, 0], 0.0, last.outputs[0])[:, None],
        noise=insert(plan.noise, noise, 0.0),
        constant=torch.zeros(4, dtype=torch.float64),
        alpha=grid.alpha[[0, 1, 2, 1, 3]],
        sigma=grid.sigma[[0, 1, 2, 1, 3]],
        model_time=torch.stack([*grid.model_time[:2], grid.model_time[2], grid.model_time[1]]),
        in_scale=torch.ones(4, dtype=torch.float64),
        evaluate=torch.tensor([True, True, False, True]),
        basis=("data",) * 4,
        method="restart",
    )


def test_rows_without_a_call_follow_at_once():
    plan = renoising_plan().validate()
    assert plan.nfe == 3
    assert plan.steps == 4
    assert plan.has_noise
    executor, run, x = Executor(plan), Run(), normal(2, 4)
    assert executor.calls == (0, 1, 3)
    x = executor.advance(run, torch.sin(x), x)
    assert run.i == 1
    before = copy.deepcopy(run)
    z = normal(2, 4, seed=3)
    quiet = executor.advance(before, torch.sin(x), x, noise=torch.zeros_like(x))
    noisy = executor.advance(run, torch.sin(x), x, noise=z)
    assert run.i == 3
    assert torch.allclose(noisy - quiet, plan.noise[2] * z, rtol=1e-12, atol=1e-14)
    executor.advance(run, torch.sin(noisy), noisy)
    assert run.i == 4
    assert sample(MIXTURE.model(VP), normal(2, 4), plan, generator=torch.Generator().manual_seed(0)).isfinite().all()


def test_given_noise_is_used_once():
    """Where a noisy row is followed by a re-noising one, the second draws its own."""
    plan = renoising_plan()
    noisy = replace(plan, noise=torch.tensor([0.0, 0.3, 0.5, 0.0], dtype=torch.float64))
    executor, x, raw = Executor(noisy), normal(2, 4), normal(2, 4, seed=1)
    run = Run()
    x = executor.advance(run, raw, x)
    start = copy.deepcopy(run)
    z = normal(2, 4, seed=2)
    got = executor.advance(run, raw, x, noise=z, generator=torch.Generator().manual_seed(5))
    quiet = executor.advance(start, raw, x, noise=torch.zeros_like(x), generator=torch.Generator().manual_seed(5))
    assert torch.allclose(got - quiet, noisy.state[2, 0] * 0.3 * z, rtol=1e-12, atol=1e-14)


def test_the_constant_column_adds_its_tensor():
    plan = custom(VP, Grid.karras(VP, 3), constant=f64([0.5, 0.0, -0.25]))
    mu, x = normal(2, 4, seed=8), normal(2, 4)
    with pytest.raises(PlanError, match="constant"):
        Executor(plan)
    executor, run, plain, other = (
        Executor(plan, constant=mu),
        Run(),
        Executor(DDIM().compile(VP, Grid.karras(VP, 3))),
        Run(),
    )
    for i in range(3):
        raw = normal(2, 4, seed=i)
        y = executor.advance(run, raw, x)
        assert torch.allclose(y, plain.advance(other, raw, x) + plan.constant[i] * mu, rtol=1e-13, atol=1e-13)
        x = y


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
    schedule = SCHEDULES[name]
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
    schedule = SCHEDULES[name]
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
