"""Learning on diffusers pipelines: what is captured is what the pipeline does, and plans go where they belong."""

import dataclasses
import json
import math
import warnings

import pytest
import torch

from fewstep import cli
from fewstep.errors import ArtifactError, FewstepError
from fewstep.eval import capture_latents, draw
from fewstep.samplers import DPMSolver, Grid, PlanScheduler, SolverPlan, learn, sample
from fewstep.samplers.learn import plans
from fewstep.samplers.learn.teaching.capture import capture
from tests import eval_fixtures
from tests.pipeline_fixtures import tiny_ddpm_pipeline

PIPES = {
    "sd": (eval_fixtures.tiny_pipeline, eval_fixtures.PROMPTS),
    "dit": (eval_fixtures.tiny_dit, ("0", "1", "2", "1", "0")),
    "sd3": (eval_fixtures.tiny_sd3, eval_fixtures.PROMPTS),
    "ddpm": (tiny_ddpm_pipeline, ("",) * 5),
}


def pipe_of(name):
    make, prompts = PIPES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, list(prompts)


def prompts_for(pipe, prompts):
    labels = list(getattr(pipe, "labels", None) or [])
    return [labels[int(p)] for p in prompts] if labels and prompts[0].isdigit() else prompts


def as_drawn(pipe, prompts, seeds, plan, guidance):
    """The latents that the pipeline itself makes with ``plan``, all in one batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", learn.OutsideCalibration)
        learn.use_(pipe, plan)
        with capture_latents(pipe) as captured:
            draw(pipe, prompts, seeds, steps=plan.nfe, guidance=guidance)
    return captured.latents(len(seeds))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", PIPES)
def test_a_captured_denoiser_makes_the_pipelines_own_latents(name, guidance):
    """Another batch size sums in another order: float32 rounding over three steps of a random network."""
    pipe, words = pipe_of(name)
    words = prompts_for(pipe, words)
    seeds = [5, 6, 7]
    scheduler = pipe.scheduler
    denoise = capture(pipe, words[:3], seeds, [guidance] * 3)
    assert pipe.scheduler is scheduler
    problem_schedule = learn.Teacher(pipe, words, guidance, 8, seeds).schedule
    plan = DPMSolver(order=2).compile(problem_schedule, Grid.uniform_t(problem_schedule, 3, spacing="trailing"))
    which = torch.arange(3)
    with torch.no_grad():
        ours = sample(lambda x, t: denoise(x, t, which), denoise.initial, plan)
        reordered = sample(lambda x, t: denoise(x, t, which.flip(0)), denoise.initial.flip(0), plan).flip(0)
    theirs = as_drawn(pipe, words[:3], seeds, plan, guidance)
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < 1e-4 * scale
    assert float((reordered - theirs).abs().max()) < 1e-4 * scale


@pytest.mark.parametrize("name", PIPES)
def test_gradients_reach_the_times_and_not_the_weights(name):
    pipe, words = pipe_of(name)
    denoise = capture(pipe, prompts_for(pipe, words)[:2], [0, 1], [2.0, 4.0])
    t = torch.tensor(400.0, dtype=torch.float64, requires_grad=True)
    x = denoise.initial.clone().requires_grad_()
    out = denoise(x, t, torch.arange(2))
    assert out.shape == x.shape
    on_t, on_x = torch.autograd.grad(out.square().sum(), [t, x])
    assert float(on_t.abs()) > 0
    assert float(on_x.abs().max()) > 0
    module = getattr(pipe, "unet", None) or pipe.transformer
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_samples_may_have_guidance_of_their_own():
    pipe, words = pipe_of("sd")
    seeds, scales = [3, 4], [1.5, 6.0]
    together = capture(pipe, words[:2], seeds, scales)
    for i in range(2):
        alone = capture(pipe, words[i : i + 1], seeds[i : i + 1], scales[i : i + 1])
        x = alone.initial
        with torch.no_grad():
            a, b = alone(x, 300.0, torch.tensor([0])), together(x, 300.0, torch.tensor([i]))
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_pipeline_that_guides_in_another_way_is_refused():
    pipe, words = pipe_of("sd")
    with pytest.raises(FewstepError, match="combines its denoiser's outputs in another way"):
        capture(pipe, words[:2], [0, 1], [4.0, 4.0], {"guidance_rescale": 0.7})
    pipe.unet = None
    with pytest.raises(FewstepError, match="neither a unet nor a transformer"):
        capture(pipe, words[:1], [0], [1.0])


# -- trajectories on disk ---------------------------------------------------------------------------------------------
def teacher(pipe, words, folder=None, seeds=range(3), **options):
    return learn.Teacher(pipe, words, 2.0, 8, seeds, folder=folder, tolerance=10.0, **options)


def test_trajectories_are_kept_and_gone_on_from(tmp_path, monkeypatch):
    pipe, words = pipe_of("sd")
    monkeypatch.setattr("fewstep.samplers.learn.teaching.teacher.CHUNK", 2)
    first = teacher(pipe, words, tmp_path).problem()
    assert len(list(tmp_path.glob("trajectories-*.json"))) == 2
    monkeypatch.setattr("fewstep.samplers.learn.teaching.teacher.solve", None)  # nothing may be computed again
    monkeypatch.setattr("fewstep.samplers.learn.teaching.teacher.drift", None)
    again = teacher(pipe, words, tmp_path).problem()
    assert torch.equal(first.states, again.states)
    assert torch.equal(first.noise, again.noise)


def test_an_interrupted_teacher_goes_on(tmp_path, monkeypatch):
    pipe, words = pipe_of("sd")
    monkeypatch.setattr("fewstep.samplers.learn.teaching.teacher.CHUNK", 1)
    whole = teacher(pipe, words, tmp_path / "whole").problem()
    import fewstep.samplers.learn.teaching.teacher as module

    made, real = [], module.solve

    def dies(*args, **kwargs):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "solve", dies)
    with pytest.raises(KeyboardInterrupt):
        teacher(pipe, words, tmp_path / "cut").problem()
    monkeypatch.setattr(module, "solve", real)
    assert torch.equal(teacher(pipe, words, tmp_path / "cut").problem().states, whole.states)


def test_trajectories_of_another_teacher_are_refused(tmp_path):
    pipe, words = pipe_of("sd")
    teacher(pipe, words, tmp_path).problem()
    with pytest.raises(ArtifactError, match="differing: seeds"):
        teacher(pipe, words, tmp_path, seeds=range(1, 4)).problem()
    other = eval_fixtures.tiny_pipeline(seed=1)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(ArtifactError, match="differing: model"):
        teacher(other, words, tmp_path).problem()
    arrays = next(tmp_path.glob("*.safetensors"))
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        teacher(pipe, words, tmp_path).problem()


def test_a_teacher_that_cannot_be_is_refused():
    pipe, words = pipe_of("sd")
    with pytest.raises(FewstepError, match="5 prompts were given for 6 seeds"):
        learn.Teacher(pipe, words, 2.0, 16, range(6))
    with pytest.raises(FewstepError, match="seeds, each once; got 3, 2 different"):
        learn.Teacher(pipe, words, 2.0, 16, [1, 2, 2])
    with pytest.raises(FewstepError, match="at least 8 steps, and rather 64, got 4"):
        learn.Teacher(pipe, words, 2.0, 4, range(2))
    with pytest.raises(
        FewstepError, match=r"has not converged: from 8 to 16 steps its ends move by .* give it more steps"
    ):
        learn.Teacher(pipe, words, 2.0, 8, range(2), tolerance=1e-9).problem()


def test_a_network_that_overflows_is_refused():
    pipe, words = pipe_of("sd")
    with torch.no_grad():
        pipe.unet.conv_out.weight.fill_(math.inf)
    with pytest.raises(FewstepError):
        teacher(pipe, words).problem()


# -- plans in use -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def learned():
    pipe, words = pipe_of("sd")
    problem = teacher(pipe, words, seeds=range(4)).problem()
    start = learn.untuned(problem, 3)[0].plan
    return dataclasses.replace(start, provenance=dict(problem.about))


def test_a_plan_runs_in_the_pipeline_and_warns_outside_its_range(learned, tmp_path):
    pipe, words = pipe_of("sd")
    learned.save(tmp_path / "plan.json")
    learn.use_(pipe, tmp_path / "plan.json")
    assert isinstance(pipe.scheduler, PlanScheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, words[:1], [0], steps=3, guidance=2.0)
    with pytest.warns(learn.OutsideCalibration, match="learned at guidance 2 and is used at 5"):
        draw(pipe, words[:1], [0], steps=3, guidance=5.0)


def test_a_plan_of_other_weights_or_another_prediction_is_refused(learned):
    other = eval_fixtures.tiny_pipeline(seed=1)
    with pytest.raises(ArtifactError, match="the plan was learned on weights"):
        learn.use_(other, learned)
    with pytest.warns(learn.OutsideCalibration, match="learned on weights"):
        learn.use_(other, learned, other_model=True)
    pipe, _ = pipe_of("sd")
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ArtifactError, match="was made for"):
        learn.use_(pipe, learned)


def test_auto_learns_one_plan_for_several_guidance_scales(tmp_path):
    pipe, words = pipe_of("sd")
    reports = []
    plan = learn.auto(
        pipe, [*words, "a hat"], 3, minutes=0.05, guidance=(1.5, 3.0), trajectories=6, teacher_steps=48, folder=tmp_path,
        report=reports.append,
    )  # fmt: skip
    told = plan.provenance
    assert told["guidance"] == [1.5, 3.0]
    assert told["error_after"] <= told["error_before"]
    assert len(told["prompts_sha256"]) == len(told["model"]) == 64
    learn.use_(pipe, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", learn.OutsideCalibration)
        draw(pipe, words[:1], [0], steps=3, guidance=2.0)


def test_shipped_plans_belong_to_the_embedded_models():
    """Each is for the weights that lie beside it, has the calls that its name says, and was better where it was judged."""
    from fewstep import pipelines
    from fewstep.eval import fingerprint
    from fewstep.samplers.learn.teaching.capture import denoiser_of

    there = learn.shipped()
    assert set(there) <= set(pipelines.models())
    for name, calls in there.items():
        model = fingerprint.of_module(denoiser_of(pipelines.load(name)))
        for nfe in calls:
            plan = learn.load(name, nfe)
            assert plan.nfe == nfe
            assert plan.provenance["model"] == model
            assert plan.provenance["error_after"] < plan.provenance["error_before"]
    with pytest.raises(FewstepError, match="unknown model with learned plans 'fashion-xl'"):
        learn.load("fashion-xl", 5)
    for name in list(there)[:1]:
        with pytest.raises(FewstepError, match="calls, not of 99"):
            learn.load(name, 99)
    assert all(path.stat().st_size < 30_000 for path in plans.FOLDER.iterdir())  # package data stays small


# -- the command line -------------------------------------------------------------------------------------------------
def test_tune_writes_a_plan_and_a_plot(tmp_path, capsys):
    pipe, words = pipe_of("sd")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join([*words, "a hat", ""]))
    out = tmp_path / "plan.json"
    arguments = [
        "tune", "--sampler", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--nfe", "3",
        "--trajectories", "6", "--minutes", "0.05", "--guidance", "2", "--teacher-steps", "48", "--device", "cpu",
        "--out", str(out),
    ]  # fmt: skip
    assert cli.run(arguments) == 0, capsys.readouterr().err
    assert "3 calls, held-out RMS error" in capsys.readouterr().out
    plan = SolverPlan.load(out)
    assert plan.nfe == 3
    assert plan.provenance["guidance"] == [2.0, 2.0]
    assert json.loads(out.read_text())["provenance"]["error_after"] <= plan.provenance["error_before"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--nfe", "0"], "nfe is 0; give a whole number of at least 1"),
        (["--minutes", "-1"], "minutes is -1; give a positive number"),
        (["--trajectories", "2"], "trajectories is 2; give at least 3"),
        (["--out", "plan.txt"], "give a file that ends in .json"),
        (["--model", "fashion-xl"], "fashion-xl"),
        (["--prompts", "/nowhere/at/all.txt"], "/nowhere/at/all.txt"),
    ],
)
def test_bad_input_is_one_line(changes, said, capsys):
    assert cli.run(["tune", "--sampler", *changes]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_tune_has_to_be_told_what(capsys):
    assert cli.run(["tune"]) == 2
    assert "give --sampler" in capsys.readouterr().err
