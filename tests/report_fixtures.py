"""What tests of the report share: a parser that counts elements, and rows of a sweep that was not run."""

from html.parser import HTMLParser

from fewstep.eval.reports.columns import COSTS, facets
from fewstep.eval.sweeps.results import Row

VOID = {"meta", "img", "br", "input", "wbr", "link", "hr"}
NFE, SECONDS = (next(cost for cost in COSTS if cost.field == field) for field in ("nfe_per_image", "seconds_per_image"))
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


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
