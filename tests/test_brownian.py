"""Brownian paths: the law of the increments, halves that add up, independence of batch and order, strong convergence."""

import copy
import itertools
import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError
from fewstep.samplers import DDIM, BrownianPath, DPMSolver, Executor, Grid, Run, brownian, sample
from fewstep.samplers.schedule import EDM, Flow, f64
from fewstep.samplers.testing import GaussianMixture
from tests.executor_fixtures import MIXTURE
from tests.solver_fixtures import SD, VP, normal
from tests.tensor_fixtures import generators

SDE = DPMSolver(order=1, eta=1.0, lower_order_final=False)
LIKE = torch.zeros(1, 3, 5, dtype=torch.float64)


def clock(lam, rate=1.0):
    return math.exp(2 * rate * lam)


@pytest.mark.parametrize("rate", [0.25, 1.0, 2.0])
def test_increments_add_up(rate):
    """W is one function: unnormalised increments of the parts sum to that of the whole."""
    path = BrownianPath([7], rate=rate)
    lams = [-2.0, -1.25, 0.5, 0.75, 3.0]
    span = lambda a, b: path.increment(a, b, LIKE) * math.sqrt(clock(b, rate) - clock(a, rate))  # noqa: E731
    parts = sum(span(a, b) for a, b in itertools.pairwise(lams))
    assert torch.allclose(parts, span(lams[0], lams[-1]), rtol=1e-12, atol=1e-12 * clock(3.0, rate))


def test_increments_are_independent_standard_normals():
    """Means of n = 4096 normals lie within 5/sqrt(n) of 0, their second moments within 5 sqrt(2/n) of 1, products within
    5/sqrt(n) of 0: five standard deviations each (about 1e-6 a comparison)."""
    like, n = torch.zeros(4, 32, 32, dtype=torch.float64), 4096
    path = BrownianPath([1, 2, 3, 4])
    lams = [-20.0, -3.0, -2.9, -1.0, 0.0, 0.4, 2.0, 5.0]  # the first lies outside the range, as lambda = -inf does
    draws = [path.increment(a, b, like).flatten() for a, b in itertools.pairwise(lams)]
    draws += [path.increment(2.0, -1.0, like, lap=1).flatten()]
    for i, a in enumerate(draws):
        assert abs(a.mean()) < 5 / math.sqrt(n)
        assert abs(a.square().mean() - 1) < 5 * math.sqrt(2 / n)
        assert all(abs((a * b).mean()) < 5 / math.sqrt(n) for b in draws[:i])
    one, two = draws[0].reshape(4, -1)[:2]
    assert abs((one * two).mean()) < 5 / math.sqrt(n / 4)


