"""Parallel sampling: the sequential result for every kind of plan, in fewer rounds, within the window, sample by sample."""

import weakref

import pytest
import torch

from fewstep import pipelines, samplers
from fewstep.errors import FewstepError
from fewstep.samplers import DDIM, BrownianPath, DPMSolver, Grid, UniPC, sample, sample_parallel
from fewstep.samplers.capabilities import CAPABILITIES
from fewstep.samplers.convert import Clip
from fewstep.samplers.reverting import MeanRevertingSDE
from fewstep.samplers.schedule import Flow
from tests.eval_fixtures import tiny_pipeline
from tests.executor_fixtures import BY_PREDICTION, MIXTURE, SDE
from tests.solver_fixtures import VP, normal
from tests.tensor_fixtures import generators

MEAN_REVERTING = MeanRevertingSDE.from_thetas([0.01 * i for i in range(1, 101)])
VARIANTS = [variant for capability in CAPABILITIES for variant in capability.variants]


def models(schedule):
    """The mixture's network for :func:`sample` and for :func:`sample_parallel`; rows are computed alone."""
    network = MIXTURE.model(schedule)

    def batched(x, t, which):
        assert x.shape[:1] == t.shape == which.shape
        return network(x, t).to(x.dtype)

    return lambda x, t: network(x, t).to(x.dtype), batched


def grid_of(schedule, n):
    return Grid.named("trailing" if schedule.family == "flow" else "karras", schedule, n)


def network(x, t):
    """Some smooth function of state and time, whose coordinates go alone."""
    return 0.5 * torch.sin(x) + 0.3 * torch.cos(x + torch.as_tensor(t, dtype=torch.float64) / 300)


def close(a, b):
    """Equal to float64 rounding, 1e-16, through a dozen rows whose weights are below 1e2."""
    return torch.allclose(a, b, rtol=1e-11, atol=1e-11)


# -- the sequential result -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", VARIANTS, ids=str)
def test_no_tolerance_gives_the_sequential_result_for_every_builder(solver):
    families = next(c.families for c in CAPABILITIES if isinstance(solver, c.solver))
    schedule = VP if "vp" in families else Flow() if "flow" in families else MEAN_REVERTING
    plan = solver.compile(schedule, grid_of(schedule, 7))
    x = normal(2, 4)
    extra = {"generator": BrownianPath([1, 2]), **({"constant": normal(2, 4, seed=3)} if plan.reverting else {})}
    expected = sample(network, x, plan, **extra)
    got = sample_parallel(lambda x, t, which: network(x, t[:, None]), x, plan, window=4, tolerance=0, **extra)
    assert close(got.sample, expected)
    assert got.rounds <= plan.nfe


@pytest.mark.parametrize("window", [1, 2, 5, None])
@pytest.mark.parametrize("name", BY_PREDICTION)
def test_every_prediction_type_and_window(name, window):
    schedule = BY_PREDICTION[name]
    sequential, batched = models(schedule)
    for solver in (UniPC(order=3), SDE):
        plan = solver.compile(schedule, grid_of(schedule, 9))
        x = normal(2, 4)
        expected = sample(sequential, x, plan, generator=generators(1, 2))
        got = sample_parallel(batched, x, plan, window=window, tolerance=0, generator=generators(1, 2))
        assert close(got.sample, expected)
        assert got.rounds == 9 if window == 1 else got.rounds <= 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_states_are_rounded_as_in_a_sequential_run(dtype):
    sequential, batched = models(VP)
    plan = DPMSolver(order=2).compile(
        VP, Grid.uniform_t(VP, 8)
    )  # times that float32, as batches have them, holds exactly
    x = normal(2, 4).to(dtype)
    got = sample_parallel(batched, x, plan, window=3, tolerance=0).sample
    assert got.dtype is dtype
    assert torch.equal(got, sample(sequential, x, plan))


