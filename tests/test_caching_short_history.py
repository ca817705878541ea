"""Weights that were found for certain past values act on these alone; others are extrapolated plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep import caching
from fewstep.caching.actions import Action
from fewstep.caching.calibration.fitting import Fitter
from fewstep.caching.calibration.polishing import Weighted
from fewstep.caching.calibration.runs import Runs
from fewstep.caching.predictors import Affine
from fewstep.caching.store import Cell
from fewstep.errors import FewstepError
from tests.pipeline_fixtures import tiny_dit_pipeline

SCALE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, -4.0], [7.0, -6.0]])[:, :, None]
PAST = torch.tensor([[-1, -1], [-1, -1], [-1, -1], [2, 0], [2, 0]])


def affine(past=True):
    return Affine({"site": SCALE}, {"site": torch.zeros(5, 1)}, {"site": PAST} if past else {})


def cell(values):
    made = Cell.empty("site", 2)
    for step, value in values.items():
        made.keep(step, torch.full((1, 3, 4), float(value)))
    return made


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({0: 1.0, 2: 3.0}, 5 * 3.0 - 4 * 1.0),  # what they were found for
        ({2: 3.0}, 3.0),  # the earlier value was dropped: held
        ({1: 2.0, 2: 3.0}, 4.0),  # computed at a step more: the line through both
        ({0: 1.0, 1: 2.0}, 4.0),
    ],
)
def test_weights_act_on_the_values_they_were_found_for(kept, expected):
    # weights and values are small whole numbers: no rounding
    assert torch.equal(affine().predict(cell(kept), 3), torch.full((1, 3, 4), expected))


def test_without_the_steps_only_the_number_of_values_is_checked():
    assert torch.equal(affine(past=False).predict(cell({1: 2.0, 2: 3.0}), 3), torch.full((1, 3, 4), 7.0))
    assert torch.equal(affine(past=False).predict(cell({2: 3.0}), 3), torch.full((1, 3, 4), 3.0))


def test_early_steps_with_fewer_values_keep_their_weights():
    scale = SCALE.clone()
    scale[1] = torch.tensor([[0.5], [0.0]])
    past = PAST.clone()
    past[1, 0] = 0
    early = Affine({"site": scale}, {"site": torch.zeros(5, 1)}, {"site": past})
    assert torch.equal(early.predict(cell({0: 4.0}), 1), torch.full((1, 3, 4), 2.0))


def test_a_fit_remembers_the_steps_that_it_saw():
    values = cell({0: 1.0, 2: 3.0})
    fitter = Fitter(2, 5)
    fitter(values, 3, torch.full((1, 3, 4), 4.0))
    assert fitter.predictor().past["site"].tolist() == [[-1, -1]] * 3 + [[2, 0]] + [[-1, -1]]


def test_steps_of_another_shape_are_refused():
    with pytest.raises(FewstepError, match="past steps of site 'site'"):
        Affine({"site": SCALE}, {"site": torch.zeros(5, 1)}, {"site": PAST[:, :1]})


def test_the_steps_are_part_of_the_plan_file(tmp_path):
    actions = np.array([[0], [1], [0], [1], [1]], dtype=np.int8)
    plan = caching.CachePlan(("site",), actions, affine())
    plan.save(tmp_path / "plan.json")
    loaded = caching.CachePlan.load(tmp_path / "plan.json")
    assert torch.equal(loaded.predictor.past["site"], PAST)
    assert caching.CachePlan(("site",), actions, affine(past=False)).digest != plan.digest


@pytest.fixture(scope="module")
def dit():
    return tiny_dit_pipeline()


def stacked(dit, plan):
    """Under reuse of the unconditional half at steps of its own, by which some reuses of the plan have to be computed."""
    runs = Runs.of(dit, ["1", "2"], 2, 8, 2.0)
    with caching.applied(dit, [plan, caching.UncondReuse(interval=3)]) as controller:
        latents = runs.latents()
        assert controller.report().forced > 0
    return latents


def test_a_calibrated_plan_and_reuse_of_guidance_whose_steps_do_not_fit(dit):
    """Weights that are those of the line have to act as the line does, which adapts to whatever was computed."""
    actions = np.full((8, 1), Action.REUSE, dtype=np.int8)
    actions[[0, 1, 4, 6]] = Action.COMPUTE
    line = caching.CachePlan(("blocks",), actions, caching.Extrapolate(1))
    weighted = stacked(dit, Weighted.polynomial("blocks", actions, 2, 1).plan)
    expected = stacked(dit, line)
    # the same sums with weights rounded to float32 and in another order
    torch.testing.assert_close(weighted, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    other = Weighted.polynomial("blocks", actions, 2, 1).moved(np.full(4, 0.5))
    assert not torch.allclose(stacked(dit, other.plan), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_values_of_all_samples_from_before_half_of_them_ran_still_extrapolate(dit):
    """At a step that had to be computed the line goes on from the last value of all samples, not from nothing."""
    actions = np.array([[0], [0], [0], [1], [1]], dtype=np.int8)
    guidance = np.array([[0], [0], [1], [0], [0]], dtype=np.int8)  # half of the batch at step 2
    plans = [
        caching.CachePlan(("blocks",), actions, caching.Extrapolate(1)),
        caching.CachePlan(("uncond",), guidance, caching.Hold()),
    ]
    with caching.applied(dit, plans) as controller:
        Runs.of(dit, ["1"], 1, 5, 2.0).latents()
        assert controller.report().forced == 1  # at step 3, for which only half of the batch is fresh
        (stream,) = controller.caches[0].streams()
        assert [value.step for value in stream.cells[0].history] == [3, 1]
