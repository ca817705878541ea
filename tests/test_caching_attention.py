"""Windowed attention with statistics of the full one, and the search for the cheapest form a step and layer."""

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.nn.functional import scaled_dot_product_attention

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.caching.forms.bands import Tokens, banded, full_logsumexp
from fewstep.caching.forms.windowed import Windowed
from fewstep.caching.methods.fast_attention import relative_change
from fewstep.caching.predictors import Hold
from fewstep.caching.roles import Moment, Scene
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, timesteps, trajectory
from tests.pipeline_fixtures import seeded, tiny_dit_pipeline

DOUBLE = 1e-13
"""Sums of some dozens of float64 terms of size 1, in another order."""


def qkv(count=37, heads=3, seed=0):
    return torch.randn(3, 2, heads, count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("window", [0, 1, 5, 16, 20, 36, 100])
def test_the_band_is_attention_under_a_mask(window):
    q, k, v = qkv()
    near = (torch.arange(37)[:, None] - torch.arange(37)).abs() <= window
    out, lse = banded(q, k, v, window)
    scores = (q @ k.mT / 8**0.5).masked_fill(~near, -torch.inf)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, attn_mask=near), atol=DOUBLE, rtol=DOUBLE)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=DOUBLE, rtol=DOUBLE)


@pytest.mark.parametrize(("prefix", "frames"), [(5, 1), (0, 4), (5, 4), (1, 32)])
@pytest.mark.parametrize("window", [0, 2, 7, 40])
def test_a_video_has_one_window_for_all_frames_and_its_text_is_always_seen(window, prefix, frames):
    q, k, v = qkv(prefix + 32)
    place = torch.arange(32) % (32 // frames)
    near = torch.ones(prefix + 32, prefix + 32, dtype=torch.bool)
    near[prefix:, prefix:] = (place[:, None] - place).abs() <= window
    out, lse = banded(q, k, v, window, tokens=Tokens(prefix, frames))
    scores = (q @ k.mT / 8**0.5).masked_fill(~near, -torch.inf)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, attn_mask=near), atol=DOUBLE, rtol=DOUBLE)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=DOUBLE, rtol=DOUBLE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "prefix", "frames"), [(5, 0, 1), (2, 5, 4), (40, 1, 1)])
def test_flex_attention_computes_the_same_band(window, prefix, frames):
    from fewstep.caching.forms.flex import flexed

    q, k, v = qkv(prefix + 32).float()
    expected, denominator = banded(q, k, v, window, tokens=Tokens(prefix, frames))
    out, lse = flexed(q, k, v, window, tokens=Tokens(prefix, frames))
    # float32 sums of some dozens of terms of size 1
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, denominator, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_method_with_flex_attention_draws_what_it_draws_without():
    tiny = TINY["dit"]
    model, streams = tiny.model(), [tiny.conditioning()]
    found = []
    for flex in (False, True):
        with caching.applied(model, caching.ReAttention(1, 2, 1, flex=flex), num_inference_steps=4) as controller:
            found.append(trajectory(tiny, model, streams))
            assert controller.report().hit_rate > 0
    plan = caching.ReAttention(1, 2, 1, flex=True).compile(family_of(model), 4)
    assert "flex=1" in plan.sites[0]
    assert plan.cost(model).total == caching.ReAttention(1, 2, 1).compile(family_of(model), 4).cost(model).total
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # the same sums in another order, four steps long


@pytest.mark.parametrize("block", [5, 37, 1024])
def test_the_full_denominator_does_not_depend_on_blocks(block):
    q, k, _ = qkv()
    torch.testing.assert_close(
        full_logsumexp(q, k, block=block), (q @ k.mT / 8**0.5).logsumexp(-1), atol=DOUBLE, rtol=0
    )


def attend(role, cell, step, q, k, v, keep=True):
    """The role around a bare call of attention."""
    act = role.compute if step == 0 else role.sparse
    at = Moment(cell, step, keep, Hold())
    return act(at, lambda q, k, v: scaled_dot_product_attention(q, k, v), [q, k, v], {})


