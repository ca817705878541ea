"""Costs are counted, not computed: guidance, two-call schedulers, several images a prompt."""

import pytest
import torch

from fewstep.eval import CallCounter, Timer, cost, wall_clock
from tests.eval_fixtures import PROMPTS, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def counted(pipe, **call) -> CallCounter:
    with CallCounter(pipe) as counter:
        pipe(output_type="latent", **call)
    return counter


@pytest.mark.parametrize(("guidance", "halves"), [(1.0, 1), (3.0, 2)])
def test_guidance_doubles_the_evaluations_not_the_calls(pipe, guidance, halves):
    counter = counted(pipe, prompt=list(PROMPTS[:3]), num_inference_steps=4, guidance_scale=guidance)
    assert counter.calls == 4
    assert counter.samples == 4 * 3 * halves
    assert counter.nfe_per_image(3) == 4 * halves


def test_a_scheduler_of_two_calls_a_step(pipe):
    from diffusers import HeunDiscreteScheduler

    single = pipe.scheduler
    pipe.scheduler = HeunDiscreteScheduler.from_config(single.config)
    try:
        counter = counted(pipe, prompt="a dress", num_inference_steps=4, guidance_scale=1.0)
    finally:
        pipe.scheduler = single
    assert counter.calls == 2 * 4 - 1  # the last step of Heun is an Euler step
    assert counter.nfe_per_image(1) == 7


def test_both_ways_of_guidance_cost_the_same():
    """One call of a batch of 2N, or two calls of N: as many evaluations."""
    net = torch.nn.Linear(3, 3)
    with CallCounter(net) as joined:
        net(torch.zeros(4, 3))
    with CallCounter(net) as apart:
        net(torch.zeros(2, 3))
        net(input=torch.zeros(2, 3))
    assert (joined.calls, apart.calls) == (1, 2)
    assert joined.nfe_per_image(2) == apart.nfe_per_image(2) == 2


def test_nothing_is_counted_once_it_is_closed(pipe):
    counter = counted(pipe, prompt="a dress", num_inference_steps=1)
    pipe("a dress", num_inference_steps=1, output_type="latent")
    assert counter.calls == 1
    assert not pipe.unet._forward_pre_hooks


def test_hooks_leave_when_the_pipeline_fails(pipe):
    with pytest.raises(ValueError, match="prompt"), CallCounter(pipe):
        pipe(prompt=7, num_inference_steps=1)
    assert not pipe.unet._forward_pre_hooks


def test_what_cannot_be_counted_is_refused(pipe):
    with pytest.raises(ValueError, match="object has none of unet, transformer"):
        CallCounter(object())
    with pytest.raises(ValueError, match="at least 1 image"):
        CallCounter(pipe).nfe_per_image(0)
    scalar = torch.nn.Identity()
    with CallCounter(scalar), pytest.raises(ValueError, match="nothing to count"):
        scalar(torch.tensor(1.0))


def test_warm_up_is_not_timed():
    seen: list[int] = []
    clock = wall_clock(lambda: seen.append(len(seen)), warmup=2, repeats=3)
    assert len(seen) == 5
    assert len(clock.times) == 3
    low, high = clock.quartiles
    assert 0 <= min(clock.times) <= low <= clock.median <= high <= max(clock.times)
    with pytest.raises(ValueError, match="repeats is 0"):
        wall_clock(lambda: None, repeats=0)


def test_a_timer_times_its_block():
    with Timer() as outer, Timer() as inner:
        torch.zeros(10).sum()
    assert 0 < inner.seconds <= outer.seconds


def test_the_cost_of_a_pipeline(pipe):
    result = cost(
        pipe, ["a dress", "a bag"], repeats=2, num_inference_steps=3, guidance_scale=2.0, num_images_per_prompt=2
    )
    assert (result.images, result.calls, result.nfe_per_image) == (4, 3, 6.0)
    assert len(result.clock.times) == 2
    assert result.seconds_per_image == result.clock.median / 4
    assert all(peak > 0 for peak in result.peak_memory.values())
