"""DC-Solver: the published loop, what ratios do to rows, their files, and the scheduler."""

import json
import math

import pytest
import torch

from fewstep import samplers
from fewstep.errors import ArtifactError, FewstepError, GridError
from fewstep.samplers import DEIS, DCSolver, DPMSolver, Grid, HeavyBall, UniPC, sample
from fewstep.samplers.solvers.dc_solver import lagrange_basis, load_ratios, save_ratios
from tests.solver_fixtures import (
    FULL,
    GAUSSIAN,
    LAM,
    MIXTURE,
    SCHEDULES,
    SD,
    VP,
    assert_same_rows,
    error_at,
    nonlinear,
    normal,
    problem,
    run_eps,
    starting_grid,
)

RATIOS = (1.0, 1.0, 0.93, 1.08, 0.8, 1.2, 1.03, 0.97, 1.1)


# -- the published loop ---------------------------------------------------------------------------------------------------
def dc_loop(model, x, grid, ratios, k, corrected):
    """UniPC-2 bh2 in the data basis with compensation, step by step: a buffer that is overwritten, as the paper says."""
    lam, t = grid.lam.tolist(), grid.t.tolist()
    alpha, sigma = grid.alpha.tolist(), grid.sigma.tolist()
    buffer, times, order, base = [], [], 0, x

    def update(i, x, p, newest=None):
        h = lam[i + 1] - lam[i]
        phi = math.expm1(-h)
        out = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * phi * buffer[0]
        if newest is None:
            if p == 2:
                r = (lam[i - 1] - lam[i]) / h
                out = out - alpha[i + 1] * phi * 0.5 * (buffer[1] - buffer[0]) / r
            return out
        if p == 1:
            return out - alpha[i + 1] * phi * 0.5 * (newest - buffer[0])
        r = (lam[i - 1] - lam[i]) / h
        rhs = torch.tensor([phi / -h - 1, (phi / -h - 1) / -h - 0.5], dtype=torch.float64)
        rhs = rhs * torch.tensor([1.0, 2.0]) / phi
        rho = torch.linalg.solve(torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64), rhs)
        return out - alpha[i + 1] * phi * (rho[0] * (buffer[1] - buffer[0]) / r + rho[1] * (newest - buffer[0]))

    for i in range(grid.steps):
        m = (x - sigma[i] * model(x, i)) / alpha[i]
        if i and corrected:
            x = update(i - 1, base, order, newest=m)
        base = x
        buffer, times = [m, *buffer], [t[i], *times]
        if i >= k and ratios[i] != 1:
            at = ratios[i] * times[0] + (1 - ratios[i]) * times[1]
            total = torch.zeros_like(m)
            for a in range(k + 1):
                term = buffer[a]
                for b in range(k + 1):
                    if b != a:
                        term = term * (at - times[b]) / (times[a] - times[b])
                total = total + term
            buffer[0] = total
        order = min(2, i + 1)
        x = update(i, base, order)
    return x


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_equal_the_published_loop(k, corrected):
    grid = Grid.lambdas(VP, LAM)
    disabled = () if corrected else tuple(range(20))
    solver = DCSolver(UniPC(disable_corrector=disabled, **FULL), RATIOS, compensation_order=k)
    start = normal(5)
    x = run_eps(solver.compile(VP, grid), start)
    expected = dc_loop(nonlinear, start, grid, RATIOS, k, corrected)
    # a Lipschitz constant of about 5 over 9 steps magnifies rounding by at most 1e4
    assert torch.allclose(x, expected, rtol=1e-11, atol=1e-11 * expected.abs().max().item())


