"""USF: uniform decisions are known solvers, mixed ones keep their order, and decision lists are files."""

import json
import math
import random

import pytest
import torch

from fewstep import samplers
from fewstep.errors import ArtifactError, FewstepError, GridError
from fewstep.samplers import DEIS, USF, Decision, DPMSolver, Executor, Grid, Run, UniPC, sample
from fewstep.samplers.lagrange import VARIABLES
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
    normal,
    points,
    problem,
    starting_grid,
)


def uniform(**options):
    return USF((Decision(**options),))


# -- uniform choices are known solvers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vp", "flow", "edm", "zero-snr"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (uniform(order=1), DPMSolver(order=1)),
        (uniform(relaxation="bh2"), DPMSolver(order=2, **FULL)),
        (uniform(order=2), DPMSolver(order=2, solver_type="heun", **FULL)),
        (uniform(order=3, basis="noise"), DEIS(order=3, **FULL)),
        (uniform(order=4, basis="noise", variable="rho"), DEIS(order=4, variable="rho", **FULL)),
        *((uniform(order=p, relaxation=b, corrector=True, basis=k), UniPC(order=p, solver_type=b, basis=k, **FULL))
          for p in (1, 2, 3) for b in ("bh1", "bh2") for k in ("data", "noise")),
    ],
    ids=str,
)  # fmt: skip
def test_uniform_decisions_are_known_solvers(ours, theirs, name):
    schedule = SCHEDULES[name]
    grids = [Grid.karras(schedule, 8), Grid.lambdas(schedule, LAM)]
    grids += [Grid.uniform_t(schedule, 8)] if name != "edm" else []
    for grid in grids:
        a, b = ours.compile(schedule, grid), theirs.compile(schedule, grid)
        width = max(a.output.shape[1], b.output.shape[1])
        outputs = [torch.nn.functional.pad(p.output, (0, width - p.output.shape[1])) for p in (a, b)]
        # forms add a row's terms in another order
        assert torch.allclose(*outputs, rtol=1e-13, atol=1e-14 * outputs[1].abs().max().item())
        assert torch.equal(a.state, b.state)
        assert a.basis == b.basis
        assert a.order == b.order


def test_a_list_for_every_step_lowers_orders_as_diffusers_does():
    grid = Grid.karras(VP, 8)
    solver = UniPC(order=3)
    decisions = tuple(Decision(order=p, relaxation="bh2", corrector=True) for p in solver.orders(grid))
    a, b = USF(decisions).compile(VP, grid), solver.compile(VP, grid)
    assert torch.allclose(a.output, b.output, rtol=1e-13, atol=1e-14)


# -- mixed choices -------------------------------------------------------------------------------------------------------
def usf_loop(model, x, grid, decisions):
    """Steps, starts, bases and correctors made one by one on tensors, from the rows of single decisions."""
    nodes = grid.points()
    states, corrected, outputs = [x], [], []

    def read(j, basis):
        p, eps = nodes[j], outputs[j]
        x0 = (states[j] - p.sigma * eps) / p.alpha
        return {"data": x0, "noise": eps, "velocity": eps - x0}[basis]

    for i, d in enumerate(decisions):
        outputs.append(model(states[i], i))
        fixed = states[i]
        if i and decisions[i - 1].corrector:
            e = decisions[i - 1]
            used = [i - 1 - k for k in (e.nodes or range(e.order)) if k <= i - 1]
            s = i - 1 - (e.start if e.start <= i - 1 else 0)
            row = e.correction(nodes[s], nodes[i], [nodes[j] for j in used])
            fixed = row.state * corrected[s]
            for w, j in zip(row.outputs, [i, *used], strict=True):
                fixed = fixed + w * read(j, e.basis)
        corrected.append(fixed)
        used = [i - k for k in (d.nodes or range(d.order)) if k <= i]
        s = i - (d.start if d.start <= i else 0)
        row = d.row(nodes[s], nodes[i + 1], [nodes[j] for j in used])
        new = row.state * corrected[s]
        for w, j in zip(row.outputs, used, strict=True):
            new = new + w * read(j, d.basis)
        states.append(new)
    return states[-1]


