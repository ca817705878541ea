"""Plans: what is refused, what files keep, and what a plan says about itself."""

import json
import math
from dataclasses import replace

import pytest
import torch

from fewstep import artifact
from fewstep.artifact import write_tensors
from fewstep.errors import ArtifactError, PlanError
from fewstep.samplers import DDIM, DEIS, DPMSolver, Executor, Grid, NoiseSchedule, Run, SolverPlan, UniPC, sample
from fewstep.samplers.schedule import EDM, Flow, f64
from fewstep.samplers.testing import GaussianMixture
from tests.solver_fixtures import FULL, VP, normal

ARRAYS = ("state", "output", "noise", "constant", "alpha", "sigma", "model_time", "in_scale", "evaluate")
SOLVERS = (
    DDIM(), DDIM(eta=1.0), DPMSolver(order=2), DPMSolver(order=3, eta=1.0), DPMSolver(order=3, basis="noise", **FULL),
    UniPC(order=3, **FULL), UniPC(order=2, basis="noise"), DEIS(order=3, variable="rho", **FULL),
)  # fmt: skip


@pytest.fixture
def plan():
    return UniPC(order=3).compile(VP, Grid.karras(VP, 6))


def changed(values, index, value):
    out = values.clone()
    out[index] = value
    return out


# -- validate ----------------------------------------------------------------------------------------------------------
MALFORMED = {
    "a state column too few": (lambda p: {"state": p.state[:-1]}, "state has shape"),
    "a flat output": (lambda p: {"output": p.output[:, 0]}, r"output \(6,\), \(N,\) and \(N, W\)"),
    "alpha without its end": (lambda p: {"alpha": p.alpha[:-1]}, "alpha has shape"),
    "sigma too long": (lambda p: {"sigma": torch.cat([p.sigma, p.sigma[:1]])}, "sigma has shape"),
    "model times too few": (lambda p: {"model_time": p.model_time[1:]}, "model_time has shape"),
    "NaN": (lambda p: {"output": changed(p.output, (1, 0), math.nan)}, "output has values that are not finite"),
    "infinity": (lambda p: {"model_time": changed(p.model_time, 0, math.inf)}, "model_time has values"),
    "float32": (lambda p: {"state": p.state.float()}, "state is torch.float32, torch.float64"),
    "numbers for flags": (lambda p: {"evaluate": p.evaluate.double()}, "evaluate is torch.float64, torch.bool"),
    "an unknown basis": (lambda p: {"basis": ("data", "picture", *p.basis[2:])}, "bases out of data, noise, velocity"),
    "a basis too few": (lambda p: {"basis": p.basis[1:]}, "bases"),
    "an unknown prediction": (lambda p: {"prediction": "eps"}, "'eps'"),
    "a first row without a call": (lambda p: {"evaluate": changed(p.evaluate, 0, False)}, "row 0 must call"),
    "an output that is not made": (lambda p: {"evaluate": changed(p.evaluate, 2, False)}, "reads m_2, but row 2"),
    "an output before the start": (lambda p: {"output": changed(p.output, (0, 1), 0.5)}, "row 0 reads .* before"),
    "a state before the start": (
        lambda p: {"state": torch.cat([p.state, torch.full_like(p.state, 0.1)], 1)}, "row 0 reads .* before the start",
    ),
    "no scale": (lambda p: {"init_scale": math.nan}, "init_scale is nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_plans_are_refused_even_when_coefficients_are_free(plan, case):
    change, message = MALFORMED[case]
    broken = replace(plan, **change(plan))
    for strict in (True, False):
        with pytest.raises(PlanError, match=message):
            broken.validate(strict=strict)


def test_an_empty_plan_is_refused(plan):
    empty = {name: getattr(plan, name)[:0] for name in ARRAYS}
    empty.update(alpha=plan.alpha[:1], sigma=plan.sigma[:1])
    with pytest.raises(PlanError, match="a plan of 0 rows"):
        replace(plan, **empty, basis=()).validate()


@pytest.mark.parametrize("name", ["state", "output", "noise", "alpha", "sigma"])
def test_coefficients_that_miss_their_target_are_named_but_may_be_wanted(plan, name):
    values = getattr(plan, name)
    index = (3, 0) if values.ndim == 2 else 3
    off = replace(plan, **{name: changed(values, index, values[index] + 0.01)})
    assert any(text.startswith("row 3 leads to") or text.startswith("row 2 leads to") for text in off.problems())
    with pytest.raises(PlanError, match="leads to"):
        off.validate()
    assert off.validate(strict=False) is off


def test_only_the_first_three_problems_are_shown(plan):
    off = replace(plan, output=plan.output * 1.1)
    assert len(off.problems()) > 3
    with pytest.raises(PlanError, match=r"\(and \d+ more\)"):
        off.validate()


@pytest.mark.parametrize("size", [1e-9, -1e-9])
def test_the_check_is_sharp(plan, size):
    """Its tolerance is 1e-10 of the magnitudes, which are of the order of 1 here."""
    off = replace(plan, output=changed(plan.output, (0, 0), plan.output[0, 0] * (1 + size)))
    assert len(off.problems()) > 0
    assert replace(plan, output=changed(plan.output, (0, 0), plan.output[0, 0] * (1 + 1e-14))).problems() == []


def test_a_wrong_sign_is_found(plan):
    """(alpha, sigma) -> (-alpha, -sigma) has the right magnitudes."""
    off = replace(plan, state=changed(plan.state, 0, -plan.state[0]), output=changed(plan.output, 0, -plan.output[0]))
    assert [text.split(" leads")[0] for text in off.problems()] == ["row 0", "row 0"]


# -- what it says ------------------------------------------------------------------------------------------------------
def test_derived_numbers(plan):
    assert plan.steps == plan.nfe == 6
    assert plan.history == 4
    assert plan.order == 4
    assert not plan.has_noise
    assert plan.base == (0, 1, 2, 3, 4, 5)
    assert not plan.requires_grad
    assert DDIM(eta=1.0).compile(VP, Grid.karras(VP, 6)).has_noise
    assert DDIM().compile(VP, Grid.karras(VP, 6)).history == 1


def test_calls_and_bases_of_rows_that_are_not_evaluated_or_restart(plan):
    ddim = DDIM().compile(VP, Grid.karras(VP, 4))
    older = torch.cat([ddim.state, torch.zeros_like(ddim.state)], 1)
    older[2] = f64([0.0, 0.5])
    assert replace(ddim, state=older).base == (0, 1, 1, 3)
    assert replace(ddim, evaluate=changed(ddim.evaluate, 3, False)).nfe == 3


def test_text_shows_every_row():
    plan = DPMSolver(order=2, eta=1.0).compile(VP, Grid.karras(VP, 3, terminal="sigma_min"))
    plan = replace(plan, constant=f64([0.0, 0.25, 0.0]), evaluate=torch.tensor([True, True, False]))
    head, *rows = str(plan).splitlines()
    for word in ("DPMSolver(eta=1.0)", "3 rows", "2 network calls", "order 2", "stochastic", "karras", "epsilon"):
        assert word in head
    assert len(rows) == 3
    for i, row in enumerate(rows):
        assert f"X{i + 1} = {plan.state[i, 0]:+.5f} X{i} {plan.output[i, 0]:+.5f} m{i}" in row
    assert f"{plan.output[1, 1]:+.5f} m0" in rows[1]
    assert f"{plan.noise[1]:+.5f} z" in rows[1]
    assert "+0.25000 mu" in rows[1]
    assert f"t={plan.model_time[0]:>9.3f}" in rows[0]
    assert "no call" in rows[2]


def test_the_digest_changes_with_every_number_and_with_no_name(plan):
    digests = {plan.digest}
    for name in ARRAYS:
        values = getattr(plan, name)
        index = (-1, 0) if values.ndim == 2 else -1
        other = ~values[index] if values.dtype == torch.bool else torch.nextafter(values[index], f64(9.0))
        digests.add(replace(plan, **{name: changed(values, index, other)}).digest)
    for change in ({"init_scale": 2.0}, {"sigma_data": 0.5}, {"prediction": "sample"}, {"fingerprint": "0"}):
        digests.add(replace(plan, **change).digest)
    digests.add(replace(plan, basis=("noise", *plan.basis[1:])).digest)
    assert len(digests) == 1 + len(ARRAYS) + 4 + 1
    assert replace(plan, method="mine", grid_name="mine", provenance={"by": "hand"}).digest == plan.digest


# -- files -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_files_keep_every_bit(solver, tmp_path):
    plan = replace(solver.compile(VP, Grid.karras(VP, 7)), provenance={"trained on": [1, 2.5, None, "x"]})
    plan.save(tmp_path / "plan.json")
    again = SolverPlan.load(tmp_path / "plan.json", VP)
    for name in ARRAYS:
        assert torch.equal(getattr(again, name), getattr(plan, name)), name
        assert getattr(again, name).dtype == getattr(plan, name).dtype
    for name in ("basis", "prediction", "schedule", "fingerprint", "method", "order", "init_scale", "sigma_data",
                 "grid_name", "provenance"):  # fmt: skip
        assert getattr(again, name) == getattr(plan, name), name
    assert again.digest == plan.digest
    x, g = normal(2, 3), [torch.Generator().manual_seed(4) for _ in range(2)]
    model = GaussianMixture.random(2, 3, seed=0).model(VP)
    assert torch.equal(sample(model, x, plan, generator=g[0]), sample(model, x, again, generator=g[1]))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_dictionaries_keep_every_bit(solver):
    plan = solver.compile(VP, Grid.karras(VP, 7))
    again = SolverPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.digest == plan.digest
    assert again.method == plan.method


def test_bad_dictionaries_are_refused(plan):
    good = plan.to_dict()
    for bad in (
        {k: v for k, v in good.items() if k != "noise"},
        {**good, "extra": 1},
        {**good, "state": "oops"},
        {**good, "state": [["oops"]]},
        {**good, "basis": None},
        {**good, "basis": [["data"]] * 6},
        {**good, "output": good["output"][1:]},
    ):
        with pytest.raises(PlanError):
            SolverPlan.from_dict(bad)


def test_gradients_do_not_keep_a_plan_from_being_saved(tmp_path):
    lam = f64([-2.0, 0.0, 2.0]).requires_grad_()
    plan = DPMSolver().compile(VP, Grid.lambdas(VP, lam))
    assert plan.requires_grad
    plan.save(tmp_path / "plan.json")
    again = SolverPlan.load(tmp_path / "plan.json")
    assert not again.requires_grad
    assert again.digest == plan.digest


def arrays_of(path):
    return path.with_name(json.loads(path.read_text())["arrays"])


@pytest.mark.parametrize("name", ["plan", "plan.safetensors", "plan.yaml", "json"])
def test_paths_must_end_in_json(plan, tmp_path, name):
    with pytest.raises(ArtifactError, match=r"must end in \.json"):
        plan.save(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"must end in \.json"):
        SolverPlan.load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_files_are_refused(plan, tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(ArtifactError, match="does not exist"):
        SolverPlan.load(path)
    plan.save(path)
    arrays_of(path).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        SolverPlan.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"schema_version": None}, "schema version None"),
        ({"kind": "Grid"}, "'Grid', a SolverPlan"),
        ({"surprise": 1}, "unknown keys surprise"),
        ({"arrays_sha256": "0" * 64}, "damaged"),
        ({"arrays": "../plan.safetensors"}, "beside"),
        ({"arrays": "other.safetensors"}, "cannot be read"),
        ({"basis": None}, "bases"),
        ({"basis": ["data"]}, "bases"),
        ({"prediction": "eps"}, "'eps'"),
        ({"init_scale": "big"}, "init_scale"),
    ],
    ids=str,
)
def test_changed_headers_are_refused(plan, tmp_path, change, message):
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((ArtifactError, PlanError), match=message):
        SolverPlan.load(path, VP)


