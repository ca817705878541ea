"""Plans by name, pattern, path and value as a scheduler: what is refused, and copies of what ``use_`` puts in a pipeline."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch

from fewstep import quant
from fewstep.errors import FewstepError
from fewstep.eval import draw, fingerprint
from fewstep.samplers import DPMSolver, Grid, NoiseSchedule, PlanScheduler, learn
from tests.eval_fixtures import PROMPTS, tiny_pipeline


@pytest.fixture
def pipe():
    made = tiny_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def plan_of_calls(pipe, nfe, **provenance):
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    plan = DPMSolver(order=2).compile(schedule, Grid.uniform_t(schedule, nfe))
    return dataclasses.replace(plan, provenance=provenance)


def scheduler_of(pipe, plan):
    return PlanScheduler.from_config(pipe.scheduler.config, plan=plan)


def test_plans_are_taken_as_objects_dicts_and_numbered_files(pipe, tmp_path):
    four, six = plan_of_calls(pipe, 4), plan_of_calls(pipe, 6)
    four.save(tmp_path / "boot-4.json")
    six.save(tmp_path / "boot-6.json")
    both = (
        {4: four, 6: six},
        {"6": six.to_dict(), "4": four.to_dict()},
        str(tmp_path / "boot-{nfe}.json"),
        tmp_path / "boot-{nfe}.json",
    )
    for given in both:
        assert list(scheduler_of(pipe, given).plans) == [4, 6]
    for one in (four, four.to_dict(), tmp_path / "boot-4.json"):
        assert list(scheduler_of(pipe, one).plans) == [4]


def test_what_stands_for_no_plan_is_refused(pipe, tmp_path):
    four = plan_of_calls(pipe, 4)
    four.save(tmp_path / "boot-8.json")
    for given, said in (
        ({}, "plan is an empty dict"),
        ({"5": four.to_dict()}, "the plan for 5 calls has 4 network calls"),
        ({4: "boot.json"}, "plan has a str for 4 calls"),
        ([four], "plan is of type list; give a path"),
        (5, "plan is of type int; give a path"),
        (str(tmp_path / "boot-{nfe}.json"), r"boot-8\.json has 4 network calls; name it by that number"),
        (str(tmp_path / "shoe-{nfe}.json"), "no file is named .*shoe-"),
    ):
        with pytest.raises(FewstepError, match=said):
            scheduler_of(pipe, given)


def test_copies_of_a_scheduler_in_use_are_schedulers_of_their_own(pipe):
    learn.use_(pipe, plan_of_calls(pipe, 4, guidance=[2.0, 2.0]))
    with pytest.warns(learn.OutsideCalibration, match="used at 5"):
        draw(pipe, PROMPTS[:1], [0], steps=4, guidance=5.0)
    running = pipe.scheduler
    for made in (copy.deepcopy(running), pickle.loads(pickle.dumps(running))):
        made.set_begin_index(2)
        made.set_timesteps(4)
        assert made.timesteps.shape == (4,)
        assert made.step_index is None
        assert running.step_index == 4  # the copy did not begin a run of the original


def test_a_copied_pipeline_warns_of_its_own_guidance(pipe):
    learn.use_(pipe, plan_of_calls(pipe, 4, guidance=[2.0, 2.0]))
    draw(pipe, PROMPTS[:1], [0], steps=4, guidance=2.0)
    twin = copy.deepcopy(pipe)
    with pytest.warns(learn.OutsideCalibration, match="learned at guidance 2 and is used at 5"):
        draw(twin, PROMPTS[:1], [0], steps=4, guidance=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", learn.OutsideCalibration)
        draw(pipe, PROMPTS[:1], [0], steps=4, guidance=2.0)


def test_a_learned_plan_goes_on_with_its_network_quantised(pipe, tmp_path):
    """What docs/recipes.md says of calibrated weights: load them, then apply a recipe without ``quant``."""
    plan = plan_of_calls(pipe, 4, model=fingerprint.of_module(pipe.unet), guidance=[2.0, 2.0])
    quant.quantize_(pipe.unet, quant.Int8())
    quant.save(pipe.unet, tmp_path)
    loaded = tiny_pipeline(seed=1)
    quant.load_(loaded.unet, tmp_path)
    learn.use_(loaded, plan)
    assert isinstance(loaded.scheduler, PlanScheduler)
    learn.use_(pipe.to(torch.float32), plan)
    other = tiny_pipeline(seed=1)
    with pytest.raises(FewstepError, match="learned on weights"):
        learn.use_(other, plan)
