"""Early exit: depth by time, skipped or stood for; and Step Rehash's profile."""

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.caching.families import family_of
from fewstep.errors import FewstepError
from tests.caching_fixtures import TINY, TRANSFORMERS, blocks_of, trajectory
from tests.pipeline_fixtures import tiny_ddpm_pipeline, tiny_dit_pipeline


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_exit_behind_the_last_block_is_the_whole_network(name):
    tiny = TINY[name]
    model, streams = tiny.model(), [tiny.conditioning()]
    plain = trajectory(tiny, model, streams)
    with caching.applied(model, caching.EarlyExit((1.0,)), num_inference_steps=4):
        assert all(torch.equal(a, b) for a, b in zip(trajectory(tiny, model, streams), plain, strict=True))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_skipped_blocks_do_not_run_and_the_head_reads_the_last_that_did(name):
    tiny = TINY[name]
    model, conditioning, ran = tiny.model(), tiny.conditioning(), []
    blocks = blocks_of(model)
    attentions = [getattr(b, "attn1", None) or b.attn for b in blocks]
    handles = [
        a.register_forward_pre_hook(lambda *_, i=i: ran.append(i), with_kwargs=False) for i, a in enumerate(attentions)
    ]
    depths = (1.0, 2 / len(blocks), 1 / len(blocks))  # times 0-333, 333-667, 667-1000
    with caching.applied(model, caching.EarlyExit(depths), num_inference_steps=3) as controller:
        outputs = trajectory(tiny, model, [conditioning], torch.tensor([999, 666, 332]), x=tiny.sample(), move=0.0)
        assert controller.report().forced == 0
    assert ran == [0, 0, 1, *range(len(blocks))]
    for handle in handles:
        handle.remove()
    plain = trajectory(tiny, model, [conditioning], torch.tensor([999, 666, 332]), x=tiny.sample(), move=0.0)
    assert torch.equal(outputs[2], plain[2])
    assert not torch.equal(outputs[0], plain[0])


def test_a_shallow_network_is_the_exit():
    """Leaving out the last blocks is a network that has not got them."""
    tiny = TINY["dit"]
    model, shallow, streams = tiny.model(), tiny.model(), [tiny.conditioning()]
    shallow.transformer_blocks = shallow.transformer_blocks[:2]
    with caching.applied(model, caching.EarlyExit((2 / 3,)), num_inference_steps=4):
        found = trajectory(tiny, model, streams)
    assert all(torch.equal(a, b) for a, b in zip(found, trajectory(tiny, shallow, streams), strict=True))


def test_the_released_table_runs_five_sevenths_of_the_blocks():
    family = family_of(TINY["dit"].model())
    method = caching.EarlyExit()
    plan = method.compile(family, 100)
    assert plan.sites == ("blocks[1:2]", "blocks[2:3]")
    depth = 1 + (plan.actions == 0).sum(1)
    assert (np.diff(depth) >= 0).all()  # noisy steps come first and are shallow
    assert np.mean(method.depths) == pytest.approx(20 / 28)


def test_refreshed_residuals_need_no_training():
    tiny = TINY["dit"]
    model, streams = tiny.model(), [tiny.conditioning()]
    plan = caching.EarlyExit((1 / 3,), refresh=3).compile(family_of(model), 7)
    assert [list(row) for row in plan.actions] == [[0], [1], [1], [0], [1], [1], [0]]
    times = torch.full((4,), 900)
    with caching.applied(model, caching.EarlyExit((1 / 3,), refresh=4)):
        outputs = trajectory(tiny, model, streams, times, move=0.0)
    for out in outputs[1:]:
        assert (out - outputs[0]).abs().max() <= 1e-5 * outputs[0].abs().max()


def test_exits_follow_the_schedulers_timesteps():
    pipe = tiny_dit_pipeline()
    depths = (1.0,) * 9 + (0.5,)  # one of two blocks above 900
    for spacing, expected in (("leading", [0, 0, 0, 0]), ("trailing", [2, 0, 0, 0])):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)
        with caching.applied(pipe, caching.EarlyExit(depths)) as controller:
            pipe(class_labels=[1], num_inference_steps=4, output_type="latent")
            assert [row[0] for row in controller.report().decisions()["decisions"]] == expected


