"""The loop around the diffusers schedulers: dtypes, copies and threads, starts and ends, noise, and what does not fit."""

import copy
import pickle

import diffusers
import pytest
import torch

from fewstep import samplers
from fewstep.errors import FewstepError
from tests.scheduler_fixtures import OURS, run, scheduler
from tests.solver_fixtures import in_threads
from tests.tensor_fixtures import relative


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_keep_their_dtype(net, noise, name, dtype):
    s = scheduler(name)
    full = run(s, net, noise, 5)
    x = run(s, lambda x, t: net(x, t).to(dtype), noise.to(dtype))
    assert x.dtype == dtype
    # 5 casts of the state, each off by half a unit in the last place, through rows of bounded gain
    assert relative(x, full) < 20 * 5 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", OURS)
def test_interleaved_copies_and_threads(net, noise, name):
    s = scheduler(name)
    s.set_timesteps(6)
    other = copy.deepcopy(s)
    assert other.plan is s.plan
    a, b = noise, -2 * noise
    for t in s.timesteps:
        a = s.step(net(a, t), t, a).prev_sample
        b = other.step(net(b, t), t, b).prev_sample
    assert torch.equal(a, run(s, net, noise))
    assert torch.equal(b, run(s, net, -2 * noise))
    results = in_threads(lambda k: run(copy.deepcopy(s), net, noise * (k + 1)), 4)
    assert all(torch.equal(result, run(s, net, noise * (k + 1))) for k, result in enumerate(results))


def test_a_copy_taken_in_the_middle_goes_on_alone(net, noise):
    s = scheduler("UniPC", solver_order=3)
    s.set_timesteps(6)
    x, half = noise, None
    for i, t in enumerate(s.timesteps):
        if i == 3:
            half = (pickle.loads(pickle.dumps(s)), x)
        x = s.step(net(x, t), t, x).prev_sample
    y = half[1]
    for t in s.timesteps[3:]:
        y = half[0].step(net(y, t), t, y).prev_sample
    assert torch.equal(x, y)


@pytest.mark.parametrize("name", OURS)
def test_img2img_restarts_the_warm_up(net, noise, name):
    s = scheduler(name)
    s.set_timesteps(8)
    late = run(s, net, noise, begin=3)
    assert s.step_index == 8
    assert torch.equal(late, run(scheduler(name), net, noise, sigmas=s.grid.tail(3)))
    # without a begin index the first timestep finds it
    s.set_timesteps(8)
    x = noise
    for t in s.timesteps[3:]:
        x = s.step(net(x, t), t, x).prev_sample
    assert torch.equal(x, late)


@pytest.mark.parametrize("name", OURS)
def test_stepping_past_the_end_and_starting_again(net, noise, name):
    s = scheduler(name)
    with pytest.raises(FewstepError, match="set_timesteps"):
        s.step(noise, 10, noise)
    s.set_timesteps(4)
    first = run(s, net, noise)
    with pytest.raises(FewstepError, match="past the end"):
        s.step(noise, s.timesteps[-1], noise)
    assert torch.equal(run(s, net, noise), first)  # the first timestep starts a new run
    s.step(net(noise, s.timesteps[0]), s.timesteps[0], noise)
    with pytest.raises(FewstepError, match="expects timestep"):
        s.step(noise, s.timesteps[3], noise)
    s.set_timesteps(4)
    with pytest.raises(FewstepError, match="none of this run"):
        s.step(noise, 1.5, noise)
    s.set_begin_index(9)
    with pytest.raises(FewstepError, match="begin index 9"):
        s.step(noise, s.timesteps[0], noise)


def test_shape_and_device_mismatch(noise):
    s = scheduler("DPMSolver")
    s.set_timesteps(3)
    with pytest.raises(FewstepError, match=r"\(2, 4, 8, 9\)"):
        s.step(torch.zeros(2, 4, 8, 9), s.timesteps[0], noise)
    with pytest.raises(FewstepError, match="on meta"):
        s.step(noise.to("meta"), s.timesteps[0], noise)
    with pytest.raises(FewstepError, match="learned_range"):
        s.step(torch.zeros(2, 8, 8, 8), s.timesteps[0], noise)
    learned = scheduler("DPMSolver", variance_type="learned_range")
    plain = scheduler("DPMSolver")
    for x in (learned, plain):
        x.set_timesteps(3)
    t = plain.timesteps[0]
    both = torch.cat([noise, torch.ones_like(noise)], 1)
    assert torch.equal(learned.step(both, t, noise).prev_sample, plain.step(noise, t, noise).prev_sample)


def test_per_sample_generators_do_not_depend_on_the_batch(net):
    s = scheduler("DPMSolver", algorithm_type="sde-dpmsolver++")
    s.set_timesteps(5)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    generators = lambda: [torch.Generator().manual_seed(100 + i) for i in range(4)]  # noqa: E731
    together = run(s, net, x, generator=generators())
    for i, g in enumerate(generators()):
        alone = run(s, net, x[i : i + 1], generator=[g])
        # equal noise; the convolution may sum in another order for another batch
        assert relative(alone, together[i : i + 1]) < 1e-5
    with pytest.raises(FewstepError, match="3 generators"):
        run(s, net, x, generator=generators()[:3])


@pytest.mark.parametrize("begin", [None, 2])
def test_ddim_eta_of_a_model_whose_input_is_scaled(net, noise, begin):
    """scale_model_input comes before the step that brings eta."""
    s, expected = (samplers.DDIMScheduler.from_config(diffusers.EDMEulerScheduler().config, eta=e) for e in (0.0, 0.7))
    results = []
    for scheduler_, options in ((s, {"eta": 0.7}), (expected, {}), (s, {})):
        scheduler_.set_timesteps(5)
        if begin is not None:
            scheduler_.set_begin_index(begin)
        g, x = torch.Generator().manual_seed(3), noise * float(scheduler_.sigmas[begin or 0])
        for t in scheduler_.timesteps[begin or 0 :]:
            scaled = scheduler_.scale_model_input(x, t)
            x = scheduler_.step(net(scaled, t), t, x, generator=g, return_dict=False, **options)[0]
        results.append(x)
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], rtol=1e-2)  # without eta the run is deterministic again


def test_add_noise_uses_the_levels_of_the_run(noise):
    s = scheduler("DPMSolver")
    s.set_timesteps(sigmas=[10.0, 1.0], timesteps=[700, 650])  # told times that are not those of the levels
    x0 = torch.zeros_like(noise)
    rho = torch.tensor([10.0, 1.0])
    expected = (rho / (1 + rho**2).sqrt())[:, None, None, None] * noise
    assert relative(s.add_noise(x0, noise, torch.tensor([700, 650])), expected) < 1e-6
