"""Our best training-free scheduler and grid against the best of all of diffusers', by the error of the latents.

    python benchmarks/best.py [--model NAME ...] [--guidance 1 2] [--calls 5 6 8 10 15 20] [--images 1000] [--out FOLDER]

For every model, guidance and number of network calls an image both sides are searched in the same way: every solver on
every grid of its first list (beyond the fewest calls: the 48 best of the number before, at most 6 of a class), then twice
all changes of one option or of the grid of the best three. Ours begins with what diffusers' search ended with as well, each
of those six as our scheduler with the same options, by our defaults and by diffusers': who changes from diffusers begins there
too. An error is the RMS of the difference of the latents to those of 1,000 steps from the same noise, averaged over seeds. The
search sees seeds 0 to 3, its best six are compared on seeds 0 to 7, and what comes out is measured on seeds 8 to 15, which
nothing was chosen by. A call with guidance sees the batch twice and counts once; schedulers of several calls a step get as many
steps as the calls pay for.

With --light a model is not searched of its own: both sides try the usual solvers on the usual grids and, but for a flow,
what was best on fashion-dit-small; two seeds choose four of them for the comparison. Every entry says how it was searched.

Both sides run in one loop with the pipeline's noise and embeddings; benchmarks/subjects.py. FID is measured for the two
winners only, through the pipeline (--fid-calls, where --images is not 0). Finished parts are kept in --work, and a killed run
goes on from them.

``free:`` before a scheduler: its first output is assumed instead of called for, one step more for the same calls
(analytic_first_step). ``shifted:``: the network is told the times that averaged_time_shift found on the seeds of the search.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import OURS, OURS_FLOW, THEIRS, THEIRS_FLOW, Side, distinct, extras, prepared, translated
from diffusers.utils import logging
from record import RESULTS, machine, provenance, table, write
from rich.progress import Progress
from subjects import REFERENCE, Mixture, Network, Subject, affordable, quality, run
from torch import Tensor

from fewstep import pipelines
from fewstep.artifact import write_bytes, write_json
from fewstep.eval.pairs.latents import latent_rmse
from fewstep.samplers import PlanScheduler

CALLS = (5, 6, 8, 10, 15, 20)
SELECTED, TESTED = [*range(8)], [*range(8, 16)]
SEEDS = 16


class Remembered:
    """A network that answers a state it has seen, to a relative 1e-5, from memory.

    Most candidates on one grid begin alike, so the first calls of a search are a few that repeat.
    """

    def __init__(self, network: Network, noise: Tensor) -> None:
        self._network = network
        probes = torch.Generator().manual_seed(0)
        self._probes = torch.randn(2, *noise.shape[1:], generator=probes, dtype=noise.dtype)
        self._seen: dict[tuple[int, float], list[tuple[Tensor, Tensor]]] = {}

    def __call__(self, x: Tensor, t: Any, which: Tensor) -> Tensor:
        prints = (x[:, None] * self._probes).flatten(2).sum(2)
        size = x.flatten(1).norm(dim=1, keepdim=True)
        known = self._seen.setdefault((len(x), round(float(t), 6)), [])
        for print_, output in known:
            if bool(((prints - print_).abs() < 1e-5 * size).all()):
                return output.clone()
        output = self._network(x, t, which)
        if len(known) < 400:
            known.append((prints, output.clone()))
        return output

    def forget(self) -> None:
        self._seen.clear()


@dataclass(frozen=True)
class Effort:
    """How thoroughly both sides are searched."""

    seeds: int = 4
    """What the search sees."""
    rounds: int = 2
    beam: int = 3
    """So many of the best are changed in a round."""
    finalists: int = 6
    """So many are compared on the selection's seeds."""
    kept: int = 48
    """Candidates that a number of calls hands on to the next; at most an eighth of them of one class."""

    @property
    def which(self) -> list[int]:
        return [*range(self.seeds)]


LIGHT = Effort(seeds=2, rounds=0, finalists=4, kept=8)
"""For models that take long: what was best on LIGHT_FROM at the same guidance and calls, and the usual solvers and grids."""
LIGHT_FROM = "fashion-dit-small"


