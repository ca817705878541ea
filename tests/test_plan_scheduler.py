"""The scheduler that runs a plan, or one of several by their number of calls."""

import copy
import json
import pickle

import diffusers
import pytest
import torch

from fewstep import samplers
from fewstep.errors import ArtifactError, FewstepError, GridError
from fewstep.samplers import DPMSolver, Grid, NoiseSchedule, SolverPlan
from tests.scheduler_fixtures import SD, run, scheduler


def test_plan_scheduler_runs_and_keeps_a_plan(net, noise, tmp_path):
    schedule = NoiseSchedule.from_config(SD)
    plan = DPMSolver(order=3).compile(schedule, Grid.karras(schedule, 6))
    expected = run(scheduler("DPMSolver", solver_order=3, grid="karras"), net, noise, 6)
    plan.save(tmp_path / "plan.json")
    for s in (
        samplers.PlanScheduler.from_plan(plan, SD),
        samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "plan.json")),
    ):
        assert torch.equal(run(s, net, noise, 6), expected)
        s.save_pretrained(tmp_path / "saved")
        json.loads((tmp_path / "saved" / "scheduler_config.json").read_text())
        again = samplers.PlanScheduler.from_pretrained(tmp_path / "saved")
        assert again.plans[plan.nfe].digest == plan.digest
        assert torch.equal(run(again, net, noise, 6), expected)
    with pytest.raises(GridError, match="6 network calls"):
        s.set_timesteps(5)
    with pytest.raises(GridError, match="own grid"):
        s.set_timesteps(timesteps=[3, 2, 1])
    late = run(s, net, noise, 6)
    assert not torch.equal(run(s, net, noise, begin=2), late)
    with pytest.raises(ArtifactError, match="made for"):
        samplers.PlanScheduler.from_plan(plan, {**SD, "prediction_type": "v_prediction"})
    with pytest.raises(ArtifactError, match="does not exist"):
        samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "none.json"))
    with pytest.raises(FewstepError, match="needs plan="):
        samplers.PlanScheduler.from_config(SD)
    assert SolverPlan.load(tmp_path / "plan.json", schedule).digest == plan.digest


def test_plan_scheduler_chooses_among_plans_by_their_calls(net, noise, tmp_path):
    schedule = NoiseSchedule.from_config(SD)
    plans = {n: DPMSolver(order=2).compile(schedule, Grid.karras(schedule, n)) for n in (4, 12)}
    for n, plan in plans.items():
        plan.save(tmp_path / f"mine-{n}.json")
    (tmp_path / "mine-x.json").write_text("not a number, not read")
    s = samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "mine-{nfe}.json"))
    s.save_pretrained(tmp_path / "saved")
    for each in (s, samplers.PlanScheduler.from_pretrained(tmp_path / "saved")):
        for n in plans:
            expected = run(samplers.PlanScheduler.from_plan(plans[n], SD), net, noise, n)
            assert torch.equal(run(each, net, noise, n), expected)
    with pytest.raises(GridError, match="4 or 12 network calls, 5 steps were asked for"):
        s.set_timesteps(5)
    plans[4].save(tmp_path / "mine-04.json")
    with pytest.raises(FewstepError, match="3 plans, some with the same number of calls"):
        samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "mine-{nfe}.json"))
    with pytest.raises(FewstepError, match="no file is named"):
        samplers.PlanScheduler.from_config(SD, plan=str(tmp_path / "yours-{nfe}.json"))
    with pytest.raises(FewstepError, match=r"learned plans .fashion-ds.*fashion-sd"):
        samplers.PlanScheduler.from_config(SD, plan="fashion-ds")


def test_plan_scheduler_knows_the_plans_that_come_with_a_model():
    from fewstep import pipelines
    from fewstep.samplers import learn

    config = pipelines.load("fashion-dit-small").scheduler.config
    s = samplers.PlanScheduler.from_config(config, plan="fashion-dit-small")
    s.set_timesteps(8)
    assert s.plan.digest == learn.load("fashion-dit-small", 8).digest


def test_a_plan_is_neither_printed_nor_handed_on_with_the_config(caplog):
    """Its arrays are hundreds of numbers: a warning, a repr and the config of another scheduler are no place for them."""
    schedule = NoiseSchedule.from_config(SD)
    plan = DPMSolver(order=3).compile(schedule, Grid.karras(schedule, 6))
    s = samplers.PlanScheduler.from_plan(plan, SD)
    ours = samplers.UniPCScheduler.from_config(s.config)
    assert not caplog.records
    diffusers.UniPCMultistepScheduler.from_config(s.config)  # warns of the keys that it does not know, with values
    assert "'plan': <the plans of a PlanScheduler>" in caplog.text
    assert "plan" not in ours.config
    assert f'"6": "{plan.method}"' in repr(s)
    assert "fingerprint" not in repr(s)
    for same in (copy.deepcopy(s), pickle.loads(pickle.dumps(s)), samplers.PlanScheduler.from_config(s.config)):
        assert same.config.plan == plan.to_dict()
        assert repr(same) == repr(s)
