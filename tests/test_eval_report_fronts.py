"""The report's table, its fronts of quality against cost, and what it says was found."""

import itertools
import math
import random

import pytest

from fewstep.eval.reports.findings import findings
from fewstep.eval.reports.page_plots import fronts
from fewstep.eval.reports.pareto import pareto_front
from fewstep.eval.reports.table import numbers_table, results_html
from fewstep.eval.sweeps.results import Results, Row
from tests.report_fixtures import NFE, Page, facet, rows


# -- the table ---------------------------------------------------------------------------------------------------------
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
