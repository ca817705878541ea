"""The unconditional half of guidance: reused, left out, and together with caches inside the network.

Rows of a batch do not depend on each other, so a call of the conditional half alone differs from its half of the full call
by the rounding of sums in another order only. ROUNDING is 2^-24 with room for what a few layers make of it.
"""

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, announced, timesteps, unet_condition
from tests.eval_fixtures import tiny_pipeline

ROUNDING = 1e-5
SCALE = 4.0
GUIDED = ("sd", "sdxl", "dit", "pixart", "sd3", "cogvideox")
"""Families whose pipelines guide in one call."""


@torch.no_grad()
def guided(tiny, model, conditioning, steps=4, first=None, rows=None, seen=None):
    """Outputs of calls with every sample twice; the sample follows the guided output.

    Args:
        rows: run only these rows of what is called, on the samples of ``seen``.
        seen: inputs of an earlier run, to run through instead.
    """
    first = family_of(model).conditional_first if first is None else first
    x = torch.cat([tiny.sample()] * 2)
    outputs, inputs = [], []
    for i, t in enumerate(timesteps(steps)):
        x = seen[i] if seen else x
        inputs.append(x)
        given = {k: cut(v, rows) for k, v in conditioning.items()} if rows else conditioning
        out = tiny.call(model, x[rows] if rows else x, t, given)
        outputs.append(out)
        if not seen:
            halves = out.chunk(2)
            cond, uncond = halves if first else halves[::-1]
            step = uncond + SCALE * (cond - uncond)
            axis = next((j for j in range(1, x.ndim) if step.shape[j] != x.shape[j]), 1)
            x = torch.cat([x.chunk(2)[0] - 0.2 * step.narrow(axis, 0, x.shape[axis])] * 2)
    return outputs, inputs


def cut(value, rows):
    return (
        {k: cut(v, rows) for k, v in value.items()}
        if isinstance(value, dict)
        else value
        if value is None
        else value[rows]
    )


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def close(first, second):
    return all(torch.allclose(a, b, atol=ROUNDING, rtol=ROUNDING) for a, b in zip(first, second, strict=True))


@pytest.fixture(params=GUIDED, scope="module")
def tiny(request):
    return TINY[request.param]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model()


def test_computing_both_halves_changes_no_bit(tiny, model):
    conditioning = tiny.conditioning(4)
    plain, _ = guided(tiny, model, conditioning)
    for method in (caching.UncondReuse(interval=1), caching.GuidanceWindow()):
        with caching.applied(model, method):
            assert same(guided(tiny, model, conditioning)[0], plain)
    assert same(guided(tiny, model, conditioning)[0], plain)


def test_halves_with_one_conditioning_need_but_one_of_them(tiny, model):
    """Then d = 0, and to reuse it or to leave the half out is exact."""
    one = tiny.conditioning(2)
    both = {k: twice(v) for k, v in one.items()}
    plain, _ = guided(tiny, model, both)
    for method in (caching.UncondReuse(interval=3), caching.GuidanceWindow(0.5, 1.0), caching.GuidanceWindow(0, 0.25)):
        with caching.applied(model, method):
            assert close(guided(tiny, model, both)[0], plain)


def twice(value):
    if isinstance(value, dict):
        return {k: twice(v) for k, v in value.items()}
    return value if value is None else torch.cat([value] * 2)


def test_a_reused_half_is_the_other_minus_the_last_difference(tiny, model):
    conditioning = tiny.conditioning(4)
    with caching.applied(model, caching.UncondReuse(interval=2)) as controller:
        outputs, inputs = guided(tiny, model, conditioning)
    assert [row[0] for row in controller.report().decisions()["decisions"]] == [0, 1, 0, 1]
    exact, _ = guided(tiny, model, conditioning, seen=inputs)
    first = family_of(model).conditional_first
    for step in (1, 3):
        before, now, made = (v.chunk(2)[:: 1 if first else -1] for v in (exact[step - 1], exact[step], outputs[step]))
        assert torch.allclose(made[0], now[0], atol=ROUNDING)
        assert torch.allclose(made[1], now[0] - (before[0] - before[1]), atol=2 * ROUNDING)
        assert not torch.allclose(made[1], now[1], atol=10 * ROUNDING)