@pytest.mark.parametrize("schedule", [VP, Flow(), EDM()], ids=lambda s: s.family)
def test_the_noise_of_two_half_steps_is_that_of_the_whole(schedule):
    """With x0 predicted constant the SDE's rows are exact, so one step and any split of it end at the same state.

    Rounding: W is known to lambda's resolution exactly (both ask for the same points), so only float64 sums differ.
    """
    ends = {"vp": (-1.5, 1.25), "flow": (-math.inf, 2.0), "ve": (-4.0, 3.0)}[schedule.family]
    start = max(ends[0], -3.0)
    splits = [ends], [ends[0], 0.25, ends[1]], [ends[0], start + 0.5, 0.25, 0.5, ends[1]]
    x, results = normal(2, 6), []
    for lams in splits:
        lams = list(lams[0]) if isinstance(lams[0], tuple) else lams
        plan = SDE.compile(schedule, Grid.lambdas(schedule, lams))
        assert plan.has_noise
        run, executor, y, path = Run(), Executor(plan), x, BrownianPath([3, 4])
        for i in range(plan.steps):
            y = executor.advance(run, _raw_of_zero(plan, i, y), y, generator=path)
        results.append(y)
    assert torch.allclose(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert torch.allclose(results[0], results[2], rtol=1e-12, atol=1e-12)
    assert (results[0] - sigma_ratio(schedule, ends) * x).norm() > 0.1  # there was noise to agree on


def _raw_of_zero(plan, i, x):
    """The network's output where it predicts x0 = 0."""
    alpha, sigma = plan.alpha[i], plan.sigma[i]
    if plan.prediction == "epsilon":
        return x / sigma
    if plan.prediction == "flow_prediction":
        return x / sigma
    assert plan.prediction == "edm"
    s = plan.sigma_data
    assert alpha == 1
    return -(s**2 / (s**2 + sigma**2)) * x / (sigma * s / torch.sqrt(sigma**2 + s**2))


def sigma_ratio(schedule, ends):
    sigma = Grid.lambdas(schedule, list(ends)).sigma
    return float(sigma[1] / sigma[0])


def test_a_sample_depends_on_its_seed_alone():
    like = torch.zeros(3, 4, 4)
    whole = BrownianPath([5, 6, 7]).increment(-1, 1, like)
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(whole[i : i + 1], BrownianPath([seed]).increment(-1, 1, like[:1]))
    # nor does the order of the questions matter
    path = BrownianPath([5, 6, 7])
    path.increment(2, 3, like)
    path.increment(-3, 0.5, like)
    assert torch.equal(path.increment(-1, 1, like), whole)
    assert torch.equal(copy.deepcopy(path).increment(-1, 1, like), whole)
    # half precision is the same path, rounded
    assert torch.equal(path.increment(-1, 1, like.half()), whole.half())


def test_a_step_descends_the_tree_once(monkeypatch):
    """A row begins where the last one ended: its start is not looked for again."""
    draws, normals = [], brownian._normal
    monkeypatch.setattr(brownian, "_normal", lambda *args: draws.append(args) or normals(*args))
    path = BrownianPath([1], depth=12)
    for i in range(8):
        draws.clear()
        path.increment(i / 3, (i + 1) / 3, LIKE)
        assert len(draws) <= (2 if i == 0 else 1) * (12 + 2)


def test_threads_share_a_path():
    like = torch.zeros(2, 8)
    lams = [i / 4 for i in range(-8, 8)]
    expected = [BrownianPath([1, 2]).increment(a, b, like) for a, b in itertools.pairwise(lams)]
    path, wrong = BrownianPath([1, 2]), []

    def work():
        for (a, b), z in zip(itertools.pairwise(lams), expected, strict=True):
            if not torch.equal(path.increment(a, b, like), z):
                wrong.append((a, b))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


GAUSSIAN = GaussianMixture(normal(1, 32), f64([0.5]), f64([1.0]))
"""Linear, so that errors show their order at few steps."""
TIMES = 2.0 ** torch.arange(3, 6)


def refinement(solver, noise_of):
    """Errors at 8, 16, 32 steps against 256 of the same seeds, root mean square over 8 samples of 32 numbers."""
    x = normal(8, 32)

    def run(n):
        grid = Grid.lambdas(VP, torch.linspace(-2, 2, n + 1, dtype=torch.float64))
        return sample(GAUSSIAN.model(VP), x, solver.compile(VP, grid), generator=noise_of(n))

    fine = run(256)
    return torch.stack([(run(int(n)) - fine).square().mean().sqrt() for n in TIMES])


@pytest.mark.parametrize(
    ("solver", "rate"),
    [(SDE, 1.0), (DPMSolver(order=1, eta=0.5, lower_order_final=False), 0.5), (DDIM(eta=0.5), 1.0)],
    ids=str,
)
def test_refinement_converges_on_one_path(solver, rate):
    """Additive noise: freezing the output for a step is of strong order 1, as is weighting the noise a little wrongly
    (DDIM at eta = 0.5 on the clock of eta = 1). Errors are measured against 256 steps, whose own, 1/8 of the finest's,
    bends the slope by less than 0.1; 0.25 leaves room for 8 samples. Every step is a multiple of 2^-6 in lambda, which a path
    of depth 11 resolves exactly."""
    errors = refinement(solver, lambda n: BrownianPath(range(8), rate=rate, depth=11))
    slope = np.polyfit(np.log(TIMES), np.log(errors), 1)[0]
    assert abs(slope + 1) < 0.25, errors


def test_refinement_does_not_converge_on_independent_noise():
    errors = refinement(SDE, lambda n: torch.Generator().manual_seed(n))
    assert errors[-1] > 0.5 * errors[0]


def test_restarts_get_a_lap_of_their_own():
    grid = Grid.lambdas(VP, [-1.0, 0.0, 1.0])
    plan = SDE.compile(VP, grid)
    assert plan.noise_spans == ((pytest.approx(-1), pytest.approx(0), 0), (pytest.approx(0), pytest.approx(1), 0))
    # down to lambda = 1, back to 0 with noise and no call, down again
    order = [0, 1, 2, 1, 2]
    alpha, sigma = grid.alpha[order], grid.sigma[order]
    back = alpha[3] / alpha[2]
    restart = replace(
        plan,
        state=torch.cat([plan.state, back.reshape(1, 1), plan.state[1:]]),
        output=torch.cat([plan.output, torch.zeros(1, 1).double(), plan.output[1:]]),
        noise=torch.cat([plan.noise, torch.sqrt(sigma[3] ** 2 - (back * sigma[2]) ** 2).reshape(1), plan.noise[1:]]),
        constant=f64([0.0] * 4), alpha=alpha, sigma=sigma, model_time=plan.model_time[[0, 1, 0, 1]], in_scale=f64([1.0] * 4),
        evaluate=torch.tensor([True, True, False, True]), basis=("data",) * 4,
    ).validate()  # fmt: skip
    assert [span[2] for span in restart.noise_spans] == [0, 0, 1, 2]
    path, like = BrownianPath([1]), torch.zeros(1, 2048, dtype=torch.float64)
    draws = [path.draw(restart, i, like)[0] for i in (1, 2, 3)]
    for a, b in itertools.combinations(draws, 2):
        assert abs((a * b).mean()) < 5 / math.sqrt(2048)


def test_stages_start_where_they_restart():
    """A stage's row reads X_{i-1}: its noise is the increment from there, and so shares what the first stage has seen."""
    plan = SDE.compile(VP, Grid.lambdas(VP, [-1.0, 0.0, 1.0]))
    staged = replace(plan, state=torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double())
    assert [span[:2] for span in staged.noise_spans] == [
        (pytest.approx(-1), pytest.approx(0)),
        (pytest.approx(-1), pytest.approx(1)),
    ]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: BrownianPath([]), "one seed a sample"),
        (lambda: BrownianPath([-1]), "0 to 2\\^64 - 1, got \\[-1\\]"),
        (lambda: BrownianPath([1], rate=0), "got 0"),
        (lambda: BrownianPath([1], depth=60), "got 60"),
        (lambda: BrownianPath([1, 2]).increment(0, 1, LIKE), "2 seeds, the batch 1 samples"),
        (lambda: BrownianPath([1]).increment(0, 1e-7, LIKE), "larger depth"),
        (lambda: BrownianPath.from_generators([torch.Generator()], 2), "1 generators were given for a batch of 2"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(FewstepError, match=match):
        make()


# -- schedulers --------------------------------------------------------------------------------------------------------
def trajectory(scheduler, x, generators, steps, **kwargs):
    scheduler.set_timesteps(steps)
    network = MIXTURE.model(scheduler.schedule)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, generator=generators, **kwargs).prev_sample
    return x