@pytest.mark.parametrize("rescale", [0, 1])
def test_a_refresh_is_exact_and_splits_into_what_is_kept(rescale):
    """O = rho O_W + R, and the same inputs at the next step give O again (caching.md, oracle 7)."""
    q, k, v = qkv()
    role, cell = Windowed("attn", window=4, rescale=rescale), Cell.empty("window:attn", 1)
    full = attend(role, cell, 0, q, k, v)
    assert torch.equal(full, scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(attend(role, cell, 1, q, k, v), full, atol=DOUBLE, rtol=DOUBLE)
    rho, rest = cell.history[0].leaves
    if rescale:
        near = (torch.arange(37)[:, None] - torch.arange(37)).abs() <= 4
        mass = ((q @ k.mT / 8**0.5).softmax(-1) * near).sum(-1, keepdim=True)  # the window's share of all attention
        torch.testing.assert_close(rho, mass, atol=DOUBLE, rtol=DOUBLE)
        torch.testing.assert_close(
            rest, (q @ k.mT / 8**0.5).softmax(-1).masked_fill(near, 0) @ v, atol=DOUBLE, rtol=1e-9
        )
    else:
        assert rho is None


@pytest.mark.parametrize("rescale", [0, 1])
def test_a_window_of_everything_keeps_nothing_and_is_exact_for_other_inputs_too(rescale):
    role, cell = Windowed("attn", window=36, rescale=rescale), Cell.empty("window:attn", 1)
    attend(role, cell, 0, *qkv())
    rho, rest = cell.history[0].leaves
    assert rho is None or float((rho - 1).abs().max()) < DOUBLE
    assert float(rest.abs().max()) < DOUBLE
    q, k, v = qkv(seed=1)
    torch.testing.assert_close(
        attend(role, cell, 1, q, k, v), scaled_dot_product_attention(q, k, v), atol=10 * DOUBLE, rtol=1e-9
    )


def test_the_ratio_drifts_from_the_second_sparse_step_on_and_stays_at_most_one():
    q, k, v = qkv()
    role, cell = Windowed("attn", window=4, rescale=1, drift=0.3), Cell.empty("window:attn", 1)
    attend(role, cell, 0, q, k, v)
    rho, rest = cell.history[0].leaves
    near, _ = banded(q, k, v, 4)
    for step in (1, 2, 3, 9):
        expected = (rho + 0.3 * (step - 1)).clamp(max=1) * near + rest
        torch.testing.assert_close(attend(role, cell, step, q, k, v), expected, atol=DOUBLE, rtol=DOUBLE)
    torch.testing.assert_close(expected, near + rest, atol=DOUBLE, rtol=DOUBLE)


@pytest.mark.parametrize("name", ["sd", "dit", "pixart", "cogvideox", "wan"])
@pytest.mark.parametrize("rescale", [False, True])
def test_where_nothing_changes_a_window_and_its_statistics_are_the_full_attention(name, rescale):
    """The same call twice (oracle 2), in float32: the rounding of a few layers."""
    tiny = TINY[name]
    model, x, conditioning = tiny.model(), tiny.sample(), tiny.conditioning()
    method = caching.ReAttention(window=2, interval=2, warmup=1, drift=0.0, rescale=rescale)
    with torch.no_grad(), caching.applied(model, method, num_inference_steps=4) as controller:
        first, second = (tiny.call(model, x, t, conditioning) for t in (torch.tensor(500.0), torch.tensor(500.0)))
    assert controller.report().decisions()["decisions"][1][0] == caching.Action.SPARSE
    torch.testing.assert_close(second, first, atol=1e-5, rtol=1e-5)


def test_full_steps_are_where_the_paper_has_them():
    table = caching.ReAttention().table(20, ["a", "b"])
    assert [i for i in range(20) if table[i, 0] == caching.Action.COMPUTE] == [0, 1, 2, 3, 4, 5, 10, 15]


@pytest.mark.parametrize("rescale", [0, 1])
def test_the_error_of_a_sparse_step_is_of_first_order_in_what_changed_since(rescale):
    """R (and rho) are held: halving the change halves the error, while a window alone errs by R whatever the change."""
    past = qkv()
    change = qkv(seed=1)
    errors = []
    for size in (0.02, 0.01):
        role, cell = Windowed("attn", window=4, rescale=rescale), Cell.empty("window:attn", 1)
        attend(role, cell, 0, *past)
        now = list(past + size * change)
        errors.append(float((attend(role, cell, 1, *now) - scaled_dot_product_attention(*now)).norm()))
    assert abs(np.log2(errors[0] / errors[1]) - 1) < 0.25
    assert errors[0] < 0.1 * float((banded(*now, 4)[0] - scaled_dot_product_attention(*now)).norm())


def test_a_processor_that_hides_attention_is_refused():
    tiny = TINY["dit"]
    model = tiny.model()
    model.transformer_blocks[1].attn1.set_processor(AttnProcessor())
    with (
        caching.applied(model, caching.ReAttention(warmup=1)),
        torch.no_grad(),
        pytest.raises(FewstepError, match=r"transformer_blocks.1.attn1 made 0 calls of scaled_dot_product_attention"),
    ):
        trajectory(tiny, model, [tiny.conditioning()], timesteps(8))


def test_options_lie_in_the_name_of_the_site_and_so_in_the_plan_file(tmp_path):
    model = TINY["dit"].model()
    plan = caching.ReAttention(window=7, drift=0.5).compile(family_of(model), 20)
    plan.save(tmp_path / "plan.json")
    (role,) = family_of(model).site(caching.CachePlan.load(tmp_path / "plan.json").sites[0]).roles
    assert role == Windowed("transformer_blocks.0.attn1", window=7, rescale=1, drift=0.5, outputs=0)


@pytest.mark.parametrize(("name", "tokens"), [("cogvideox", Tokens(3, 2)), ("wan", Tokens(0, 2)), ("dit", Tokens())])
def test_what_tokens_are_follows_from_the_model_and_the_sample(name, tokens):
    tiny = TINY[name]
    family = family_of(tiny.model())
    (role,) = family.site(caching.ReAttention().sites(family)[0]).roles
    at = Moment(Cell.empty("", 1), 0, True, Hold(), Scene(sample=tiny.sample()))
    count = tokens.prefix + 16 * tokens.frames  # maps of 8 x 8 in patches of 2 x 2
    assert role._tokens(at, count) == tokens
    if tokens.frames > 1:
        with pytest.raises(FewstepError, match="fewer than a sample"):
            role._tokens(at, 31)


def test_models_without_plain_self_attention_are_refused():
    with pytest.raises(FewstepError, match="needs self-attention"):
        caching.apply_(TINY["flux"].model(), caching.ReAttention())


# -- the search -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pipe():
    return tiny_dit_pipeline()


def draw(pipe, scale=4.0):
    out = pipe(
        [1, 2], guidance_scale=scale, num_inference_steps=8, generator=seeded(2), output_type="np"
    )  # fmt: skip
    return out.images


def search(pipe, threshold, share=True, scale=4.0):
    images = []
    plan = caching.search_attention(
        pipe, lambda: images.append(draw(pipe, scale)), threshold=threshold, window=2, share=share
    )
    return plan, images[0]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("threshold", [0.003, 0.02, 0.1])
def test_the_plan_does_what_the_search_did(pipe, threshold, share):
    plain = draw(pipe)
    plan, images = search(pipe, threshold, share)
    assert 0 < plan.reuse < 1
    assert np.abs(images - plain).max() > 0
    with caching.applied(pipe, plan) as controller:
        assert (draw(pipe) == images).all()
    assert controller.report().forced == 0
    assert (draw(pipe) == plain).all()


def test_no_tolerance_finds_the_full_plan_and_all_tolerance_the_cheapest(pipe):
    plan, images = search(pipe, 0.0)
    assert plan.reuse == 0
    assert (images == draw(pipe)).all()
    plan, _ = search(pipe, 1e9)
    assert (plan.actions[1:, :2] == caching.Action.REUSE).all()
    assert (plan.actions[0] == caching.Action.COMPUTE).all()


def test_forms_get_cheaper_with_the_threshold(pipe):
    shares = [search(pipe, threshold)[0].cost(pipe.transformer).share for threshold in (0.0, 0.01, 1.0)]
    assert shares[0] == 1
    assert shares[0] > shares[1] > shares[2]


def test_a_copied_pipeline_takes_the_plan_along(pipe):
    plan, images = search(pipe, 0.05)
    with caching.applied(pipe, plan):
        for copied in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
            assert (draw(copied) == images).all()


def test_sharing_between_halves_needs_guidance(pipe):
    with pytest.raises(FewstepError, match="give share=False"):
        search(pipe, 0.1, scale=1.0)
    assert "forward" not in vars(pipe.transformer.transformer_blocks[0])
    plan, _ = search(pipe, 0.1, share=False, scale=1.0)
    assert len(plan.sites) == 2


def test_the_loss_is_relative_and_bounded():
    a, b = torch.tensor([1.0, 0.0, -2.0, 0.0]), torch.tensor([2.0, 0.0, 2.0, 5.0])
    assert relative_change(a, b) == pytest.approx((0.5 + 0 + 2 + 1) / 4)