# -- what ratios do -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vp", "vp-v", "flow", "edm", "zero-snr"])
@pytest.mark.parametrize(
    "base", [UniPC(), UniPC(order=3, basis="noise"), DPMSolver(order=3), DEIS(order=3, variable="rho")], ids=str
)
def test_the_identity_ratio_is_the_base_exactly(base, name):
    schedule = SCHEDULES[name]
    for grid in (
        (Grid.karras(schedule, 9), Grid.uniform_t(schedule, 9)) if name != "edm" else (Grid.karras(schedule, 9),)
    ):
        expected = base.compile(schedule, grid)
        for solver in (DCSolver(base), DCSolver(base, (1.0,) * 9)):
            plan = solver.compile(schedule, grid)
            width = max(plan.output.shape[1], expected.output.shape[1])
            a, b = (torch.nn.functional.pad(p.output, (0, width - p.output.shape[1])) for p in (plan, expected))
            # forms add a row's terms in another order: one rounding each
            assert torch.allclose(a, b, rtol=1e-14, atol=1e-15 * b.abs().max().item())
            assert torch.equal(plan.state, expected.state)
            assert plan.basis == expected.basis
            assert plan.order == expected.order


def test_a_ratio_changes_the_rows_from_its_step_on_and_keeps_them_consistent():
    grid = Grid.lambdas(VP, LAM)
    plain = UniPC(**FULL).compile(VP, grid)
    ratios = tuple(1.2 if i == 4 else 1.0 for i in range(9))
    plan = DCSolver(UniPC(**FULL), ratios).compile(VP, grid)
    assert plan.problems() == []  # a constant x0 and eps are still solved exactly
    width = plan.output.shape[1]
    difference = plan.output - torch.nn.functional.pad(plain.output, (0, width - plain.output.shape[1]))
    changed = (difference.abs() > 1e-12).any(1).tolist()
    # row 4 reads it as newest, rows 5 and 6 as older outputs of predictor and corrector
    assert changed == [False] * 4 + [True] * 3 + [False] * 2
    # the compensated output is a combination of outputs 4, 3 and 2, and so is every row's change
    for i in (4, 5, 6):
        read = [i - k for k in difference[i].abs().gt(1e-12).nonzero()[:, 0].tolist()]
        assert set(read) <= {2, 3, 4}
        assert abs(float(difference[i].sum())) < 1e-12  # Lagrange weights sum to 1: what is moved is a zero sum


def test_tails_of_dense_rows_fall_off():
    grid = Grid.uniform_lambda(VP, 12)
    row = DCSolver(UniPC(**FULL), (1.05,) * 12).compile(VP, grid).output[-1].abs()
    assert row[8:].max() < 1e-3 * row[0]
    assert (row[4:8] > 0).all()


def test_lagrange_basis_reproduces_polynomials():
    nodes = [900.0, 700.0, 420.0]
    for degree in range(3):
        got = sum(w * n**degree for w, n in zip(lagrange_basis(nodes, 512.0), nodes, strict=True))
        assert got == pytest.approx(512.0**degree, rel=1e-13)
    assert lagrange_basis(nodes, 900.0) == [1.0, 0.0, 0.0]


def test_order():
    """Fixed ratios leave order 1, as declared; ratios that tend to 1 with the step, r - 1 = O(h), leave 2."""
    x, truth = problem(GAUSSIAN, "vp")

    def slope(ratio_of, counts, first):
        errors = []
        for n in counts:
            lam = starting_grid(n, False, first)
            solver = DCSolver(DPMSolver(order=2, **FULL), (ratio_of(n),) * (len(lam) - 1))
            errors.append(error_at(solver, VP, GAUSSIAN, lam, x, truth))
        return math.log2(errors[0] / errors[1])

    fixed = DCSolver(DPMSolver(order=2), (1.3,))
    assert slope(lambda n: 1.3, (128, 256), 2e-3) == pytest.approx(fixed.convergence_order, abs=0.25)
    assert slope(lambda n: 1 + 8 / n, (128, 256), 2e-5) == pytest.approx(2, abs=0.25)
    assert DCSolver(UniPC(order=3), (1.0, 1.0)).convergence_order == 4