def test_hooks_are_part_of_it():
    sequential, batched = models(VP)
    plan = DPMSolver(order=2).compile(VP, grid_of(VP, 8))
    x = normal(2, 4)
    for extra in ({"hook": Clip(0.3)}, {"update": lambda change, before: change if before is None else 0.9 * change}):
        expected = sample(sequential, x, plan, **extra)
        assert not close(expected, sample(sequential, x, plan))
        assert close(sample_parallel(batched, x, plan, window=3, tolerance=0, **extra).sample, expected)


def test_noise_is_drawn_as_in_a_sequential_run():
    """One generator a sample is left where the sequential run leaves it: every row drew once, in order."""
    sequential, batched = models(VP)
    plan = SDE.compile(VP, grid_of(VP, 8))
    x, ours, theirs = normal(2, 4), generators(1, 2), generators(1, 2)
    got = sample_parallel(batched, x, plan, window=5, tolerance=0.01, generator=ours)
    expected = sample(sequential, x, plan, generator=theirs)
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(ours, theirs, strict=True))
    assert (got.sample - expected).square().mean().sqrt() < 0.1  # of what independent noise would make of it
    assert (sample(sequential, x, plan, generator=generators(3, 4)) - expected).square().mean().sqrt() > 0.1


# -- fewer rounds ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "spread"), [*((name, None) for name in BY_PREDICTION), ("epsilon", 0.3), ("epsilon", 3.0)]
)
def test_a_third_of_the_rounds_at_the_solvers_own_error(name, spread):
    """The tolerance is a tenth of what 40 steps of the first-order solver are wrong by; what the parallel run then adds
    stays below that error, because a state that moved by less than the tolerance changes those after it by a multiple
    near 1 of it: the flow of this mixture contracts, and the iteration's next correction is smaller still."""
    schedule = BY_PREDICTION[name]
    sequential, batched = models(schedule)
    grid = grid_of(schedule, 40)
    plan = DDIM().compile(schedule, grid)
    x = normal(2, 4)
    expected = sample(sequential, x, plan)
    exact = sample(sequential, x, UniPC(order=3).compile(schedule, grid_of(schedule, 160)))
    error = float((expected - exact).square().mean().sqrt())
    got = sample_parallel(batched, x, plan, tolerance=error / 10, spread=spread)
    assert (got.sample - expected).square().mean().sqrt() < error
    assert got.rounds <= 40 / 3


def test_counts_say_what_was_called():
    _, batched = models(VP)
    calls, per_sample = [], [0, 0, 0]

    def counting(x, t, which):
        calls.append(len(x))
        for i in which.tolist():
            per_sample[i] += 1
        return batched(x, t, which)

    plan = UniPC(order=2).compile(VP, grid_of(VP, 20))
    got = sample_parallel(counting, normal(3, 4), plan, window=6, tolerance=1e-2)
    assert got.rounds == len(calls) < 20
    assert got.evaluations == tuple(per_sample)
    assert max(calls) <= 6 * 3
    assert min(per_sample) >= 20


def test_what_is_kept_is_bounded_by_the_window():
    """Outputs of at most two rounds are alive when a new one is asked for, and no tensor of older ones, whatever the steps."""
    _, batched = models(VP)
    alive, most = weakref.WeakSet(), []

    def watched(x, t, which):
        most.append(sum(len(tensor) for tensor in alive))
        raw = batched(x, t, which)
        alive.add(raw)
        return raw

    for steps in (10, 40):
        most.clear()
        sample_parallel(watched, normal(2, 4), UniPC(order=3).compile(VP, grid_of(VP, steps)), window=5, tolerance=1e-3)
        assert max(most) <= 2 * 5 * 2


# -- sample by sample ------------------------------------------------------------------------------------------------------
def test_a_sample_does_not_depend_on_its_batch():
    _, batched = models(VP)
    plan = SDE.compile(VP, grid_of(VP, 12))
    x = normal(3, 4)
    whole = sample_parallel(batched, x, plan, window=4, tolerance=0.03, generator=generators(1, 2, 3))
    for i in range(3):
        alone = sample_parallel(batched, x[i : i + 1], plan, window=4, tolerance=0.03, generator=generators(i + 1))
        assert torch.equal(alone.sample, whole.sample[i : i + 1])
        assert alone.evaluations == whole.evaluations[i : i + 1]
        assert alone.rounds <= whole.rounds


