"""The page: self-contained, complete, honest about failures, safe with odd names; and the plots beside it."""

import csv
import html
import io
import json
import re

import pytest
import torch
from PIL import Image

from fewstep.eval import report
from fewstep.eval.sweeps.results import Results, Row
from fewstep.samplers import NoiseSchedule
from tests.eval_fixtures import PROMPTS, tiny_sweep
from tests.report_fixtures import VP, Page, rows


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep with failing cells (2000 steps of 1000) and a damaged chunk that was made again."""
    out = tmp_path_factory.mktemp("report")
    request = {"schedulers": ("diffusers:DDIMScheduler", "diffusers:DDIMScheduler(timestep_spacing='trailing')")}
    request["samples"] = 10
    tiny_sweep(**request, steps=(2,)).run(out, progress=False)
    victim = min(out.glob("cells/diffusers-DDIMScheduler-2-*/0*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    results = tiny_sweep(**request, steps=(2, 3, 2000)).run(out, progress=False)
    return report(out, plots=True), results


@pytest.fixture(scope="module")
def page(swept):
    return swept[0].read_text()


def test_the_page_is_well_formed_and_made_for_phones_and_for_ears(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.all("html", lang="en")
    assert parsed.all("meta", name="viewport", content="width=device-width, initial-scale=1")
    drawn = parsed.all("svg", role="img")
    # two schedulers of 2 and 3 steps: 2 metrics x the costs of a cell, and a grid for each number of steps
    assert len(drawn) == 2 * len(re.findall(r'<input type="radio"', page)) + 2
    for svg in drawn:
        assert set(svg["attrs"]["aria-labelledby"].split()) <= set(parsed.ids)
    assert all(image["attrs"]["alt"] for image in parsed.all("img"))
    # what is wider than a phone scrolls in a box of its own that the keyboard reaches
    boxes = parsed.of_class("div", "scroll")
    assert len(boxes) == 2
    assert all(box["attrs"]["tabindex"] == "0" and box["attrs"]["aria-label"] for box in boxes)


def test_nothing_is_asked_of_the_network(page):
    spoken = re.sub(r"base64,[^\"]*", "", page)
    assert not re.findall(r"https?:|//[a-z]|@import|<link|<script src", spoken)
    parsed = Page(page)
    asked = [e["attrs"][k] for e in parsed.elements for k in ("src", "href", "data", "action") if k in e["attrs"]]
    assert asked
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in asked)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_every_number_failure_and_repair_is_there(page, swept):
    results = swept[1]
    ok = [row for row in results.rows if row.status == "ok"]
    assert len(ok) == 4
    shown = {e["attrs"].get("data-v") for e in Page(page).all("td")}
    for row in ok:
        assert {repr(row.value("fid")), repr(row.value("clip_score")), repr(row.nfe_per_image)} <= shown
    assert len(results.failed) == 2
    assert all(html.escape(row.error) in page for row in results.failed)
    assert "seeds 0 to 1: the file could not be read; made again" in page
    assert "6 cells, 2 failed" in page
    assert html.escape(ok[0].metrics["fid"]["recipe"]) in page


def test_pictures_prompts_and_manifest_are_there(page):
    parsed = Page(page)
    assert len(parsed.all("img")) == 4
    assert all(prompt in page for prompt in PROMPTS)
    (manifest,) = parsed.all("details")
    assert "open" not in manifest["attrs"]
    assert "timestep_spacing" in manifest["text"]


def test_light_and_dark_follow_the_system_and_can_be_chosen(page):
    assert "@media (prefers-color-scheme: dark) { :root:not([data-theme=light])" in page
    assert ":root[data-theme=dark]" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "currentColor" in drawn
    assert not re.search(r"#(?:000000|1b1f25|dde1e7|ffffff)\b", drawn)  # ink, lines and paper are the page's


def test_odd_names_are_text_not_markup(tmp_path):
    row = Row("<script>alert(1)</script>", 5, 1.0, "failed", error="<b>&</b>")
    odd = Row('"><img src=x>', 5, 1.0, "ok", nfe_per_image=5.0, metrics={"fid": {"value": 1.0}})
    Results(("fid", "</svg><i>"), 3, (row, odd)).save(tmp_path)
    text = report(tmp_path).read_text()
    parsed = Page(text)
    assert len(parsed.all("script")) == 1
    assert "alert" not in parsed.all("script")[0]["text"]
    assert not parsed.all("b")
    assert not parsed.all("i")
    assert not parsed.all("img")
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in text
    assert "1 of 3 cells are not done yet" in text


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json"):
        report(tmp_path)


def test_a_notebook_shows_the_page_itself(swept, page):
    written = swept[0]
    (frame,) = Page(written._repr_html_()).all("iframe")
    assert frame["attrs"]["srcdoc"] == page
    with open(written, encoding="utf-8") as file:  # a report opens like its path
        assert file.read() == page
    assert str(written) == str(written.path)


def test_each_model_has_its_section(tmp_path):
    Results(("fid",), 16, (*rows(model="one"), *rows(model="two"))).save(tmp_path)
    parsed = Page(report(tmp_path).read_text())
    assert [e["text"] for e in parsed.all("h2")] == ["one", "two"]
    assert len(parsed.of_class("table", "numbers")) == 2
    names = [e["attrs"]["name"] for e in parsed.all("input", type="radio", value="nfe_per_image")]
    assert len(set(names)) == 2


def test_every_cell_is_a_row_that_sorts(page):
    parsed = Page(page)
    heads = [e for e in parsed.all("th", scope="col") if "thead" in e["within"] and "data-first" in e["attrs"]]
    assert [e["text"] for e in heads] == ["CLIP score"]  # where more is better, the first click puts the most on top
    assert len([e for e in parsed.all("th", scope="row")]) == 6
    (script,) = parsed.all("script")
    assert 'setAttribute("aria-sort"' in script["text"]
    assert 'createElement("button")' in script["text"]


def test_the_steps_of_every_cell_are_drawn(page, swept):
    described = [e["text"] for e in Page(page).all("desc") if "diffusers:DDIMScheduler: " in e["text"]]
    assert len(described) == 2
    (manifest,) = swept[0].path.parent.glob("manifest.json")
    cells = [cell for cell in json.loads(manifest.read_text())["cells"] if cell["status"] == "ok"]
    schedule = NoiseSchedule.from_config({**VP, "_class_name": "DDIMScheduler"})
    for cell in cells:
        times = torch.tensor(cell["timesteps"], dtype=torch.float64)
        said = ", ".join(f"{lam:.2f}" for lam in schedule.lam(times).tolist())
        assert any(said in text for text in described)


def test_plots_are_also_files_and_whole(swept):
    written, results = swept
    folder = written.path.parent / "plots"
    assert sorted(written.plots) == sorted(folder.iterdir())  # nothing half written is left
    for path in written.plots:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
                assert picture.width > 900
        if path.suffix == ".svg":
            text = path.read_text()
            assert text.rstrip().endswith("</svg>")
            assert "DDIMScheduler" in text  # a file names its series itself
    named = {path.stem for path in written.plots if path.suffix == ".png"}
    assert {"front-fid-nfe-per-image", "front-clip-score-seconds-per-image", "steps-2", "steps-3"} <= named
    lines = list(csv.DictReader(io.StringIO((folder / "fronts.csv").read_text())))
    ok = [row for row in results.rows if row.status == "ok"]
    assert {float(line["value"]) for line in lines if line["metric"] == "fid"} == {row.value("fid") for row in ok}
    fid = [line for line in lines if line["metric"] == "fid" and line["cost"] == "nfe_per_image"]
    best = min(fid, key=lambda line: float(line["value"]))
    assert best["on_front"] == "1"
    steps = list(csv.DictReader(io.StringIO((folder / "steps.csv").read_text())))
    assert len(steps) == 2 * (2 + 3)
