"""Runs of the executor: noise sample by sample, precision, and independence of one another."""

import copy
from dataclasses import replace

import pytest
import torch

from fewstep.errors import FewstepError
from fewstep.samplers import DDIM, DEIS, DPMSolver, Executor, Grid, Run, UniPC, sample
from fewstep.samplers.executor import draw
from fewstep.samplers.schedule import EDM, Flow, f64
from tests.executor_fixtures import MIXTURE, SDE
from tests.solver_fixtures import FULL, VP, in_threads, normal


# -- noise -------------------------------------------------------------------------------------------------------------
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

    def work(s):
        return walk(executor, Run(), normal(2, 4, seed=s), 8, s)

    expected = [work(s) for s in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(in_threads(work, 4), expected, strict=True))


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
