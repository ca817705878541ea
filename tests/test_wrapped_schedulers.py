"""The momentum, DC-Solver, EMS and USF schedulers on every family, from disk, and from an image."""

import pytest
import torch

from fewstep import samplers
from tests.solver_fixtures import SD

V = {**SD, "prediction_type": "v_prediction"}
CONFIGS = {
    "vp": SD,
    "zero-snr": {**V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "flow": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
}
OPTIONS = {
    "HeavyBall": {"beta": 0.7},
    "GHVB": {"solver_order": 2.6},
    "DCSolver": {"dc_ratios": [1.0, 1.0, 1.1, 0.9, 1.05, 1.0]},
    "EMS": {"statistics": [0.9, -0.1, 0.05], "final_sigmas_type": "zero"},
    "USF": {"decisions": [{"order": 2, "corrector": True}]},
}


def run(scheduler, x, begin=0):
    if begin:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x).prev_sample
    return x


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_family_from_disk_and_from_an_image(name, family, tmp_path):
    cls = getattr(samplers, f"{name}Scheduler")
    first = cls.from_config(CONFIGS[family], **OPTIONS[name])
    first.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for scheduler in (first, again):
        scheduler.set_timesteps(6)
    assert again.plan.digest == first.plan.digest
    x = noise * first.init_noise_sigma
    whole = run(first, x)
    assert whole.isfinite().all()
    assert whole.dtype is torch.float32
    assert torch.equal(run(again, x), whole)
    late = run(first, noise, begin=3)
    tail = first.solver().compile(first.schedule, first.grid.tail(3))
    executor, state, y = samplers.Executor(tail), samplers.Run(), noise
    for _ in range(3):
        y = executor.advance(state, torch.tanh(executor.model_input(state, y)), y)
    assert torch.equal(late, y)  # the warm-up starts anew at the image