def test_inner_caches_go_on_for_the_half_that_runs(tiny, model):
    """Conditional rows come out as if they had been alone all the time (caching.md, oracle 14)."""
    conditioning = tiny.conditioning(4)
    inner = "branch.0" if hasattr(model, "down_blocks") else "blocks[1:]"
    method = caching.Interval(2, at=(inner,))
    rows = slice(0, 2) if family_of(model).conditional_first else slice(2, 4)
    with caching.applied(model, [caching.GuidanceWindow(0, 0.25), method]) as controller:
        outputs, inputs = guided(tiny, model, conditioning)
    assert controller.report().forced == 0
    with caching.applied(model, method):
        alone, _ = guided(tiny, model, conditioning, rows=rows, seen=inputs)
    assert close([out[rows] for out in outputs], alone)
    assert same([out.chunk(2)[0] for out in outputs[1:]], [out.chunk(2)[1] for out in outputs[1:]])
    plain, _ = guided(tiny, model, conditioning, rows=rows, seen=inputs)
    assert not close(plain, alone)


def test_what_half_of_the_batch_computed_last_is_computed_anew_for_all_of_it(tiny, model):
    """Inner values of step 1 are of one half when step 2 wants both: step 2 computes, like a run without the inner cache."""
    conditioning = tiny.conditioning(4)
    inner = "encoder" if hasattr(model, "down_blocks") else "blocks"
    actions = np.array([[0, 0], [1, 0], [0, 1]], dtype=np.int8)  # uncond: C R C; inner: C C R
    plan = caching.CachePlan(("uncond", inner), actions)
    with caching.applied(model, plan) as controller:
        outputs, inputs = guided(tiny, model, conditioning, 3)
    assert controller.report().forced == 1
    assert close(outputs[2:], guided(tiny, model, conditioning, 3, seen=inputs)[0][2:])


def test_which_half_is_which_can_be_said():
    tiny, model = TINY["pixart"], TINY["pixart"].model()
    conditioning = tiny.conditioning(4)
    swapped = {k: cut(v, [2, 3, 0, 1]) for k, v in conditioning.items() if k == "encoder_hidden_states"}
    with caching.applied(model, caching.UncondReuse(interval=2, uncond="first")):
        outputs, _ = guided(tiny, model, conditioning)
    with caching.applied(model, caching.UncondReuse(interval=2, uncond="second")):
        others, _ = guided(tiny, model, {**conditioning, **swapped}, first=True)
    assert close([out[[2, 3, 0, 1]] for out in outputs], others)


