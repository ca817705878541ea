"""What a report says: the MACs that were executed, and the notes that should make one wonder."""

import copy

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler

from fewstep import caching, eval, quant
from tests.caching_fixtures import TINY, timesteps, trajectory
from tests.eval_fixtures import tiny_pipeline
from tests.pipeline_fixtures import seeded

STEPS = 10
C, R = caching.Action.COMPUTE, caching.Action.REUSE


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def draw(pipe, prompts, steps=STEPS, **options):
    return pipe(prompts, num_inference_steps=steps, output_type="np", generator=seeded(len(prompts)), **options)


@pytest.mark.parametrize(
    "methods", [caching.DeepCache(2), [caching.UncondReuse(interval=4), caching.DeepCache(2)]], ids=["one", "stacked"]
)
def test_the_macs_of_a_report_are_those_that_were_executed(pipe, methods):
    with caching.applied(pipe, methods) as controller, eval.MacCounter(pipe) as counter:
        draw(pipe, ["a dress", "a bag"])
        draw(pipe, ["a dress"], steps=6, guidance_scale=7.0)
    report = controller.report()
    assert report.macs == sum(call.macs for call in counter.calls)
    with eval.MacCounter(pipe) as plain:
        draw(pipe, ["a dress", "a bag"])
        draw(pipe, ["a dress"], steps=6)
    assert report.executed == (report.macs, sum(call.macs for call in plain.calls))
    assert f"{report.macs / report.executed[1]:.1%} of computing everything" in str(report)


def test_a_plan_executes_what_it_was_said_to_cost():
    tiny = TINY["dit"]
    model, x = tiny.model(), tiny.sample(1)
    plan = caching.Interval(2, at=("blocks",)).compile(caching.family_of(model), 4)
    with caching.applied(model, plan) as controller:
        trajectory(tiny, model, [tiny.conditioning(1)], timesteps(4), x=x)
        assert plan.cost(model).total == controller.report().macs  # also while the cache is on


def test_a_callable_is_not_called_to_count_its_macs():
    weight, calls = torch.ones(2, 2, device="meta"), []

    def network(x, t):
        calls.append(t)
        return x @ weight

    method = caching.Interval(2)
    model, x = caching.wrap(network, method, num_inference_steps=2), torch.ones(3, 2, device="meta")
    for t in (900, 100):
        model(x, t)
    report = model.controller.report()
    assert report.macs is None
    assert "50% not computed, at most" in str(report)
    assert calls == [900]
    cost = method.compile(caching.family_of(model), 2).cost(model, {"sample": x, "timestep": 900})  # asked for, it is
    assert cost.macs == (3 * 2 * 2, 0)


@pytest.mark.parametrize(
    ("actions", "steps", "said"),
    [
        ([C] * 9, 9, "nothing was reused"),
        ([C] + [R] * 8, 9, "everything after the first step was reused"),
        ([C, R] * 4, 8, "8 steps leave little to reuse"),
        ([C, C, R] * 3, 9, None),
    ],
)
def test_notes_of_hits_and_steps(actions, steps, said):
    tiny = TINY["unet2d"]
    model = tiny.model()
    with caching.applied(model, caching.CachePlan(("branch.0",), np.array(actions)[:, None])) as controller:
        assert controller.report().warnings == ("the network was not called since the cache was applied",)
        trajectory(tiny, model, [tiny.conditioning()], timesteps(steps))
    notes = controller.report().warnings
    assert [said in note for note in notes] == [True] if said else not notes


def test_a_scheduler_of_a_distilled_model_is_noted(pipe):
    other = copy.copy(pipe)
    other.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    with caching.applied(other, caching.DeepCache(2)) as controller:
        draw(other, ["a bag"], guidance_scale=1.0)
    assert [note for note in controller.report().warnings if "LCMScheduler" in note]


def test_adapters_that_a_plan_was_not_calibrated_with_are_noted():
    peft = pytest.importorskip("peft")

    tiny = TINY["sd"]
    model = tiny.model()
    plan = caching.CachePlan(("branch.0",), np.array([[C], [C], [R]] * 3), provenance={"adapters": []})
    notes = []
    for style in (False, True):
        if style:
            model.add_adapter(peft.LoraConfig(r=1, target_modules=["to_q"]), "style")
        with caching.applied(model, plan) as controller:
            trajectory(tiny, model, [tiny.conditioning()], timesteps(9))
            notes.append(controller.report().warnings)
    assert notes[0] == ()
    assert "calibrated with no adapters, the network has the adapters style" in " ".join(notes[1])


def test_a_quantised_network_decides_alike_in_every_run():
    tiny = TINY["dit"]
    logs = []
    for _ in range(2):  # two processes would do the same: nothing but the weights and the inputs decides
        model = tiny.model()
        quant.quantize_(model, quant.Int8())
        with caching.applied(model, caching.FirstBlockCache(0.4)) as controller:
            for _ in range(2):
                outputs = trajectory(tiny, model, [tiny.conditioning()], timesteps(6))
                logs.append((controller.report().decisions(), [x.clone() for x in outputs]))
                controller.caches[0].clear_log()
    (first, made), *others = logs
    assert {C, R} == {action for row in first["decisions"] for action in row}
    for decided, outputs in others:
        assert decided == first
        assert all(torch.equal(a, b) for a, b in zip(outputs, made, strict=True))