@pytest.mark.parametrize("key", ["basis", "arrays", "arrays_sha256", "fingerprint", "order", "provenance"])
def test_missing_keys_are_refused(plan, tmp_path, key):
    path = tmp_path / "plan.json"
    plan.save(path)
    body = json.loads(path.read_text())
    del body[key]
    path.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match=f"lacks {key}"):
        SolverPlan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"a plan"', "\x00\xff"])
def test_files_that_are_no_plan_are_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError):
        SolverPlan.load(path)


@pytest.mark.parametrize("at", [0, 200, -1])
def test_a_damaged_byte_is_found(plan, tmp_path, at):
    plan.save(tmp_path / "plan.json")
    arrays = arrays_of(tmp_path / "plan.json")
    data = bytearray(arrays.read_bytes())
    data[at] ^= 1
    arrays.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="damaged"):
        SolverPlan.load(tmp_path / "plan.json")
    arrays.write_bytes(bytes(data)[:100])
    with pytest.raises(ArtifactError, match="damaged"):
        SolverPlan.load(tmp_path / "plan.json")


def test_missing_and_unknown_arrays_are_refused(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    body = json.loads(path.read_text())
    arrays = {name: getattr(plan, name) for name in ARRAYS}
    for tensors, message in (
        ({k: v for k, v in arrays.items() if k != "noise"}, "lacks the arrays noise"),
        ({**arrays, "more": plan.noise.clone()}, "unknown arrays more"),
    ):
        body["arrays_sha256"] = write_tensors(tmp_path / body["arrays"], tensors)
        path.write_text(json.dumps(body))
        with pytest.raises(ArtifactError, match=message):
            SolverPlan.load(path)


def test_arrays_of_another_plan_are_refused(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    DDIM().compile(VP, Grid.karras(VP, 6)).save(tmp_path / "new.json")
    arrays_of(tmp_path / "new.json").replace(arrays_of(tmp_path / "plan.json"))
    with pytest.raises(ArtifactError, match="damaged or belongs to another"):
        SolverPlan.load(tmp_path / "plan.json")


def test_a_save_that_dies_half_way_leaves_the_old_plan(plan, tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan.save(path)
    write = artifact.write_bytes

    def dies_at_the_json(target, data):
        if str(target).endswith(".json"):
            raise OSError("no space left")
        write(target, data)

    monkeypatch.setattr(artifact, "write_bytes", dies_at_the_json)
    with pytest.raises(OSError, match="no space"):
        DDIM().compile(VP, Grid.karras(VP, 6)).save(path)
    assert SolverPlan.load(path).digest == plan.digest


def test_saving_leaves_nothing_else_behind_and_replaces(plan, tmp_path):
    path = tmp_path / "deep" / "folder" / "plan.json"
    plan.save(path)
    DDIM().compile(VP, Grid.karras(VP, 6)).save(path)
    assert {p.name for p in path.parent.iterdir()} == {"plan.json", arrays_of(path).name}
    assert SolverPlan.load(path).method == "DDIM()"


def test_a_failed_write_leaves_the_old_file(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        replace(plan, provenance={"not JSON": object()}).save(path)
    assert path.read_bytes() == before
    assert SolverPlan.load(path).digest == plan.digest, "the arrays were the same"
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", arrays_of(path).name}


@pytest.mark.parametrize(
    "other",
    [EDM(), Flow(), NoiseSchedule.from_config({"beta_schedule": "linear"}),
     NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
                                "prediction_type": "v_prediction"})],
    ids=["edm", "flow", "other betas", "other prediction"],
)  # fmt: skip
def test_the_plan_of_another_model_is_refused(plan, tmp_path, other):
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ArtifactError, match=f"fingerprint {other.fingerprint}"):
        SolverPlan.load(tmp_path / "plan.json", other)
    assert SolverPlan.load(tmp_path / "plan.json").steps == 6


# -- tail --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("begin", [0, 1, 3, 6])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_tail_restarts_at_first_order(solver, begin):
    grid = Grid.karras(VP, 7, terminal="sigma_min")
    plan = solver.compile(VP, grid)
    tail = plan.tail(begin).validate()
    assert tail.steps == 7 - begin
    assert torch.equal(tail.alpha, plan.alpha[begin:])
    assert torch.equal(tail.model_time, plan.model_time[begin:])
    restarted = solver.__class__(order=1, **({"eta": solver.eta} if getattr(solver, "eta", 0) else {}))
    first = (restarted if not isinstance(solver, UniPC) else DDIM()).compile(VP, grid.tail(begin))
    raw, x = normal(2, 3), normal(2, 3, seed=1)
    got, expected = (Executor(p).advance(Run(), raw, x, noise=torch.zeros_like(x)) for p in (tail, first))
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    width = plan.history
    assert torch.equal(tail.output[width:], plan.output[begin + width :]), "later rows are as they were"
    assert plan.tail(0).digest == plan.digest


@pytest.mark.parametrize("begin", [-1, 6, 100])
def test_a_tail_outside_the_plan_is_refused(plan, begin):
    with pytest.raises(PlanError, match=f"begin index {begin}"):
        plan.tail(begin)


def test_a_tail_cannot_begin_where_no_network_is_called(plan):
    ddim = DDIM().compile(VP, Grid.karras(VP, 4))
    quiet = replace(ddim, evaluate=changed(ddim.evaluate, 2, False), output=changed(ddim.output, (2, 0), 0.0)).validate(
        strict=False
    )
    with pytest.raises(PlanError, match="row 2 does not call"):
        quiet.tail(2)
    assert quiet.tail(3).steps == 1


def test_reprs_are_for_people_and_not_of_arrays():
    """What a notebook shows of the last value of a cell; a schedule's table alone is a thousand numbers."""
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    grid = Grid.karras(schedule, 4)
    plan = DPMSolver().compile(schedule, grid)
    assert (repr(plan), repr(grid)) == (str(plan), str(grid))
    assert repr(schedule) == "DiscreteVP(1000 noise levels, sigma/alpha 0.02917 to 14.61, predicts epsilon)"
    assert all("tensor" not in repr(one) for one in (schedule, grid, plan))