def test_guidance_that_the_pipeline_ends_keeps_the_conditional_half():
    """diffusers' recipe for it: a callback halves the embeddings and sets the scale to 0."""

    def stop(pipe, step, timestep, kwargs):
        if step == 1:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}
        return {}

    pipe = tiny_pipeline()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {
        "num_inference_steps": 4, "guidance_scale": SCALE, "latents": latents, "output_type": "latent",
        "callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }  # fmt: skip
    inner = caching.DeepCache(4)
    with caching.applied(pipe, inner) as controller:
        ended = pipe(["a", "b"], **options).images
    assert controller.report().forced == 0
    assert [row[0] for row in controller.report().decisions()["decisions"]] == [0, 1, 1, 1]
    with caching.applied(pipe, [caching.GuidanceWindow(0, 0.5), inner]):
        del options["callback_on_step_end"], options["callback_on_step_end_tensor_inputs"]
        window = pipe(["a", "b"], **options).images
    assert torch.allclose(ended, window, atol=1e-3 * float(window.abs().max()))


def test_a_third_call_beside_the_guided_one_is_a_stream_of_its_own():
    """As of skip-layer guidance: the conditional rows once more, at the same step, which is not the end of guidance."""
    tiny = TINY["sd3"]
    model, conditioning = tiny.model(), tiny.conditioning(4)
    half = {k: v[2:] for k, v in conditioning.items()}
    with caching.applied(model, caching.Interval(4, at=("blocks",))) as controller, torch.no_grad():
        for i, t in enumerate(timesteps()):
            x = tiny.sample(seed=i)
            tiny.call(model, torch.cat([x, x]), t, conditioning)
            if i >= 2:
                tiny.call(model, x, t, half)
    assert controller.report().forced == 1


def test_two_calls_a_step_share_the_conditional_one():
    tiny = TINY["wan"]
    model = tiny.model()
    streams = {"cond": tiny.conditioning(2), "uncond": tiny.conditioning(2, seed=5)}

    def run(order=("cond", "uncond")):
        outputs = []
        with torch.no_grad():
            for i, t in enumerate(timesteps()):
                for name in order:
                    with announced(model, name):
                        outputs.append(tiny.call(model, tiny.sample(seed=i), t, streams[name]))
        return outputs

    plain = run()
    with caching.applied(model, caching.UncondReuse(interval=2)):
        made = run()
        with pytest.raises(FewstepError, match=r"has to be called first at every step"):
            run(("uncond", "cond"))
    assert same(made[::2], plain[::2])
    assert torch.equal(made[2 * 2 + 1], plain[2 * 2 + 1])
    for step in (1, 3):
        expected = plain[2 * step] - (plain[2 * step - 2] - plain[2 * step - 1])
        assert torch.allclose(made[2 * step + 1], expected, atol=ROUNDING)
    with caching.applied(model, caching.GuidanceWindow(0, 0.5)):
        made = run()
    assert same(made[4::2], made[5::2])
    assert same(made[:4], plain[:4])


def test_affine_tables_make_an_affine_difference_exact():
    """d_t = a_t d_0 + b_t by channel, in a network that is a plain function."""
    scale, shift = torch.tensor([[1.0, 1.0], [0.7, 1.3]]), torch.tensor([[0.0, 0.0], [0.2, -0.1]])

    def network(x, t, given):
        step = 0 if t > 500 else 1
        delta = scale[step].view(1, 2, 1, 1) * torch.ones_like(x).cumsum(-1) + shift[step].view(1, 2, 1, 1)
        return x - (1 - given).view(-1, 1, 1, 1) * delta

    predict = caching.Affine({"uncond": scale[:, None]}, {"uncond": shift})
    cached = caching.wrap(network, caching.UncondReuse(interval=2, predict=predict), num_inference_steps=2)
    given = torch.tensor([0.0, 1.0])
    for t in (900, 100):
        x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(t)).repeat(2, 1, 1, 1)
        assert torch.allclose(cached(x, t, given), network(x, t, given), atol=1e-6)


def test_a_teacher_sees_the_true_difference_and_decides_what_comes_of_it(tiny, model):
    """How calibration fits predictors: one that answers with the truth leaves the network as it is."""
    conditioning = tiny.conditioning(4)
    with caching.applied(model, caching.UncondReuse(interval=2)) as controller:
        seen = []
        controller.caches[0].teacher = lambda cell, step, true: seen.append(step) or true
        outputs, inputs = guided(tiny, model, conditioning)
    assert seen == [1, 3]
    assert close(outputs, guided(tiny, model, conditioning, seen=inputs)[0])


