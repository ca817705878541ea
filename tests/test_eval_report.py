"""The page: self-contained, complete, honest about failures, safe with odd names."""

import html
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.eval import report
from fewstep.eval.contact import sheet, small
from fewstep.eval.plots import quality_plot
from fewstep.eval.results import Results, Row
from tests.eval_fixtures import PROMPTS, random_images, tiny_sweep


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A sweep with failing cells (2000 steps of 1000) and a damaged chunk that was made again."""
    out = tmp_path_factory.mktemp("report")
    request = {"schedulers": ("diffusers:DDIMScheduler", "diffusers:DDIMScheduler(timestep_spacing='trailing')")}
    request["samples"] = 10
    tiny_sweep(**request, steps=(2,)).run(out, progress=False)
    victim = min(out.glob("cells/diffusers-DDIMScheduler-2-*/0*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    results = tiny_sweep(**request, steps=(2, 3, 2000)).run(out, progress=False)
    return report(out).read_text(), results


def test_nothing_is_asked_of_the_network(page):
    text, _ = page
    spoken = re.sub(r"base64,[^\"]*", "", text)
    assert not re.findall(r"https?:|//[a-z]|@import|<link|<script", spoken)
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_every_number_failure_and_repair_is_there(page):
    text, results = page
    ok = [row for row in results.rows if row.status == "ok"]
    assert len(ok) == 4
    for row in ok:
        assert f"{row.value('fid'):.4g}" in text
        assert f"{row.value('clip_score'):.2f}" in text
    assert len(results.failed) == 2
    assert all(html.escape(row.error) in text for row in results.failed)
    assert "seeds 0 to 1: the file could not be read; made again" in text
    assert "6 cells, 2 failed" in text
    assert ok[0].metrics["fid"]["recipe"] in text


def test_plots_pictures_and_prompts_are_there(page):
    text, _ = page
    assert text.count('role="img"') == 2
    assert text.count("data:image/png") == 4
    assert all(prompt in text for prompt in PROMPTS)
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text


def test_odd_names_are_text_not_markup(tmp_path):
    row = Row("<script>alert(1)</script>", 5, 1.0, "failed", error="<b>&</b>")
    Results(("fid",), 2, (row,)).save(tmp_path)
    text = report(tmp_path).read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in text
    assert "1 of 2 cells are not done yet" in text


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json"):
        report(tmp_path)


def rows(values: dict[float, float]) -> list[Row]:
    return [
        Row("DDIM", index, 1.0, "ok", nfe_per_image=nfe, metrics={"fid": {"value": value}})
        for index, (nfe, value) in enumerate(values.items(), start=1)
    ]


def test_a_plot_needs_a_value():
    assert quality_plot([Row("DDIM", 5, 1.0, "failed")], "fid", "FID") is None
    svg = quality_plot(rows({10: 100.0, 20: 10.0, 40: 2.0}), "fid", "FID")
    assert svg.startswith("<svg")
    assert "http" not in svg
    assert [label for label in ("10", "20", "40") if f">{label}<" in svg] == ["10", "20", "40"]


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