def test_refusals_of_early_exit():
    with pytest.raises(FewstepError, match="depths are"):
        caching.EarlyExit((0.5, 1.5))
    with pytest.raises(FewstepError, match="refresh is 0"):
        caching.EarlyExit(refresh=0)
    with pytest.raises(FewstepError, match="DeepCache leaves out"):
        caching.apply_(TINY["sd"].model(), caching.EarlyExit())


# -- Step Rehash ------------------------------------------------------------------------------------------------------


def test_rehash_reuses_while_values_stay_alike():
    profile = [[0, 0, 0], [0.99, 0, 0], [0.9, 0.97, 0], [0.99, 0.99, 0.5], [0.96, 0.4, 0.99], [0.99] * 3, [0.99] * 3]
    plan = caching.StepRehash(0.95, profile).compile(family_of(TINY["dit"].model()), 7)
    # 1 is like 0, 2 is like 0, 3 is not like 0; 4 is like 3, 5 and 6 too
    assert plan.actions[:, 0].tolist() == [0, 1, 1, 0, 1, 1, 1]
    with pytest.raises(FewstepError, match="profile of 7 steps, the run has 8"):
        caching.StepRehash(0.95, profile).compile(family_of(TINY["dit"].model()), 8)
    longest = caching.StepRehash(-1.0, [[1.0] * 2] * 7).compile(family_of(TINY["dit"].model()), 7)
    assert longest.actions[:, 0].tolist() == [0, 1, 1, 0, 1, 1, 0]  # a profile of reach 2 says nothing about 3


@pytest.mark.parametrize("pipeline", [tiny_dit_pipeline, tiny_ddpm_pipeline])
def test_the_profile_is_that_of_the_values(pipeline):
    pipe = pipeline()
    prompts = ["1"] if pipeline is tiny_dit_pipeline else None
    site, values = ("transformer_blocks.1.ff" if prompts else "up_blocks.0"), []
    network = pipe.transformer if prompts else pipe.unet
    module = network.get_submodule(site)
    options = {"num_inference_steps": 5, "site": site, "reach": 3, "samples": 2, "batch": 2}
    handle = module.register_forward_hook(lambda module, args, out: values.append(out.flatten(1)))
    method = caching.StepRehash.fit(pipe, prompts, **options)
    handle.remove()
    for step in range(1, 5):
        for behind in range(min(step, 3)):
            pair = torch.nn.functional.cosine_similarity(values[step], values[step - 1 - behind], dim=1).mean()
            assert method.similarity[step][behind] == pytest.approx(float(pair), abs=1e-5)
    assert method.similarity[0] == (-1.0,) * 3
    assert caching.controller_of(pipe) is None
    with caching.applied(pipe, method) as controller:
        assert controller.caches[0].sites[0].name == site


def test_refusals_of_rehash():
    with pytest.raises(FewstepError, match="threshold is 2"):
        caching.StepRehash(2)
    with pytest.raises(FewstepError, match="profile of 0 steps"):
        caching.StepRehash().compile(family_of(TINY["dit"].model()), 4)


# -- training ---------------------------------------------------------------------------------------------------------


def test_training_brings_the_exits_to_what_the_whole_network_says():
    pipe = tiny_dit_pipeline()
    model, method = pipe.transformer, caching.EarlyExit((1.0, 0.5))
    keys, frozen = (
        list(model.state_dict()),
        model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight.clone(),
    )

    def error():
        """Of the latents of seeds that were not trained on, to those of the untouched network."""
        with caching.applied(pipe, method):
            out = pipe([3], generator=torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images
        return float(np.square(out - whole).mean())

    whole = pipe([3], generator=torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np").images
    before = error()
    losses = caching.train_early_exit_(
        pipe, method, ["3", "5"], num_inference_steps=6, iterations=150, learning_rate=3e-3, samples=4, batch=4
    )
    assert len(losses) == 150
    assert np.mean(losses[-30:]) < 0.5 * np.mean(losses[:30])
    assert error() < before
    assert list(model.state_dict()) == keys
    assert torch.equal(model.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight, frozen)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert caching.controller_of(pipe) is None


def test_refusals_of_training():
    pipe = tiny_dit_pipeline()
    with pytest.raises(FewstepError, match="without refresh"):
        caching.train_early_exit_(pipe, caching.EarlyExit(refresh=2), ["1"], num_inference_steps=4)
    with pytest.raises(FewstepError, match="learning_rate is 0"):
        caching.train_early_exit_(pipe, caching.EarlyExit(), ["1"], num_inference_steps=4, learning_rate=0)
