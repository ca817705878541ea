"""Learning that is asked for what cannot be: a refusal that names it, files that belong to what they were made for."""

import json

import pytest
import torch

from fewstep.errors import ArtifactError, FewstepError
from fewstep.samplers import Grid, NoiseSchedule, SolverPlan, learn
from fewstep.samplers.testing import GaussianMixture
from tests.eval_fixtures import PROMPTS, tiny_pipeline

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def pipe():
    made = tiny_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def teacher(pipe, folder=None, prompts=PROMPTS, guidance=2.0, **options):
    return learn.Teacher(pipe, prompts, guidance, 8, range(3), folder=folder, tolerance=10.0, **options)


def mixture_problem(network=None, n=12):
    """Trajectories of a mixture in 4 dimensions, made by its own score, students called with ``network`` in its place."""
    schedule = NoiseSchedule.from_config(SCALED)
    exact = GaussianMixture.random(components=3, dim=4, seed=0).model(schedule)
    noise = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    problem = learn.solve(lambda x, t, which: exact(x, t), schedule, noise, steps=48)
    if network is None:
        return problem
    from dataclasses import replace

    return replace(problem, network=lambda x, t, which: network(exact(x, t), t, which))


# -- trajectories on disk ---------------------------------------------------------------------------------------------
def test_kept_trajectories_belong_to_a_noise_schedule_a_size_and_a_call(pipe, tmp_path):
    teacher(pipe, tmp_path).problem()
    other = tiny_pipeline()
    other.set_progress_bar_config(disable=True)
    other.scheduler.register_to_config(beta_end=0.02)
    with pytest.raises(ArtifactError, match="differing: schedule"):
        teacher(other, tmp_path).problem()
    with pytest.raises(ArtifactError, match="differing: call, size"):
        teacher(pipe, tmp_path, call={"height": 16, "width": 16}).problem()
    with pytest.raises(ArtifactError, match="differing: call"):
        teacher(pipe, tmp_path, call={"negative_prompt": ["a bag"]}).problem()


def test_files_that_do_not_say_all_that_is_said_now_are_taken(pipe, tmp_path):
    made = teacher(pipe, tmp_path).problem()
    (path,) = tmp_path.glob("trajectories-*.json")
    body = json.loads(path.read_text())
    for key in ("schedule", "size", "call"):
        del body["about"][key]
    path.write_text(json.dumps(body))
    assert torch.equal(teacher(pipe, tmp_path).problem().states, made.states)


def test_prompts_and_guidance_that_cannot_be_are_refused(pipe):
    with pytest.raises(FewstepError, match="1 prompts were given for 3 seeds"):
        teacher(pipe, prompts="a dress of red silk")  # one prompt, not nineteen letters
    for guidance in ([], float("nan"), [2.0, float("inf")]):
        with pytest.raises(FewstepError, match=r"guidance is .*; give a number, or some"):
            teacher(pipe, guidance=guidance)
    with pytest.raises(FewstepError, match=r"guidance scales \[1.0, 4.0\] are drawn with .* and some without"):
        teacher(pipe, guidance=(1.0, 4.0)).problem()


# -- tuning -----------------------------------------------------------------------------------------------------------
def test_nothing_held_out_is_refused():
    with pytest.raises(FewstepError, match="cannot be split into 0 held out"):
        learn.tune(mixture_problem(), 3, seconds=1.0, held_out=0)


def test_one_call_has_nothing_to_place_and_is_tuned_all_the_same():
    """The only time is pure noise and the only row ends at 0: no number of the first stage moves the end."""
    plan = learn.tune(mixture_problem(), 1, seconds=3.0)
    assert plan.nfe == 1
    assert plan.provenance["error_after"] <= plan.provenance["error_before"]


def test_a_plan_is_kept_where_tries_were_not_finite(tmp_path):
    """The network is well at the times of the untuned plans alone, for the samples that are held out: a moved time is NaN."""
    usual = [float(t) for u in learn.untuned(mixture_problem(), 3) for t in u.plan.model_time]

    def network(out, t, which):
        known = any(abs(float(torch.as_tensor(t)) - there) < 1e-4 for there in usual)  # 0.1 of a float32 of 1000
        return out if known else torch.where((which >= 8)[:, None], torch.full_like(out, torch.nan), out)

    plan = learn.tune(mixture_problem(network), 3, seconds=8.0)
    assert any(seen["held_out"] is None for seen in plan.provenance["history"])
    assert plan.provenance["error_after"] <= plan.provenance["error_before"]
    plan.save(tmp_path / "plan.json")
    assert SolverPlan.load(tmp_path / "plan.json").provenance["history"] == plan.provenance["history"]
    learn.plot(plan, tmp_path / "plan.png")


def test_held_out_samples_that_are_never_finite_are_refused():
    def network(out, t, which):
        return torch.where((which >= 8)[:, None], torch.full_like(out, torch.nan), out)

    with pytest.raises(FewstepError, match="NaN or infinite samples on the held-out trajectories"):
        learn.tune(mixture_problem(network), 3, seconds=1.0)


# -- ratios along a curve ---------------------------------------------------------------------------------------------
def test_a_cascade_is_read_back_or_refused(tmp_path):
    table = {(5, 2.0): [1, 1, 0.9, 0.8, 1.1], (8, 2.0): [1, 1, *[0.95] * 6], (5, 4.0): [1, 1, 0.9, 0.8, 1.2],
             (8, 4.0): [1, 1, *[0.9] * 6]}  # fmt: skip
    cascade = learn.Cascade.fit(table)
    path = tmp_path / "cascade.json"
    cascade.save(path)
    assert learn.Cascade.load(path) == cascade
    body = json.loads(path.read_text())
    for changed in (
        {"nfe": [1]}, {"coefficients": None}, {"coefficients": [[["a"]]]}, {"coefficients": []}, {"guidance": "xy"},
        {"coefficients": [[[1.0]], [[1.0, 2.0]]]}, {"first": "z"},
    ):  # fmt: skip
        path.write_text(json.dumps({**body, **changed}))
        with pytest.raises(ArtifactError, match=r"cascade\.json"):
            learn.Cascade.load(path)
    with pytest.raises(FewstepError, match=r"nfe is 6\.5; give a whole number"):
        cascade.predict(6.5, 3.0)
    with pytest.raises(FewstepError, match=r"the ratios of 5 calls are .*nan.*; give finite numbers"):
        learn.Cascade.fit({(5, 2.0): [1, 1, float("nan"), 1, 1]})


def test_a_curve_of_ratios_of_no_degree_is_one_number_for_all_compensated_steps():
    problem = mixture_problem()
    grid = Grid.uniform_t(problem.schedule, 5)
    ratios = learn.dc_curve(problem, grid, degree=0, evaluations=12)
    assert ratios[:2] == (1.0, 1.0)
    assert len(set(ratios[2:])) == 1
