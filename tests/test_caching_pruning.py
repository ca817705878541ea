"""Operators left out for good, and their scores.

What a removed operator should give is known: the same network with that operator's last weights at zero.
"""

import copy

import pytest
import torch

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, timesteps, trajectory

LAST = {"attn1": "to_out.0", "attn2": "to_out.0", "ff": "net.2"}


def silenced(model, path):
    """A copy with the weights of one layer at zero, so that it adds nothing."""
    model = copy.deepcopy(model)
    layer = model.get_submodule(path)
    torch.nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)
    return model


def agree(tiny, first, second):
    streams = [tiny.conditioning()]
    pairs = zip(trajectory(tiny, first, streams), trajectory(tiny, second, streams), strict=True)
    return all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("name", ["sd", "dit", "pixart"])
def test_a_branch_left_out_adds_nothing(name):
    tiny = TINY[name]
    model = tiny.model()
    for path in [p for p in caching.removable(model) if p.rsplit(".", 1)[-1] in LAST][:6]:
        expected = silenced(model, f"{path}.{LAST[path.rsplit('.', 1)[-1]]}")
        assert not agree(tiny, model, expected)
        with caching.applied(model, caching.Removal((path,))):
            assert agree(tiny, model, expected)


@pytest.mark.parametrize("name", ["sd", "sdxl", "unet2d"])
def test_a_resnet_or_a_stack_of_attention_left_out_passes_its_input_on(name):
    tiny = TINY[name]
    model = tiny.model()
    found = [s for s in caching.removable(model) if s.startswith("without:")]
    assert {s.split(".")[-2] for s in found} == {"resnets", "attentions"}
    for site in found:
        path = site.removeprefix("without:")
        module = model.get_submodule(path)
        last = "conv2" if hasattr(module, "conv2") else "proj_out" if hasattr(module, "proj_out") else "to_out.0"
        with caching.applied(model, caching.Removal((site,))):
            assert agree(tiny, model, silenced(model, f"{path}.{last}"))


@pytest.mark.parametrize("name", ["dit", "pixart", "wan"])
def test_a_block_left_out_is_a_network_with_one_less(name):
    tiny = TINY[name]
    model = tiny.model()
    smaller = copy.deepcopy(model)
    blocks = smaller.blocks if name == "wan" else smaller.transformer_blocks
    del blocks[1]
    with caching.applied(model, caching.Removal(("blocks[1:2]",))):
        assert agree(tiny, model, smaller)


def test_scores_measure_what_leaving_out_does_to_the_channels_and_rank_it():
    tiny = TINY["dit"]
    model = silenced(tiny.model(), "transformer_blocks.1.attn1.to_out.0")

    def run(network=model):
        return trajectory(tiny, network, [tiny.conditioning(8)], timesteps(2), x=tiny.sample(8))[-1]

    at = ["transformer_blocks.0.ff", "transformer_blocks.1.attn1", "blocks[2:3]"]
    scores = caching.removal_scores(model, run, at)
    assert next(iter(scores)) == "transformer_blocks.1.attn1"
    assert scores["transformer_blocks.1.attn1"] < 1e-6
    assert list(scores.values()) == sorted(scores.values())
    smaller = silenced(model, "transformer_blocks.0.ff.net.2")
    before, after = (x.double().transpose(0, 1).flatten(1) for x in (run(), run(smaller)))
    expected = (before.mean(1) - after.mean(1)).norm()
    expected = expected + (before.std(1, correction=0) - after.std(1, correction=0)).norm()
    assert scores["transformer_blocks.0.ff"] == pytest.approx(float(expected), rel=1e-4)


def test_the_least_sites_go_together_only_where_none_holds_another():
    scores = {
        "blocks[0:1]": 0.1,
        "transformer_blocks.0.ff": 0.05,
        "transformer_blocks.1.attn1": 0.3,
        "transformer_blocks.10.ff": 0.2,
    }
    assert caching.Removal.of_least(scores, 3).at == (
        "transformer_blocks.0.ff", "transformer_blocks.10.ff", "transformer_blocks.1.attn1",
    )  # fmt: skip
    with pytest.raises(FewstepError, match=r"count is 4; of the 4 sites scored 1 to 3 can go together"):
        caching.Removal.of_least(scores, 4)


def test_a_removal_is_a_plan_with_a_cost_and_stacks_with_a_cache():
    model = TINY["dit"].model()
    family = family_of(model)
    plan = caching.Removal(("blocks[0:1]",)).compile(family, 4)
    assert plan.reuse == 1
    cost = plan.cost(model)
    assert len(set(cost.macs)) == 1
    assert 0.6 < cost.share < 0.75
    with caching.applied(
        model, [caching.Removal(("blocks[0:1]",)), caching.Interval(2, at=("blocks[1:]",))]
    ) as controller:
        trajectory(TINY["dit"], model, [TINY["dit"].conditioning()])
    assert [list(row) for row in controller.report().decisions()["decisions"]] == [[2, 0], [2, 1], [2, 0], [2, 1]]
    assert not any("computed" in note for note in controller.report().warnings)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: caching.Removal("blocks"), r"give a tuple"),
        (lambda: caching.apply_(TINY["dit"].model(), caching.Removal(("blocks[7:8]",))), r"is empty"),
        (lambda: caching.removal_scores(TINY["dit"].model(), lambda: None), r"run has to return latents"),
    ],
)
def test_bad_input_is_named(made, message):
    with pytest.raises(FewstepError, match=message):
        made()