class Search:
    """Errors of specs on one subject at one number of calls, each measured once."""

    def __init__(
        self, subject: Subject | Mixture, network: Network, reference: Tensor, calls: int, effort: Effort
    ) -> None:
        self.subject, self.network, self.reference, self.calls = subject, network, reference, calls
        self.effort = effort
        self.found: dict[str, float] = {}
        """Error on the searched seeds."""

    def errors(self, spec: str, which: Sequence[int]) -> np.ndarray[Any, Any] | None:
        """(seeds,) errors; None where the scheduler refuses or its latents are not finite."""
        subject = self.subject
        steps = affordable(spec, subject.config, self.calls) if spec.startswith("diffusers:") else self.calls
        if steps is None:
            return None
        try:
            scheduler = prepared(spec, subject, steps, self.effort.which)
            latents = run(self.network, subject.noise, scheduler, steps, which)
            if len(scheduler.timesteps) > self.calls:
                return None
            return latent_rmse(latents, self.reference[which])
        except Exception:  # diffusers' schedulers fail in many ways on few steps, ours refuse what cannot be
            return None

    def measure(self, specs: Iterable[str]) -> None:
        for spec in specs:
            if spec not in self.found:
                errors = self.errors(spec, self.effort.which)
                self.found[spec] = math.inf if errors is None else float(errors.mean())

    def ranked(self) -> list[str]:
        """Specs by their error, the best first; of those with one and the same (an option that changes nothing) the first."""
        best: dict[float, str] = {}
        for spec, error in self.found.items():
            if math.isfinite(error):
                best.setdefault(float(f"{error:.6g}"), spec)
        return [best[error] for error in sorted(best)]

    def handed_on(self) -> list[str]:
        """What the next number of calls starts from."""
        return leaders(self._plain(), self.effort.kept, self.effort.kept // 8)

    def best(self, side: Side, start: Sequence[str], ours: bool) -> list[dict[str, Any]]:
        """The finalists with their errors on the selection's and the test's seeds, the best on the selection's first."""
        self.measure(start)
        for _ in range(self.effort.rounds):
            self.measure(distinct(move for spec in self._plain()[: self.effort.beam] for move in side.moves(spec)))
        if ours:
            self.measure(extras(self.calls, self._plain()[: self.effort.beam]))
        finalists = []
        for spec in self.ranked()[: self.effort.finalists]:
            errors = self.errors(spec, SELECTED)
            if errors is not None:
                finalists.append({"scheduler": spec, "selection": float(errors.mean())})
        finalists.sort(key=lambda entry: entry["selection"])
        for entry in finalists[:1]:
            errors = self.errors(entry["scheduler"], TESTED)
            entry["test"] = math.inf if errors is None else float(errors.mean())
            entry["each"] = [] if errors is None else [round(float(e), 6) for e in errors]
        return finalists

    def _plain(self) -> list[str]:
        """Specs that moves can change."""
        return [s for s in self.ranked() if not s.startswith(("free:", "shifted:", "NeuralSolver", "AcceleratedDDIM"))]


def leaders(ranked: Iterable[str], most: int, of_class: int) -> list[str]:
    """The first of ``ranked``, no more than ``of_class`` of one class."""
    kept: list[str] = []
    seen: Counter[str] = Counter()
    for spec in ranked:
        seen[class_of(spec)] += 1
        if seen[class_of(spec)] <= of_class:
            kept.append(spec)
    return kept[:most]


def class_of(spec: str) -> str:
    return spec.removeprefix("diffusers:").partition("(")[0]


def by_solver(search: Search, top: int = 12) -> dict[str, Any]:
    """The best spec of every class, for those who wonder how the others did."""
    best: dict[str, tuple[float, str]] = {}
    for spec in search.ranked():
        best.setdefault(class_of(spec), (round(search.found[spec], 6), spec))
    return dict(sorted(best.items(), key=lambda item: item[1][0])[:top])


def light_start(name: str, side: Side, subject: Subject | Mixture, calls: int, work: Path) -> list[str]:
    """The best of :data:`LIGHT_FROM`'s search, two of a class, and the usual; for a flow model the usual alone."""
    if subject.flow:
        return side.usual()
    found = json.loads((work / f"{LIGHT_FROM}-g{subject.guidance:g}-{calls}.json").read_text())
    specs = [entry["scheduler"] for entry in found[name]]
    return distinct([*leaders([*specs, *found[f"{name}_next"]], LIGHT.kept, 2), *side.usual()])


def searched(subject: Subject | Mixture, calls_list: Sequence[int], effort: Effort, work: Path) -> list[dict[str, Any]]:
    """One entry for every number of calls; those that lie in ``work`` are read."""
    entries: list[dict[str, Any]] = []
    reference = subject.reference()
    sides = {"ours": OURS_FLOW if subject.flow else OURS, "theirs": THEIRS_FLOW if subject.flow else THEIRS}
    starts = {name: side.start() for name, side in sides.items()}
    network = Remembered(subject.network, subject.noise)
    with Progress() as progress, torch.no_grad():
        bar = progress.add_task(f"{subject.name}, guidance {subject.guidance:g}", total=sum(calls_list))
        for calls in calls_list:
            path = work / f"{subject.name}-g{subject.guidance:g}-{calls}.json"
            if path.exists():
                part = json.loads(path.read_text())
            else:
                if effort == LIGHT:
                    starts = {name: light_start(name, side, subject, calls, work) for name, side in sides.items()}
                drift = float(latent_rmse(subject.reference(REFERENCE // 2), reference).mean())
                part = {
                    "guidance": subject.guidance,
                    "calls": calls,
                    "reference_error": drift,
                    "effort": asdict(effort),
                }
                for name, side in reversed(sides.items()):
                    search = Search(subject, network, reference, calls, effort)
                    same = (
                        [s for entry in part["theirs"] for s in translated(entry["scheduler"])]
                        if name == "ours"
                        else []
                    )
                    part[name] = search.best(side, distinct([*starts[name], *same]), name == "ours")
                    part[f"{name}_tried"] = sum(map(math.isfinite, search.found.values()))
                    part[f"{name}_by_solver"] = by_solver(search)
                    part[f"{name}_next"] = search.handed_on()
                network.forget()
                write_json(path, "Best", part)
            for name in sides:
                starts[name] = part[f"{name}_next"]
            entries.append(part)
            progress.advance(bar, calls)
    return entries


def fids(subject: Subject, entry: dict[str, Any], images: int, work: Path) -> dict[str, float]:
    """FID of both sides' winners, where their pipeline runs them.

    A plan that no scheduler of ours makes goes into a file and is run from there.
    """
    found = {}
    for side in ("ours", "theirs"):
        spec, steps = entry[side][0]["scheduler"], entry["calls"]
        name = f"{subject.name}-g{subject.guidance:g}-{steps}-{side}-{images}"
        if side == "theirs":
            steps = affordable(spec, subject.config, steps) or steps
        else:
            scheduler = prepared(spec, subject, steps, Effort(**entry["effort"]).which)
            if isinstance(scheduler, PlanScheduler):
                (plan,) = scheduler.plans.values()
                plan.save(work / f"{name}.json")
                spec = f"PlanScheduler(plan={str(work / f'{name}.json')!r})"
        value = quality(subject, spec, steps, images, work / name).value("fid")
        if value is not None:  # DDPMPipeline hands a generator to the scheduler, which diffusers' DEIS does not take
            found[side] = float(value)
    return found


def page(body: dict[str, Any]) -> str:
    """The model's table for people."""
    header = ("guidance", "calls", "ours", "error", "diffusers", "error", "ratio", "FID ours", "FID diffusers")
    rows = []
    for entry in body["entries"]:
        ours, theirs = entry["ours"][0], entry["theirs"][0]
        fids = [f"{entry['fid'][k]:.2f}" if k in entry.get("fid", {}) else "–" for k in ("ours", "theirs")]
        ratio = ours["test"] / theirs["test"]
        rows.append((
            f"{entry['guidance']:g}", f"{entry['calls']}", f"`{ours['scheduler']}`", f"{ours['test']:.4f}",
            f"`{theirs['scheduler'].removeprefix('diffusers:')}`", f"{theirs['test']:.4f}",
            f"{ratio:.2f}" if ratio < 1 else f"**{ratio:.2f}**", *fids,
        ))  # fmt: skip
    return (
        f"# Best of ours and of diffusers' on {body['model']}\n\n"
        + table(header, rows)
        + "\nRMS errors of the latents to 1,000 steps, mean of 8 seeds that nothing was selected by; a ratio of 1 or more is "
        "set in bold. How both sides were searched stands in `benchmarks/best.py`.\n\n" + provenance(body["machine"])
    )


def published(folder: Path, name: str) -> list[dict[str, Any]]:
    """The entries of the model's page, which may have been written for other guidances."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text())["entries"] if path.exists() else []


def summary(folder: Path) -> str:
    """Error over error of all pages in ``folder``, one row a model and guidance."""
    entries = [
        (body["model"], entry)
        for body in (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
        for entry in body["entries"]
    ]
    ratios = {
        (model, entry["guidance"], entry["calls"]): entry["ours"][0]["test"] / entry["theirs"][0]["test"]
        for model, entry in entries
    }
    calls = sorted({n for *_, n in ratios})
    rows = []
    for model, guidance in dict.fromkeys((m, g) for m, g, _ in ratios):
        found = [ratios.get((model, guidance, n)) for n in calls]
        cells = ["–" if r is None else f"{r:.2f}" if r < 1 else f"**{r:.2f}**" for r in found]
        rows.append((f"[{model}]({model}.md)", f"{guidance:g}", *cells))
    return (
        "# Our best against diffusers' best\n\n"
        + table(("model", "guidance", *(f"{n} calls" for n in calls)), rows)
        + "\nThe error of our best training-free scheduler and grid over that of diffusers' best with all of its options, on "
        "seeds that neither was chosen by; 1 and more is set in bold. What won, and the errors, stand on each model's page; "
        "how both sides were searched, in `benchmarks/best.py`, which wrote all of this.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["mixture", *sorted(pipelines.models())])
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS)
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 2.0], help="of the zoo's models (%(default)s)"
    )
    parser.add_argument("--light", action="store_true", help="try what was best on a cheaper model, and the usual")
    parser.add_argument(
        "--images", type=int, default=0, help="for FID of the winners at the last guidance (%(default)s)"
    )
    parser.add_argument("--fid-calls", type=int, nargs="+", default=[5, 8, 10])
    parser.add_argument("--work", type=Path, default=Path(".cache/best"))
    parser.add_argument("--references", type=Path, default=Path(".cache/baseline"))
    parser.add_argument("--out", type=Path, default=RESULTS / "best")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    effort = LIGHT if options.light else Effort()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.model:
        about, entries, done = machine(), list[dict[str, Any]](), set[float]()
        for guidance in (1.0, 7.5) if name == "mixture" else options.guidance:
            subject = (
                Mixture(guidance, SEEDS) if name == "mixture" else Subject(name, guidance, SEEDS, options.references)
            )
            if subject.guidance in done:
                continue  # an unconditional model has only one
            done.add(subject.guidance)
            found = searched(subject, options.calls, effort, options.work)
            if isinstance(subject, Subject) and options.images and guidance == max(options.guidance):
                for entry in found:
                    if entry["calls"] in options.fid_calls:
                        entry["fid"] = fids(subject, entry, options.images, options.work)
            entries += found
            before = published(options.out, subject.name)
            others = [e for e in before if e["guidance"] not in done]
            for entry, old in itertools.product(found, before):  # FID of a run that measured it
                if all(entry[key] == old[key] for key in ("guidance", "calls", "ours", "theirs")) and "fid" in old:
                    entry.setdefault("fid", old["fid"])
            body = {
                "model": subject.name,
                "seeds": {"selection": SELECTED, "test": TESTED},
                "entries": sorted(others + entries, key=lambda e: (e["guidance"], e["calls"])),
                "machine": about,
            }
            write(options.out, subject.name, body, page(body))
            write_bytes(options.out / "README.md", summary(options.out).encode())
            print(page(body))


if __name__ == "__main__":
    main()
