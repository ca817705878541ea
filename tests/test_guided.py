"""Five steps under strong guidance: no scheduler, as it comes, may be worse than the simplest one."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.samplers import EMS, Grid, NoiseSchedule, UniPC, make_scheduler, sample
from fewstep.samplers.specs import scheduler_names
from fewstep.samplers.testing import GaussianMixture
from tests.scheduler_fixtures import SD, run

MIXTURE = GaussianMixture.random(8, 64, seed=0)
STEPS, SCALE, SEEDS = 5, 7.5, 256
NOISE = torch.randn(SEEDS, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONFIGS = {
    "bare": dict(SD),
    "trailing": {**SD, "timestep_spacing": "trailing"},
    "leading": {**SD, "timestep_spacing": "leading", "steps_offset": 1},  # Stable Diffusion's own
    "v": {**SD, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "flow": dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config),
}
NEITHER = {"MeanReverting", "Restart", "SASolver"}
"""Processes or noise of their own: no reference trajectory is theirs."""


@pytest.fixture(scope="module", params=CONFIGS)
def problem(request):
    """A config, its guided network, and where 200 steps of a method of fourth order lead."""
    config = CONFIGS[request.param]
    schedule = NoiseSchedule.from_config(config)
    network = MIXTURE.guided(schedule, [0], SCALE)
    grid = Grid.uniform_t(schedule, 200, spacing="trailing")
    return config, network, sample(network, NOISE, UniPC(order=3).compile(schedule, grid))


def test_a_guided_mixture_is_its_parts():
    schedule = NoiseSchedule.from_config(SD)
    whole, part = MIXTURE.model(schedule), GaussianMixture(MIXTURE.means[:2], MIXTURE.stds[:2], MIXTURE.weights[:2])
    part = replace(part, weights=part.weights / part.weights.sum()).model(schedule)
    x, t = NOISE[:4], 500.0
    for scale, expected in ((0.0, whole(x, t)), (1.0, part(x, t)), (3.0, 3 * part(x, t) - 2 * whole(x, t))):
        assert torch.allclose(MIXTURE.guided(schedule, [0, 1], scale)(x, t), expected, rtol=1e-12, atol=1e-12)


def test_corrections_are_left_out_early_on_short_grids_only():
    schedule = NoiseSchedule.from_config(SD)
    for name, builder, early in (("UniPC", UniPC(), (0, 1)), ("EMS", EMS(), (0, 1, 2, 3))):
        for steps, left_out in ((14, early), (15, ())):
            scheduler = make_scheduler(name, SD)
            grid = Grid.karras(schedule, steps)
            scheduler.set_timesteps(sigmas=grid)
            assert scheduler.plan.digest == replace(builder, disable_corrector=left_out).compile(schedule, grid).digest


def error(spec, problem):
    config, network, reference = problem
    found = run(make_scheduler(spec, config), network, NOISE, STEPS)
    return float((found - reference).square().mean(1).sqrt().mean())


def test_no_scheduler_is_worse_than_ddim_at_five_guided_steps(problem):
    flow = NoiseSchedule.from_config(problem[0]).family == "flow"
    names = [name for name in scheduler_names() if name not in NEITHER and (flow or name != "Flow")]
    allowed = 1.1 * error("DDIM", problem)
    errors = {name: error(name, problem) for name in names}
    assert {name: value for name, value in errors.items() if not value <= allowed} == {}


def test_few_guided_steps_with_noise_stay_as_near_as_ddim_with_noise(problem):
    """What is left is the noise itself: a scheduler that throws states off ends several times as far away."""
    torch.manual_seed(0)
    assert error("SASolver", problem) < 1.5 * error("DDIM(eta=1.0)", problem)
    assert error("SASolver(disable_corrector=[], simplified=True)", problem) > error("SASolver", problem)
