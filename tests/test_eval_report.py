"""The page: self-contained, complete, honest about failures, safe with odd names; its fronts, grids and heat maps."""

import csv
import html
import io
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.eval import report
from fewstep.eval.reports.columns import COSTS, facets
from fewstep.eval.reports.contact import sheet, small
from fewstep.eval.reports.decisions import Decisions
from fewstep.eval.reports.findings import findings
from fewstep.eval.reports.noise_levels import lambdas
from fewstep.eval.reports.page_plots import caches, fronts, heat_map
from fewstep.eval.reports.pareto import pareto_front
from fewstep.eval.reports.table import numbers_table, results_html
from fewstep.eval.sweeps.results import Results, Row
from fewstep.samplers import NoiseSchedule
from tests.eval_fixtures import PROMPTS, random_images, tiny_sweep

VOID = {"meta", "img", "br", "input", "wbr", "link", "hr"}
NFE, SECONDS = (next(cost for cost in COSTS if cost.field == field) for field in ("nfe_per_image", "seconds_per_image"))


class Page(HTMLParser):
    """Elements with their attributes and texts; an element that is closed out of turn is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.ids = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "within": [e["tag"] for e in self.open]}
        self.ids += [value for key, value in attrs if key == "id"]
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **wanted):
        return [e for e in self.elements if e["tag"] == tag and all(e["attrs"].get(k) == v for k, v in wanted.items())]

    def of_class(self, tag, name):
        return [e for e in self.all(tag) if name in (e["attrs"].get("class") or "").split()]


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


def rows(count=4, **changes):
    """Cells of two schedulers with FID and accuracy, costs rising with the steps."""
    return [
        Row(
            scheduler,
            steps,
            2.0,
            "ok",
            nfe_per_image=2.0 * steps,
            seconds_per_image=0.01 * steps,
            metrics={"fid": {"value": 8.0 / steps + lead}, "accuracy": {"value": 90.0 + steps}},
            **changes,
        )
        for scheduler, lead in (("DPMSolver", 0.0), ("diffusers:DDIMScheduler", 1.0))
        for steps in range(1, count + 1)
    ]


def facet(cells, metrics=("fid", "accuracy")):
    (only,) = facets(cells, metrics)
    return only


# -- the page ----------------------------------------------------------------------------------------------------------
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


# -- the table ---------------------------------------------------------------------------------------------------------
def test_every_cell_is_a_row_that_sorts(page):
    parsed = Page(page)
    heads = [e for e in parsed.all("th", scope="col") if "thead" in e["within"] and "data-first" in e["attrs"]]
    assert [e["text"] for e in heads] == ["CLIP score"]  # where more is better, the first click puts the most on top
    assert len([e for e in parsed.all("th", scope="row")]) == 6
    (script,) = parsed.all("script")
    assert 'setAttribute("aria-sort"' in script["text"]
    assert 'createElement("button")' in script["text"]


def test_the_best_of_a_column_and_the_front_are_marked():
    values = Page(numbers_table(facet(rows(2)))).all("td")[1::5]  # steps, FID, accuracy, NFE, seconds
    assert [(e["attrs"]["data-v"], e["attrs"].get("class")) for e in values] == [
        ("8.0", "front"),
        ("4.0", "best front"),
        ("9.0", None),
        ("5.0", None),
    ]
    assert values[1]["text"].startswith("★")


def test_factors_that_vary_are_columns_and_those_that_do_not_are_not():
    table = Page(numbers_table(facet([*rows(2, cache="none"), *rows(2, cache="every(2)")])))
    heads = [e["text"] for e in table.all("th", scope="col")]
    assert "Cache" in heads
    assert "Guidance" not in heads
    assert sum(e["text"] == "cache every(2)" for e in table.all("small")) == 4


def test_results_show_themselves_without_a_style_sheet():
    text = results_html(Results(("fid",), 8, tuple(rows())))
    parsed = Page(text)
    assert len(parsed.all("th", scope="row")) == 8
    assert "<svg" not in text


# -- fronts ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lower", [True, False])
def test_the_front_is_what_a_comparison_of_all_pairs_finds(lower):
    generator = random.Random(0)
    for count in (0, 1, 2, 5, 40, 40, 40):
        # few distinct values, so that ties in one, in the other and in both occur
        points = [(generator.randrange(1, 8), generator.randrange(1, 8)) for _ in range(count)]
        sign = 1 if lower else -1

        def beaten(p, points=points, sign=sign):
            return any(
                q[0] <= p[0] and sign * q[1] <= sign * p[1] and (q[0] < p[0] or sign * q[1] < sign * p[1])
                for q in points
            )

        expected = {i for i, p in enumerate(points) if not beaten(p)}
        found = pareto_front([p[0] for p in points], [p[1] for p in points], lower_is_better=lower)
        assert set(found) == expected
        assert len(found) == len(expected)
        assert all(points[a][0] <= points[b][0] for a, b in itertools.pairwise(found))


def test_a_front_leaves_out_what_is_not_known():
    assert pareto_front([1.0, math.nan, 3.0], [math.nan, 1.0, 2.0]) == [2]
    with pytest.raises(ValueError, match="2 costs and 1 values"):
        pareto_front([1.0, 2.0], [1.0])


def test_every_cell_is_a_point_that_says_what_it_is():
    parsed = Page(fronts(facet(rows()), 0))
    tips = [e["text"] for e in parsed.all("title") if "g" in e["within"]]
    assert len(tips) == 8 * 2 * 2  # cells x metrics x costs
    assert "DPMSolver, 4 steps: FID 2.00 at 8 network evaluations" in tips
    described = [e["text"] for e in parsed.all("desc")]
    assert len(described) == 4
    assert all("DDIM" not in text for text in described if "FID" in text)  # beaten at every cost
    assert {e["attrs"]["value"] for e in parsed.all("input")} == {"nfe_per_image", "seconds_per_image"}


def test_blocks_of_seeds_are_one_point_with_their_range():
    cells = [
        Row("DDIM", 5, 1.0, "ok", nfe_per_image=5.0, metrics={"fid": {"value": value}}, seed=seed)
        for seed, value in ((0, 1.0), (10, 4.0), (20, 1.0))
    ]
    (point,) = facet(cells).points("fid", NFE)
    assert point.value == 2.0
    assert point.interval == (1.0, 4.0)


def test_an_interval_is_in_the_table_and_in_the_plot():
    entry = {"value": 2.0, "interval": [1.5, 2.5]}
    cells = [Row("DDIM", n, 1.0, "ok", nfe_per_image=n, metrics={"fid": entry}) for n in (5, 6)]
    assert facet(cells).points("fid", NFE)[0].interval == (1.5, 2.5)
    assert [e["text"] for e in Page(numbers_table(facet(cells))).all("small")] == ["1.50 to 2.50"] * 2
    cells = [Row("DDIM", 5, 1.0, "ok", nfe_per_image=5, metrics={"kid": {"value": 2.0, "spread": 0.25}})]
    assert facet(cells, ("kid",)).points("kid", NFE)[0].interval == (1.75, 2.25)


def test_a_plot_needs_a_value():
    assert fronts(facet([Row("DDIM", 5, 1.0, "failed")]), 0) == ""
    text = fronts(facet([Row("DDIM", 5, 1.0, "ok", nfe_per_image=5.0, metrics={"fid": {"value": 3.0}})]), 0)
    assert text.count("<desc") == 1
    assert "<fieldset" not in text  # nothing to choose between


def test_of_a_metric_of_unknown_direction_nothing_is_called_best():
    cells = [Row("DDIM", n, 1.0, "ok", nfe_per_image=n, metrics={"mine": {"value": 1.0 / n}}) for n in (5, 6)]
    own = facet(cells, ("mine",))
    assert own.front("mine", NFE) == []
    assert findings(own) == []
    assert "★" not in numbers_table(own)
    assert fronts(own, 0)


# -- what was found ----------------------------------------------------------------------------------------------------
def test_the_findings_are_those_of_the_rows():
    values = {(5, 0.10): 1.04, (10, 0.20): 1.06, (20, 0.40): 1.0, (40, 0.80): 1.5}
    cells = [
        Row("DDIM", n, 1.0, "ok", nfe_per_image=n, seconds_per_image=s, metrics={"fid": {"value": value}})
        for (n, s), value in values.items()
    ]
    best, close = findings(facet(cells))
    assert best == "Best FID: 1.00, by DDIM at 20 steps (20 network evaluations, 0.4 s an image)."
    assert close == (
        "The fastest cell within 5 % of it is DDIM at 5 steps with 1.04 (5 network evaluations, 0.1 s an image), "
        "4 times as fast."
    )
    assert findings(facet(cells[2:]))[1] == "No cell within 5 % of it is faster."
    assert findings(facet(cells[:1])) == ["Best FID: 1.04, by DDIM at 5 steps (5 network evaluations, 0.1 s an image)."]
    more = facet([Row("A", n, 1.0, "ok", nfe_per_image=n, metrics={"accuracy": {"value": 90.0 + n}}) for n in (1, 2)])
    assert findings(more)[0].startswith("Best Accuracy %: 92.0, by A at 2 steps")
    assert findings(more)[1].endswith("50 % of the cost.")


def test_the_findings_say_how_many_cannot_be_told_from_the_best():
    spans = ([0.9, 1.1], [1.05, 1.3], [1.2, 1.4])
    cells = [
        Row("DDIM", n, 1.0, "ok", nfe_per_image=n, metrics={"fid": {"value": sum(span) / 2, "interval": span}})
        for n, span in enumerate(spans, start=1)
    ]
    assert findings(facet(cells))[-1] == "The interval of 1 other cell overlaps that of the best."
    assert findings(facet([cells[0], cells[2]]))[-1] == "No other cell's interval overlaps that of the best."


# -- where the steps lie -----------------------------------------------------------------------------------------------
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


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


# -- files -------------------------------------------------------------------------------------------------------------
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
