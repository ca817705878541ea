"""The report's other parts: where the steps lie, what the caches decided, and contact sheets."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.eval.reports.contact import sheet, small
from fewstep.eval.reports.decisions import Decisions
from fewstep.eval.reports.noise_levels import lambdas
from fewstep.eval.reports.page_plots import caches, heat_map
from fewstep.eval.sweeps.results import Row
from tests.eval_fixtures import random_images
from tests.report_fixtures import VP, Page, facet

# -- where the steps lie -----------------------------------------------------------------------------------------------


def entry(kind, config, timesteps, sigmas=None):
    return {"identity": {"scheduler": {"class": kind, "config": config}}, "timesteps": timesteps, "sigmas": sigmas}


def test_lambdas_come_from_the_sigmas_or_else_from_the_times():
    """lambda = log(alpha / sigma): -log of diffusers' sigma for vp, log((1 - s) / s) for flow."""
    times = entry("diffusers.DDIMScheduler", VP, [999, 500, 1])
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[[999, 500, 1]]
    assert lambdas(times) == pytest.approx(0.5 * np.log(kept / (1 - kept)), rel=1e-9)  # a sum of 1000 rounded logs
    assert lambdas(entry("X", VP, [999, 1], [4.0, 0.5, 0.0])) == pytest.approx([-math.log(4), math.log(2)])
    flow = entry("diffusers.FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, [1000.0, 250.0], [1.0, 0.25, 0.0])
    assert lambdas(flow) == [-math.inf, pytest.approx(math.log(3))]


def test_what_the_manifest_does_not_say_is_left_out():
    assert lambdas({}) is None
    assert lambdas(entry("KarrasVeScheduler", VP, [1.0])) is None
    assert lambdas(entry("DDIMScheduler", VP, [])) is None


# -- what the caches decided -------------------------------------------------------------------------------------------
def test_a_heat_map_has_a_cell_for_every_decision():
    table = Decisions.from_json({"sites": ["down", "<mid>", "up"], "decisions": [[0, 0, 0], [1, 0, 2]]})
    parsed = Page(heat_map(table, "DDIM"))
    assert [e["attrs"]["class"] for e in parsed.all("td")] == ["d0", "d1", "d0", "d0", "d0", "d2"]
    assert [e["text"] for e in parsed.all("td")] == ["0", "1", "0", "0", "0", "2"]
    assert [e["text"] for e in parsed.all("th", scope="row")] == ["down", "<mid>", "up"]
    legend = parsed.of_class("div", "legend")[0]["text"]
    assert "computed" in legend
    assert "reused" in legend
    assert "67 % computed" in legend  # four of six


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sites": [], "decisions": [[]]}, "lists of at least one"),
        ({"sites": ["a"], "decisions": [[0], [0, 1]]}, "step 1 of a decision table has 2 decisions for 1 sites"),
        ({"sites": ["a"], "decisions": [[3]]}, "has 3; give a whole number from 0 to 2"),
        ({"sites": ["a"], "decisions": [[True]]}, "has True"),
        ({"sites": ["a"], "decisions": [[0]], "names": []}, "give a list of 1 to 9"),
    ],
)
def test_a_damaged_decision_table_is_said_to_be_damaged(table, message):
    with pytest.raises(ValueError, match=message):
        Decisions.from_json(table)
    row = Row("DDIM", 2, 1.0, "ok", folder="cells/a")
    assert message in caches(facet([row]), {"cells/a": {"decisions": table}})


def test_cells_without_a_table_have_no_heat_map():
    row = Row("DDIM", 2, 1.0, "ok", folder="cells/a")
    assert caches(facet([row]), {"cells/a": {"cache": "none"}}) == ""
    drawn = caches(facet([row]), {"cells/a": {"decisions": {"sites": ["a"], "decisions": [[0], [1]]}}})
    assert len(Page(drawn).all("td")) == 2


# -- pictures ----------------------------------------------------------------------------------------------------------
def test_a_contact_sheet_has_every_pixel():
    images = random_images(5)
    picture = sheet(images, columns=2, gap=1)
    assert picture.size == (65, 98)
    assert picture.mode == "L"
    assert np.array_equal(np.asarray(picture.crop((33, 33, 65, 65))), images[3, 0].numpy())
    assert sheet(random_images(1, channels=3)).mode == "RGB"
    with pytest.raises(ValueError, match="n > 0"):
        sheet(images[:0])


def test_large_images_are_scaled_down_evenly():
    large = torch.full((2, 3, 512, 256), 77, dtype=torch.uint8)
    assert small(large).shape == (2, 3, 96, 48)
    assert (small(large) == 77).all()
    assert small(random_images(2)).shape == (2, 1, 32, 32)
    assert isinstance(sheet(small(large)), Image.Image)