def random_decision(rng):
    basis = rng.choice(["data", "noise", "velocity"])
    order, extra = rng.randint(1, 3), rng.random() < 0.3
    nodes = (0, *sorted(rng.sample(range(1, 5), order))) if extra else ()
    relaxation = "none" if extra or basis == "velocity" else rng.choice(["none", "bh1", "bh2"])
    variable = rng.choice(VARIABLES[basis]) if relaxation == "none" else "lambda"
    return Decision(
        order=order, nodes=nodes, basis=basis, variable=variable, relaxation=relaxation,
        derivative_scale=0.1 if relaxation == "none" and variable == "lambda" and rng.random() < 0.2 else 0.0,
        corrector=rng.random() < 0.4, start=rng.choice([0, 0, 1, 2]) if relaxation == "none" else 0,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_random_decision_lists_are_the_loop(seed):
    rng = random.Random(seed)
    schedule = SCHEDULES["flow"]  # the only family whose velocity has rows
    grid = Grid.lambdas(schedule, LAM)
    decisions = tuple(random_decision(rng) for _ in range(grid.steps))

    def model(x, i):
        return torch.sin(2 * x) + 0.1 * i * x

    plan = USF(decisions).compile(schedule, grid)
    executor, run = Executor(plan), Run()
    x = start = normal(5)
    for i in range(plan.steps):
        eps = model(x, i)
        x = executor.advance(run, (eps - x) / grid.alpha[i], x)  # the flow's velocity is eps - x0 = (eps - x) / alpha
    expected = usf_loop(model, start, grid, decisions)
    # a Lipschitz constant of about 3 over 9 steps, and x0 = (x - sigma eps)/alpha with 1/alpha <= 8, magnify rounding
    assert torch.allclose(x, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_velocity_steps_of_other_families_and_corrected_starts_are_exact_for_constants():
    """compile() validates: a constant x0 and eps are solved exactly whatever is decided, on every family and end."""
    rng = random.Random(1)
    for name in ("vp", "vp-v", "flow", "zero-snr", "edm"):
        schedule = SCHEDULES[name]
        grid = Grid.karras(schedule, 9) if name == "edm" else Grid.uniform_t(schedule, 9)
        for _ in range(10):
            found = [random_decision(rng) for _ in range(9)]
            if name != "flow":  # the velocity's row x + dsigma v holds where alpha + sigma = 1
                found = [d for d in found if d.basis != "velocity"] or [Decision()]
                found = [found[i % len(found)] for i in range(9)]
            plan = USF(tuple(found)).compile(schedule, grid)
            assert plan.problems() == []
            assert sample(MIXTURE.model(schedule), normal(3, 2), plan).isfinite().all()


MIXED = (
    (Decision(2), Decision(2, basis="noise"), Decision(2, basis="noise", variable="rho")),
    (Decision(3), Decision(3, basis="noise", nodes=(0, 1, 2, 3)), Decision(3, start=1)),
    (Decision(2, corrector=True), Decision(2, basis="noise", corrector=True, relaxation="bh1"), Decision(3, start=1)),
    (Decision(1), Decision(1, basis="noise", corrector=True)),
)


@pytest.mark.parametrize("name", ["vp", "flow"])
@pytest.mark.parametrize("cycle", MIXED, ids=["2", "3", "3 corrected", "1"])
def test_mixed_lists_have_the_order_of_their_least_accurate_decision(cycle, name):
    schedule = SCHEDULES[name]
    x, truth = problem(GAUSSIAN, "vp" if name == "vp" else "flow")
    p = USF(cycle).convergence_order
    first = 2e-7 if p > 1 else 4e-3
    errors = []
    for n in (64, 128):
        lam = starting_grid(n, False, first)
        steps = len(lam) - 1
        errors.append(
            error_at(USF(tuple(cycle[i % len(cycle)] for i in range(steps))), schedule, GAUSSIAN, lam, x, truth)
        )
    assert errors[1] > 1e-12
    # lists that take turns converge at least so fast; which terms cancel depends on the list
    assert p - 0.25 < math.log2(errors[0] / errors[1]) < p + 1.25


def test_truncation_and_scaled_derivatives():
    """Terms beyond the order are cut although the nodes would know them; a scale multiplies the first derivative."""
    s2, s1, s, t = points([0.0, 0.35, 0.6, 1.1])
    h = t.lam - s.lam
    cut = Decision(order=2, nodes=(0, 1, 2)).row(s, t, [s, s1, s2])
    for degree, kept in ((0, True), (1, True), (2, False)):
        # m = (lambda - lambda_s)^degree has one Taylor term, of that degree
        got = sum(w * (p.lam - s.lam) ** degree for w, p in zip(cut.outputs, (s, s1, s2), strict=True))
        j = {0: -math.expm1(-h), 1: h + math.expm1(-h)}
        assert got == pytest.approx(t.alpha * j[degree] if kept else 0.0, abs=1e-14)
    scaled = Decision(order=2, derivative_scale=0.5).row(s, t, [s, s1])
    got = sum(w * (p.lam - s.lam) for w, p in zip(scaled.outputs, (s, s1), strict=True))
    assert got == pytest.approx(t.alpha * (h + math.expm1(-h)) * (1 + 0.5 * h), rel=1e-13)
    assert Decision(order=2, derivative_scale=0.5).convergence_order == 2


def test_first_step_free_and_tails():
    grid = Grid.karras(VP, 6)
    plan = USF((Decision(),), first_step_free=True).compile(VP, grid)
    assert plan.nfe == 5
    decisions = tuple(Decision(order=1 + i % 2) for i in range(6))
    a = USF(decisions).compile(VP, grid.tail(2))
    assert a.digest == USF(decisions[2:]).compile(VP, grid.tail(2)).digest
    with pytest.raises(GridError, match="3 decisions were given for a grid of 6 steps"):
        USF(decisions[:3]).compile(VP, grid)


# -- bad input, files, scheduler -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": 0}, "positive integer"),
        ({"order": True}, "positive integer"),
        ({"basis": "dta"}, "did you mean 'data'"),
        ({"variable": "rho"}, "variable of the data basis"),
        ({"relaxation": "bh3"}, "relaxation 'bh3'"),
        ({"relaxation": "bh2", "basis": "noise", "variable": "rho"}, "goes with the variable lambda"),
        ({"relaxation": "bh1", "start": 1}, "goes with the variable lambda"),
        ({"nodes": (1, 2)}, "newest"),
        ({"nodes": (0, 0)}, "different"),
        ({"nodes": (0,), "order": 2}, "needs as many"),
        ({"nodes": (0, -1)}, "count back from 0"),
        ({"start": -1}, "count back from 0"),
        ({"derivative_scale": math.inf}, "finite"),
        ({"derivative_scale": 0.1, "basis": "noise", "variable": "rho"}, "h in lambda"),
    ],
)
def test_impossible_decisions_are_refused(options, match):
    with pytest.raises(FewstepError, match=match):
        Decision(**options)


