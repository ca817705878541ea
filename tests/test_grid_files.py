"""Saved grids: every bit, both infinities, and files that are no grid."""

import json
import math

import pytest
import torch

from fewstep.errors import ArtifactError, GridError
from fewstep.samplers import DPMSolver, Grid
from fewstep.samplers.schedule import EDM
from tests.grid_fixtures import SCHEDULES, SPACINGS, VP, ZERO_SNR


@pytest.mark.parametrize("name", SCHEDULES)
def test_saved_grids_keep_every_bit(name, tmp_path):
    schedule = SCHEDULES[name]
    for grid in (Grid.karras(schedule, 7), Grid.uniform_lambda(schedule, 5)):
        grid.save(tmp_path / "grid.json")
        again = Grid.load(tmp_path / "grid.json", schedule)
        for what in ("t", "lam", "model_time"):
            assert torch.equal(getattr(again, what), getattr(grid, what)), what
        assert again.name == grid.name
        assert again.schedule == schedule


@pytest.mark.parametrize("spacing", SPACINGS)
def test_saved_grids_of_training_timesteps_keep_every_bit_that_counts(spacing, tmp_path):
    """t is recomputed from lambda; its error is eps |lambda| over the slope of at least 0.001 an index."""
    grid = Grid.uniform_t(VP, 20, spacing=spacing)
    grid.save(tmp_path / "grid.json")
    again = Grid.load(tmp_path / "grid.json", VP)
    assert torch.equal(again.lam, grid.lam)
    assert torch.equal(again.model_time, grid.model_time)
    assert torch.allclose(again.t, grid.t, rtol=0, atol=1e-11)


def test_infinities_of_both_ends_survive_a_file(tmp_path):
    grid = Grid.uniform_t(ZERO_SNR, 4)
    assert grid.lam[[0, -1]].tolist() == [-math.inf, math.inf]
    grid.save(tmp_path / "grid.json")
    assert torch.equal(Grid.load(tmp_path / "grid.json", ZERO_SNR).lam, grid.lam)
    json.loads((tmp_path / "grid.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_told_time_that_differs_from_the_real_one_survives_a_file(tmp_path):
    grid = Grid.karras(VP, 3).with_model_time([990.25, 400.125, 0.1])
    grid.save(tmp_path / "grid.json")
    again = Grid.load(tmp_path / "grid.json", VP)
    assert again.model_time.tolist() == [990.25, 400.125, 0.1]
    assert torch.equal(again.lam, Grid.karras(VP, 3).lam)
    plan = DPMSolver().compile(VP, again)
    assert plan.model_time.tolist() == [990.25, 400.125, 0.1]


def test_named_loads_a_file_and_checks_its_length(tmp_path):
    path = str(tmp_path / "grid.json")
    Grid.karras(VP, 3).save(path)
    assert torch.equal(Grid.named(path, VP, 3).lam, Grid.karras(VP, 3).lam)
    with pytest.raises(GridError, match="3 steps, 4"):
        Grid.named(path, VP, 4)


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "grid.json"
    with pytest.raises(ArtifactError, match="does not exist"):
        Grid.load(path, VP)
    Grid.karras(VP, 3).save(path)
    with pytest.raises(ArtifactError, match="made for"):
        Grid.load(path, EDM())
    good = json.loads(path.read_text())
    for change, message in (
        ({"schema_version": 99}, "version 99"),
        ({"kind": "SolverPlan"}, "SolverPlan"),
        ({"more": 1}, "unknown keys more"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ArtifactError, match=message):
            Grid.load(path, VP)
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "lam"}))
    with pytest.raises(ArtifactError, match="lacks lam"):
        Grid.load(path, VP)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArtifactError, match="not a readable JSON"):
        Grid.load(path, VP)
    for lam in ("oops", [1.0, "oops"], [[1.0]], None):
        path.write_text(json.dumps({**good, "lam": lam}))
        with pytest.raises((ArtifactError, GridError)):
            Grid.load(path, VP)