def test_gradients_reach_the_ratios():
    """Against central differences of the same run: they are off by h^2 = 1e-8 times a third derivative."""
    grid, x, model = Grid.lambdas(VP, LAM), normal(4, 2), MIXTURE.model(VP)

    def loss(values):
        return sample(model, x, DCSolver(UniPC(**FULL), tuple(values)).compile(VP, grid)).square().sum()

    ratios = torch.tensor([1.0] * 5 + [1.1] * 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(ratios.unbind()), ratios)
    assert torch.equal(gradient[:2], torch.zeros(2, dtype=torch.float64))  # never compensated
    for i in (2, 5, 8):
        ends = []
        for sign in (1, -1):
            values = ratios.detach().tolist()
            values[i] += sign * 1e-4
            ends.append(float(loss(values)))
        assert float(gradient[i]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4, abs=1e-6)


def test_image_to_image_takes_the_last_ratios():
    grid = Grid.karras(VP, 9)
    a = DCSolver(ratios=RATIOS).compile(VP, grid.tail(4))
    b = DCSolver(ratios=RATIOS[4:]).compile(VP, grid.tail(4))
    assert a.digest == b.digest
    with pytest.raises(GridError, match="3 compensation ratios were given for a grid of 9 steps"):
        DCSolver(ratios=RATIOS[:3]).compile(VP, grid)


def test_levels_outside_the_training_range_have_no_times_to_move_between():
    grid = Grid.lambdas(VP, [-4.0, -3.5, -3.0, 0.0])  # the model's noisiest time stands for the first three
    with pytest.raises(GridError, match="different times"):
        DCSolver(ratios=(1.1,) * 3).compile(VP, grid)
    assert DCSolver().compile(VP, grid).problems() == []


@pytest.mark.parametrize("ratios", [(1.0, math.nan), (math.inf,), (True,), ("1",)])
def test_ratios_must_be_numbers(ratios):
    with pytest.raises(FewstepError, match="ratio"):
        DCSolver(ratios=ratios)


def test_a_compensation_order_below_one_is_refused():
    with pytest.raises(FewstepError, match="at least 1"):
        DCSolver(compensation_order=0)


def test_without_ratios_and_momentum_the_wrappers_agree():
    assert_same_rows(DCSolver(UniPC(**FULL)), HeavyBall(UniPC(**FULL), beta=1.0))


# -- files and scheduler --------------------------------------------------------------------------------------------------
def test_ratios_in_files(tmp_path):
    path = tmp_path / "ratios.json"
    save_ratios(path, RATIOS, {"model": "test", "guidance": 7.5})
    assert load_ratios(path) == RATIOS
    (tmp_path / "bare.json").write_text(json.dumps(list(RATIOS)))
    assert load_ratios(tmp_path / "bare.json") == RATIOS
    for text in ("{", '{"kind": "Grid"}', '["a"]', "[true]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ArtifactError):
            load_ratios(tmp_path / "bad.json")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_ratios(tmp_path / "none.json")


def test_the_scheduler_runs_its_builder_and_keeps_its_ratios(tmp_path):
    save_ratios(tmp_path / "ratios.json", RATIOS)
    expected = DCSolver(UniPC(disable_corrector=(0,)), RATIOS).compile(VP, Grid.karras(VP, 9))
    s = samplers.DCSolverScheduler(**SD, dc_ratios=str(tmp_path / "ratios.json"), disable_corrector=[0], grid="karras")
    (tmp_path / "ratios.json").unlink()
    s.save_pretrained(tmp_path)
    for scheduler in (s, samplers.DCSolverScheduler.from_pretrained(tmp_path)):
        scheduler.set_timesteps(9)
        assert scheduler.plan.digest == expected.digest
    with pytest.raises(GridError, match="9 dc_ratios"):
        s.set_timesteps(8)
    s.set_timesteps(9)
    x = normal(1, 4, 4, 4).float()
    s.set_begin_index(5)
    for t in s.timesteps[5:]:
        x = s.step(0.1 * x, t, x).prev_sample
    assert x.isfinite().all()