def spectrum_by_hand(delta, low, high):
    """The published split, on shifted two-sided spectra."""
    full = np.fft.fftshift(np.fft.fft2(delta), axes=(-2, -1))
    height, width = delta.shape[-2:]
    y, x = np.meshgrid(np.arange(height) - height // 2, np.arange(width) - width // 2, indexing="ij")
    inside = x**2 + y**2 <= (min(height, width) // 5) ** 2
    back = np.fft.ifft2(np.fft.ifftshift(np.where(inside, low, high) * full, axes=(-2, -1)))
    assert np.abs(back.imag).max() < 1e-12
    return back.real


@pytest.mark.parametrize("size", [(16, 16), (11, 8), (10, 15)])
def test_frequencies_are_weighted_once_or_as_often_as_published(size):
    delta = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    cell = Cell.empty("uncond", 1)
    cell.keep(10, [delta])
    options = {"low": 1.2, "high": 1.1, "low_until": 12, "high_from": 12}
    once, published = caching.FrequencyDelta(**options), caching.FasterCacheDelta(**options)
    kept = delta.numpy().astype(np.float64)
    for step in range(11, 15):
        low, high = 1.2 if step <= 12 else 1.0, 1.1 if step >= 12 else 1.0
        expected = spectrum_by_hand(delta.numpy().astype(np.float64), low, high)
        kept = spectrum_by_hand(kept, low, high)  # in place, as the authors' code does it
        np.testing.assert_allclose(once.predict(cell, step)[0].numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(published.predict(cell, step)[0].numpy(), kept, atol=1e-5)
    assert np.abs(kept - expected).max() > 0.05


def test_weights_of_one_are_the_difference_itself():
    cell = Cell.empty("uncond", 1)
    cell.keep(0, [torch.randn(1, 2, 8, 8)])
    assert caching.FrequencyDelta(low=1.0, high=1.0).predict(cell, 1)[0] is cell.history[0].leaves[0]


def test_plans_of_guidance_are_saved_with_their_predictor(tmp_path):
    family = family_of(TINY["dit"].model())
    for method in (caching.CFGCache(5), caching.FasterCacheCFG(5), caching.UncondReuse(start=0.2, stop=0.8)):
        plan = method.compile(family, 50)
        plan.save(tmp_path / "plan.json")
        loaded = caching.CachePlan.load(tmp_path / "plan.json")
        assert loaded.predictor == plan.predictor
        assert (loaded.actions == plan.actions).all()
        assert loaded.digest == plan.digest
    assert {a for a in plan.actions[:10, 0]} == {a for a in plan.actions[40:, 0]} == {int(caching.Action.SKIP)}


def test_a_step_without_the_unconditional_half_costs_half():
    model = TINY["dit"].model()
    family = family_of(model)
    plan = caching.UncondReuse(interval=2).compile(family, 4)
    assert plan.cost(model).share == pytest.approx(0.75, abs=1e-12)
    both = plan | caching.Interval(2, at=("blocks",)).compile(family, 4)
    inner = caching.Interval(2, at=("blocks",)).compile(family, 4).cost(model)
    assert both.cost(model).macs[1] == pytest.approx(inner.macs[1], abs=1)  # half of twice the batch


@pytest.mark.parametrize(
    ("batch", "message"), [(3, "needs guidance in one call.*a batch of 3"), (2, "halves are different samples")]
)
def test_calls_without_guidance_are_refused(batch, message):
    tiny, model = TINY["sd"], unet_condition()
    with caching.applied(model, caching.UncondReuse()), pytest.raises(FewstepError, match=message), torch.no_grad():
        tiny.call(model, tiny.sample(batch), timesteps()[0], tiny.conditioning(batch))
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: caching.GuidanceWindow(0.5, 0.5), r"0 <= start < stop <= 1"),
        (lambda: caching.UncondReuse(interval=0), r"interval is 0"),
        (lambda: caching.UncondReuse(uncond="last"), r"unknown half 'last'"),
        (lambda: caching.CFGCache(start=2), r"start is 2"),
        (lambda: family_of(unet_condition()).site("uncond:down_blocks.7"), r"has not"),
        (lambda: family_of(unet_condition()).site("merg:mid_block"), r"unknown form.*did you mean 'merge'"),
        (lambda: family_of(unet_condition()).site("merge[ratoi=1]:mid_block"), r"did you mean 'ratio'"),
        (lambda: family_of(unet_condition()).site("merge[ratio=x]:mid_block"), r"a number is needed"),
    ],
)
def test_bad_input_is_named(made, message):
    with pytest.raises(FewstepError, match=message):
        made()