def test_decisions_in_files(tmp_path):
    rng = random.Random(3)
    solver = USF(tuple(random_decision(rng) for _ in range(7)), first_step_free=True)
    solver.save(tmp_path / "usf.json", {"model": "test"})
    assert USF.load(tmp_path / "usf.json") == solver
    data = json.loads((tmp_path / "usf.json").read_text())
    data["decisions"][2]["ordr"] = 2
    (tmp_path / "usf.json").write_text(json.dumps(data))
    with pytest.raises(FewstepError, match="did you mean 'order'"):
        USF.load(tmp_path / "usf.json")
    with pytest.raises(ArtifactError, match="does not exist"):
        USF.load(tmp_path / "none.json")
    with pytest.raises(FewstepError, match="at least one"):
        USF(())


def test_the_scheduler_runs_its_builder(tmp_path):
    decisions = tuple(Decision(order=1 + i % 3, basis=("data", "noise")[i % 2]) for i in range(6))
    USF(decisions).save(tmp_path / "usf.json")
    expected = USF(decisions).compile(VP, Grid.karras(VP, 6))
    s = samplers.USFScheduler(**SD, decisions=str(tmp_path / "usf.json"), grid="karras")
    (tmp_path / "usf.json").unlink()
    s.save_pretrained(tmp_path)
    for scheduler in (s, samplers.USFScheduler.from_pretrained(tmp_path)):
        scheduler.set_timesteps(6)
        assert scheduler.plan.digest == expected.digest
    with pytest.raises(GridError, match="6 decisions"):
        s.set_timesteps(5)
    default = samplers.USFScheduler(**SD, grid="karras")
    default.set_timesteps(5)
    assert default.plan.digest == USF().compile(VP, Grid.karras(VP, 5)).digest
    with pytest.raises(FewstepError, match="path or a list"):
        samplers.USFScheduler(**SD, decisions=7)


def test_no_wrong_equality():
    assert_same_rows(uniform(order=2), DPMSolver(order=2, solver_type="heun", **FULL))
    a = uniform(order=2).compile(VP, Grid.lambdas(VP, LAM))
    b = uniform(order=2, relaxation="bh2").compile(VP, Grid.lambdas(VP, LAM))
    assert not torch.allclose(a.output, b.output, rtol=1e-3)
