"""Merged tokens and merged frames."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.caching.forms.frame_merging import average_pairs, repeat_pairs
from fewstep.caching.forms.token_merging import matching, token_grid
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, trajectory


def tokens(batch, count, width, seed=0):
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(seed))


def test_every_cell_keeps_a_destination_and_the_most_similar_sources_are_averaged_into_theirs():
    x = tokens(2, 24, 5)
    merge = matching(x, 4, 6, 0.5, seed=3)
    kept, order = merge.down(x), merge.order
    for row in range(2):
        positions = order[row].tolist()
        assert sorted(positions) == list(range(24))
        destinations = positions[-6:]
        assert sorted((p // 6 // 2, p % 6 // 2) for p in destinations) == [(i, j) for i in (0, 1) for j in (0, 1, 2)]
        unit = torch.nn.functional.normalize(x[row], dim=-1)
        sources = [p for p in range(24) if p not in destinations]
        similarity = {p: max((float(unit[p] @ unit[d]), d) for d in destinations) for p in sources}
        merged = sorted(sources, key=lambda p: -similarity[p][0])[:12]
        assert set(positions[:12]) == set(merged)
        for number, d in enumerate(destinations):
            group = [d, *(p for p in merged if similarity[p][1] == d)]
            torch.testing.assert_close(kept[row, 6 + number], x[row, group].mean(0))
            assert all(torch.equal(merge.up(kept)[row, p], kept[row, 6 + number]) for p in group)


def test_tokens_that_are_equal_in_a_cell_lose_nothing():
    cells = tokens(1, 6, 8)
    x = cells.unflatten(1, (2, 3)).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    merge = matching(x, 4, 6, 0.75, seed=0)
    assert merge.down(x).shape == (1, 6, 8)
    torch.testing.assert_close(merge.up(merge.down(x)), x)


def test_rows_do_not_depend_on_each_other_nor_on_global_randomness():
    x, before = tokens(3, 64, 8), torch.get_rng_state()
    whole = matching(x, 8, 8, 0.4, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    for row in range(3):
        alone = matching(x[row : row + 1], 8, 8, 0.4, seed=7)
        assert torch.equal(alone.order[0], whole.order[row])
        assert torch.equal(alone.into[0], whole.into[row])
    assert not torch.equal(matching(x, 8, 8, 0.4, seed=8).order, whole.order)


@pytest.mark.parametrize(
    ("sample", "count", "grid"),
    [((1, 4, 8, 8), 16, (4, 4)), ((1, 4, 9, 6), 15, (5, 3)), ((2, 4, 64, 48), 3072, (64, 48))],
)
def test_the_grid_of_tokens_follows_from_the_sample(sample, count, grid):
    assert token_grid(torch.empty(sample), count) == grid


@pytest.mark.parametrize("name", ["sd", "dit", "pixart"])
def test_merging_nothing_changes_rounding_and_merging_something_changes_more(name):
    tiny = TINY[name]
    model, streams = tiny.model(), [tiny.conditioning()]
    plain = trajectory(tiny, model, streams)
    errors = []
    for ratio in (0.0, 0.5):
        with caching.applied(model, caching.TokenMerging(ratio)) as controller:
            outputs = trajectory(tiny, model, streams)
            again = trajectory(tiny, model, streams)
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        assert controller.report().forced == 0
        errors.append(max(float((a - b).abs().max()) for a, b in zip(outputs, plain, strict=True)))
    assert errors[0] < 1e-5 < 1e-4 < errors[1]
    assert all(torch.equal(a, b) for a, b in zip(trajectory(tiny, model, streams), plain, strict=True))


def test_outside_its_window_nothing_is_merged():
    tiny = TINY["dit"]
    model, streams = tiny.model(), [tiny.conditioning()]
    plain = trajectory(tiny, model, streams)
    with caching.applied(model, caching.TokenMerging(0.5, start=0.5)) as controller:
        outputs = trajectory(tiny, model, streams)
    assert [torch.equal(a, b) for a, b in zip(outputs, plain, strict=True)] == [True, True, False, False]
    assert controller.report().held == 0


def test_what_merging_saves_is_what_its_formula_says():
    """N tokens, r merged, D destinations, width C: 4 N C^2 + 2 N^2 C becomes that of N - r, and (N - D) D C for matching."""
    model = TINY["dit"].model()
    plan = caching.TokenMerging(0.5).compile(family_of(model), 2)
    cost, n, c, layers = plan.cost(model), 16, 16, 3
    attention = {count: 4 * count * c**2 + 2 * count**2 * c for count in (n, n // 2)}
    assert cost.full - cost.macs[0] == layers * (attention[n] - attention[n // 2] - (n - n // 4) * (n // 4) * c)


def test_only_large_maps_of_a_unet_are_merged():
    family = family_of(TINY["sdxl"].model())  # attention at half the size only
    with pytest.raises(FewstepError, match=r"no self-attention \(attn1\).*downsampled 1 times or less"):
        caching.TokenMerging().sites(family)
    assert len(caching.TokenMerging(max_downsample=2).sites(family)) > 0
    assert all(
        ":down_blocks.0" in s or ":up_blocks.1" in s
        for s in caching.TokenMerging().sites(family_of(TINY["sd"].model()))
    )


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_rotary_positions_are_refused(name):
    with pytest.raises(FewstepError, match="rotary positions"):
        caching.TokenMerging().sites(family_of(TINY[name].model()))


@pytest.mark.parametrize("frames", [4, 5])
def test_frames_are_averaged_in_pairs_and_given_back(frames):
    x = tokens(2, frames * 3, 4)
    small = average_pairs(x, frames)
    y = x.view(2, frames, 3, 4).numpy()
    expected = [y[:, i : i + 2].mean(1) for i in range(0, frames, 2)]
    np.testing.assert_allclose(small.view(2, -1, 3, 4).numpy(), np.stack(expected, 1), atol=1e-6)
    back = repeat_pairs(small, frames).view(2, frames, 3, 4)
    assert all(torch.equal(back[:, i], small.view(2, -1, 3, 4)[:, i // 2]) for i in range(frames))


class WanTransformerOfOneAttention(nn.Module):
    """Plain self-attention over the tokens of a video, which is what FrameMerging takes a model of this name to be."""

    def __init__(self):
        super().__init__()
        self.config = {"patch_size": (1, 1, 1)}
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].attn1 = Attention(8, heads=2, dim_head=4)

    def forward(self, sample, timestep):
        return self.blocks[0].attn1(sample.flatten(2).mT).mT.unflatten(2, sample.shape[2:])


def test_merging_frames_that_come_in_equal_pairs_is_exact():
    """Every key is there twice, which softmax does not see."""
    torch.manual_seed(0)
    model = WanTransformerOfOneAttention().eval()
    still = torch.randn(2, 8, 2, 3, 3).repeat_interleave(2, 2)
    moving = torch.randn(2, 8, 4, 3, 3)
    with torch.no_grad():
        plain = [model(x, torch.tensor(9.0)) for x in (still, moving)]
        with caching.applied(model, caching.FrameMerging(1.0), num_inference_steps=4):
            merged = [model(x, torch.tensor(9.0)) for x in (still, moving)]
    torch.testing.assert_close(merged[0], plain[0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(merged[1], plain[1], atol=1e-3)


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_frames_are_merged_in_the_first_steps_only(name):
    tiny = TINY[name]
    model, streams = tiny.model(), [tiny.conditioning()]
    samples = [tiny.sample(seed=i) for i in range(4)]

    def run():
        with torch.no_grad():
            return [
                tiny.call(model, x, t, streams[0]) for x, t in zip(samples, torch.arange(4).flip(0) * 100, strict=True)
            ]

    plain = run()
    with caching.applied(model, caching.FrameMerging(0.5)):
        outputs = run()
    assert [torch.equal(a, b) for a, b in zip(outputs, plain, strict=True)] == [False, False, True, True]


def test_rotary_tables_of_merged_frames_are_those_of_the_first():
    tiny = TINY["wan"]
    model = tiny.model()
    attention = model.blocks[0].attn1
    seen = []
    hook = attention.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args), with_kwargs=True)
    inner = attention.forward
    with caching.applied(model, caching.FrameMerging(1.0), num_inference_steps=1), torch.no_grad():
        caught = []
        attention.processor = Recorder(attention.processor, caught)
        tiny.call(model, tiny.sample(), torch.tensor(500), tiny.conditioning())
        attention.processor = attention.processor.inner
    hook.remove()
    assert attention.forward == inner
    (x, _, _, tables), (merged, rotary) = seen[0], caught[0]
    frames = tiny.shape[1]
    per_frame = x.shape[1] // frames
    assert merged.shape[1] == -(-frames // 2) * per_frame
    for whole, part in zip(tables, rotary, strict=True):
        picked = torch.cat([whole[:, f * per_frame : (f + 1) * per_frame] for f in range(0, frames, 2)], 1)
        assert torch.equal(part, picked)


class Recorder:
    """A processor that writes down what it is called with."""

    def __init__(self, inner, caught):
        self.inner, self.caught = inner, caught

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        self.caught.append((hidden_states, rotary_emb))
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: caching.TokenMerging(0.8), r"ratio is 0\.8"),
        (lambda: caching.TokenMerging(start=1.0), r"0 <= start < stop <= 1"),
        (lambda: caching.FrameMerging().sites(family_of(TINY["dit"].model())), r"serves CogVideoX and Wan"),
        (lambda: token_grid(torch.empty(1, 4, 8, 8), 17), r"17 tokens are no grid"),
    ],
)
def test_bad_input_is_named(made, message):
    with pytest.raises(FewstepError, match=message):
        made()