def test_conditions_follow_their_samples():
    """Each sample has a target of its own; samples whose windows part keep theirs."""
    targets = normal(3, 4, seed=5) * torch.tensor([0.1, 1.0, 5.0]).double()[:, None]

    def toward(x, t, which):
        seen.append(which.tolist())
        return x - targets[which] * (1 + 0.1 * torch.sin(x))

    seen = []
    flow = Flow(prediction="sample")
    plan = DDIM().compile(flow, grid_of(flow, 10))

    def alone(i):
        model = lambda x, t, which: toward(x, t, which + i)  # noqa: E731
        return sample_parallel(model, normal(3, 4)[i : i + 1], plan, window=4, tolerance=1e-3).sample

    got = sample_parallel(toward, normal(3, 4), plan, window=4, tolerance=1e-3)
    for i in range(3):
        assert torch.equal(got.sample[i : i + 1], alone(i))


def test_a_network_that_fails_ends_the_run_like_a_sequential_one():
    plan = DDIM().compile(VP, grid_of(VP, 6))
    got = sample_parallel(lambda x, t, which: x * float("nan"), normal(1, 4), plan, window=3, tolerance=0.1)
    assert got.sample.isnan().all()
    assert got.rounds == 6


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"window": 0}, "window=0"),
        ({"tolerance": -1.0}, "tolerance=-1"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"spread": 0.0}, "spread=0"),
        ({"generator": torch.Generator()}, "one generator was given for a batch of 2"),
        ({"generator": generators(1, 2, 3)}, "3 generators were given for a batch of 2"),
    ],
)
def test_what_cannot_be_is_refused(wrong, match):
    plan = SDE.compile(VP, grid_of(VP, 4))
    with pytest.raises(FewstepError, match=match):
        sample_parallel(models(VP)[1], normal(2, 4), plan, **wrong)


def test_a_network_of_another_shape_is_refused():
    plan = DDIM().compile(VP, grid_of(VP, 4))
    with pytest.raises(FewstepError, match=r"answered shape \(4, 2\) to \(4, 4\)"):
        sample_parallel(lambda x, t, which: x[:, :2], normal(1, 4), plan)


# -- Stable Diffusion ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.mark.parametrize(
    ("name", "options", "guidance"),
    [
        ("DPMSolver", {}, 4.0),
        ("DDIM", {"eta": 1.0}, 1.0),
        ("DPMSolver", {"algorithm_type": "sde-dpmsolver++", "brownian": True}, 4.0),
    ],
)
def test_the_pipelines_own_images(pipe, name, options, guidance):
    """The denoiser's float32 sums depend on the batch: 1e-4 relative, as between batch sizes of one pipeline."""
    pipe.scheduler = getattr(samplers, f"{name}Scheduler").from_config(pipe.scheduler.config, **options)
    call = {"num_inference_steps": 6, "guidance_scale": guidance, "num_images_per_prompt": 2, "output_type": "pt"}
    expected = pipe(["a dress", "a bag"], generator=generators(1, 2, 3, 4), **call).images
    got = pipelines.generate_parallel(
        pipe, ["a dress", "a bag"], generator=generators(1, 2, 3, 4), window=3, tolerance=0, **call
    )
    assert got.images.shape == expected.shape
    assert (got.images - expected).norm() / expected.norm() < 1e-4
    assert got.rounds <= 6
    assert (got.images[0] - got.images[3]).norm() / expected.norm() > 1e-3
    assert [image.size for image in pipelines.generate_parallel(pipe, "a dress", num_inference_steps=2).images] == [
        (32, 32)
    ]


def test_other_schedulers_have_no_plan(pipe):
    import diffusers

    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(FewstepError, match="DDIMScheduler does not have"):
        pipelines.generate_parallel(pipe, "a dress")