def test_a_scheduler_with_a_path_refines_and_depends_on_its_seeds_alone():
    x = normal(3, 4)
    scheduler = samplers.DPMSolverScheduler(**SD, algorithm_type="sde-dpmsolver++", solver_order=1, brownian=True)
    plain = samplers.DPMSolverScheduler(**SD, algorithm_type="sde-dpmsolver++", solver_order=1)
    errors = {}
    for which in (scheduler, plain):
        fine = trajectory(which, x, generators(1, 2, 3), 200)
        errors[which] = [float((trajectory(which, x, generators(1, 2, 3), n) - fine).norm()) for n in (12, 50)]
    # strong order 1: a quarter of the error; between draws of independent noise there is no such thing
    assert errors[scheduler][1] < 0.5 * errors[scheduler][0]
    assert errors[plain][1] > 2 * errors[scheduler][1]
    whole = trajectory(scheduler, x, generators(1, 2, 3), 10)
    assert torch.equal(trajectory(scheduler, x, generators(1, 2, 3), 10), whole)
    assert torch.allclose(trajectory(scheduler, x[1:2], generators(2), 10), whole[1:2], rtol=1e-12)
    one = trajectory(scheduler, x, torch.Generator().manual_seed(0), 10)
    assert not torch.allclose(one[0] - whole[0], torch.zeros(4).double())


def test_given_noise_goes_before_the_path():
    x = normal(2, 4)
    make = lambda brownian: samplers.DDIMScheduler(**SD, eta=1.0, brownian=brownian)  # noqa: E731
    z = normal(2, 4, seed=5)
    with_path, without = (trajectory(make(b), x, generators(1, 2), 5, variance_noise=z) for b in (True, False))
    assert torch.equal(with_path, without)


def test_image_to_image_sees_the_same_path():
    """A run that begins at a later step draws what the whole run draws there, given the same seeds."""
    scheduler = samplers.DPMSolverScheduler(**SD, algorithm_type="sde-dpmsolver++", solver_order=1, brownian=True)
    scheduler.set_timesteps(6)
    whole, tail = scheduler.plan, scheduler.solver().compile(scheduler.schedule, scheduler.grid.tail(3))
    path = BrownianPath([9])
    for i in range(2):
        assert torch.equal(path.draw(tail, i, LIKE), path.draw(whole, i + 3, LIKE))
