"""Learned plans against the best of diffusers at the same number of network calls, and every way of learning against the others.

    python benchmarks/learn.py [--model NAME ...] [--calls 5 6 8 10] [--images 1000] [--out FOLDER]
    python benchmarks/learn.py --ship [--model NAME ...] [--calls 4 5 6 8 10] [--minutes 15]
    python benchmarks/learn.py --methods [--model NAME] [--calls 5] [--seconds 120] [--images 1000]
    python benchmarks/learn.py --cascade

The first measures the plans that come with the embedded models on seeds 0 to 15 and their prompts, which no plan has seen:
mean RMS error of the latents to 1,000 steps of DPM-Solver++ 2M. The best of diffusers is chosen on the same seeds, in its favour,
out of the list of benchmarks/baseline.py. With --images, FID and what else the model is scored by: of the learned plan, and of
diffusers' best at more calls, which is what it has to keep up with.

--ship learns those plans: 100 trajectories, with prompts from the end of the model's list and seeds from 1,000,000 on. A plan
that is there is kept. --from goes on from another model's plans, where both have one noise schedule.

--methods runs every method on the same trajectories within the same time and measures on the same 16 seeds; ``mixture`` is the
64-dimensional one of benchmarks/subjects.py at guidance 7.5. Finished methods are kept in --work.

--cascade searches DC-Solver's ratios on the mixture at some numbers of calls and guidance scales, along curves, fits the cascade
to them, and compares what it predicts in between with what the same search finds there, and with ratios searched freely.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline import ranked
from record import RESULTS, machine, provenance, table, write
from rich.progress import track
from subjects import REFERENCE, Mixture, Subject, quality, referee
from torch import Tensor

from fewstep import pipelines
from fewstep.eval.pairs.latents import latent_rmse
from fewstep.samplers import EMS, DCSolver, Grid, ModelStatistics, NoiseSchedule, SolverPlan, UniPC, learn, sample
from fewstep.samplers.learn.methods.untuned import Untuned
from fewstep.samplers.learn.plans import FOLDER
from fewstep.samplers.testing import GaussianMixture

SHIPPED = (4, 5, 6, 8, 10)
MORE = {4: 5, 5: 8, 6: 10, 8: 15, 10: 20}
"""Calls at which diffusers' FID is compared with the learned plan's."""
FIRST = 1_000_000
LIMIT = 50
"""Steps of diffusers' DPM-Solver++ 2M whose FID says where a perfect sampler would arrive."""
SCORES = {"fid": "FID", "clip_score": "CLIP", "accuracy": "accuracy %"}


def error(plan: SolverPlan, subject: Any, reference: Tensor) -> float:
    which = torch.arange(len(subject.noise))
    with torch.no_grad():
        made = sample(lambda x, t: subject.network(x, t, which), subject.noise, plan)
    return float(np.mean(latent_rmse(made, reference)))


# -- the shipped plans ------------------------------------------------------------------------------------------------
def teacher(name: str, guidance: float, count: int, work: Path) -> learn.Teacher:
    from fewstep.pipelines import zoo

    pipe, prompts = pipelines.load(name), zoo.prompts(name)
    pipe.set_progress_bar_config(disable=True)
    steps = 128 if name == "fashion-pixel" else 64
    scale = guidance if any(prompts) else 1.0
    return learn.Teacher(
        pipe, list(prompts[-count:]), scale, steps, range(FIRST, FIRST + count), folder=work / f"learn-{name}-{count}"
    )


def ship(options: argparse.Namespace) -> None:
    for name in options.model:
        todo = [n for n in options.calls or SHIPPED if not (FOLDER / f"{name}-{n}.json").exists()]
        if not todo:
            continue
        problem = teacher(name, options.guidance, options.trajectories, options.work).problem()
        for nfe in todo:
            source = FOLDER / f"{options.source}-{nfe}.json"
            start = SolverPlan.load(source) if options.source and source.exists() else None
            plan = learn.tune(problem, nfe, seconds=60 * options.minutes, held_out=20, start=start)
            plan.save(FOLDER / f"{name}-{nfe}.json")
            told = plan.provenance
            print(
                f"{name} {nfe}: {told['error_before']:.4f} -> {told['error_after']:.4f}, {told['seconds']:.0f} s",
                flush=True,
            )


def compare(name: str, options: argparse.Namespace) -> None:
    subject, about = Subject(name, options.guidance, 16, options.work), machine()
    reference, entries = subject.reference(REFERENCE), []
    for nfe in track([n for n in options.calls or SHIPPED if n in learn.shipped().get(name, ())], name):
        plan = learn.load(name, nfe)
        best, spec, steps = diffusers(subject, nfe, reference)
        entry: dict[str, Any] = {
            "calls": nfe, "learned": error(plan, subject, reference), "diffusers": best,
            "scheduler": spec.removeprefix("diffusers:"), "steps": steps, "minutes": plan.provenance["seconds"] / 60,
            "scores": {}, "more_scores": {},
        }  # fmt: skip
        if options.images:
            _, many, many_steps = diffusers(subject, MORE[nfe], reference)
            runs = {
                "scores": (f"PlanScheduler(plan='{FOLDER / f'{name}-{nfe}.json'}')", nfe),
                "more_scores": (many, many_steps),
            }
            for key, (run, count) in runs.items():
                entry[key] = scores(subject, run, count, options.images, options.work / f"learn-{name}-{nfe}-{key}")
        entries.append(entry)
    limit = {}
    if options.images:
        limit = scores(subject, referee(subject.flow), LIMIT, options.images, options.work / f"learn-{name}-{LIMIT}")
    body = {
        "model": name, "guidance": subject.guidance, "images": options.images, "entries": entries, "limit": limit,
        "machine": about,
    }  # fmt: skip
    write(options.out, name, body, comparison(body))


def scores(subject: Subject, spec: str, steps: int, images: int, folder: Path) -> dict[str, float]:
    """FID and what else the model is scored by."""
    row = quality(subject, spec, steps, images, folder)
    return {metric: float(v) for metric in SCORES if (v := row.value(metric)) is not None}


def diffusers(subject: Subject, nfe: int, reference: Tensor) -> tuple[float, str, int]:
    """(error, spec, steps) of the best: as benchmarks/baseline.py left it for these seeds, or found now."""
    kept = RESULTS / "baseline" / f"{subject.name}.json"
    known = json.loads(kept.read_text()) if kept.exists() else {"entries": ()}
    if known.get("fidelity") == len(subject.seeds) and known.get("guidance") == subject.guidance:
        for entry in known["entries"]:
            if entry["budget"] == nfe:
                return entry["latent_rmse"], f"diffusers:{entry['scheduler']}", entry["steps"]
    return ranked(subject, nfe, reference)[0]


def comparison(body: dict[str, Any]) -> str:
    header = ("calls", "learned", "best of diffusers", "lower by", *SCORES.values(), "FID of diffusers at", "minutes")
    rows = [
        (
            str(e["calls"]),
            f"{e['learned']:.4f}",
            f"{e['diffusers']:.4f} `{e['scheduler']}`",
            f"{100 * (1 - e['learned'] / e['diffusers']):.0f} %",
            *cells(e["scores"]),
            f"{e['more_scores']['fid']:.2f} ({MORE[e['calls']]} calls)" if "fid" in e["more_scores"] else "–",
            f"{e['minutes']:.1f}",
        )
        for e in body["entries"]
    ]
    limit = ", ".join(f"{SCORES[m]} {v:.2f}" for m, v in body["limit"].items())
    said = f" {LIMIT} steps of DPM-Solver++ 2M, which all of these are after, have {limit}." if limit else ""
    return (
        f"# Learned plans of {body['model']}, guidance {body['guidance']:g}\n\n"
        + table(header, rows)
        + f"\nMean RMS error of the latents of seeds 0 to 15 to 1,000 steps; FID over {body['images']} images.{said} Minutes "
        "of learning, after the trajectories were made, 20 of which are held out. How it is measured stands in "
        "`benchmarks/learn.py`.\n\n" + provenance(body["machine"])
    )


def cells(found: dict[str, float]) -> list[str]:
    return [f"{found[metric]:.2f}" if metric in found else "–" for metric in SCORES]


# -- every method -----------------------------------------------------------------------------------------------------
Made = SolverPlan | Grid
Method = Callable[[learn.Problem, int, Untuned, float], Made]


def _descent(seconds: float) -> learn.Descent:
    return learn.Descent(iterations=200, seconds=seconds, batch=12)


def _levenberg(parts: Any) -> Method:
    def method(problem: learn.Problem, nfe: int, start: Untuned, seconds: float) -> SolverPlan:
        parameters = learn.Parameters(start.solver, problem.schedule, start.grid, parts)
        learn.levenberg(parameters, problem.take(slice(0, 16)), seconds=seconds)
        return parameters.frozen()

    return method


def _ratios(problem: learn.Problem, nfe: int, start: Untuned, seconds: float) -> SolverPlan:
    return DCSolver(UniPC(), learn.dc_search(problem, start.grid)).compile(problem.schedule, start.grid)


def _statistics(scalar: bool) -> Method:
    def method(problem: learn.Problem, nfe: int, start: Untuned, seconds: float) -> SolverPlan:
        statistics: ModelStatistics = learn.ems(problem, scalar=scalar)
        return EMS(order=2, statistics=statistics).compile(problem.schedule, start.grid)

    return method


METHODS: dict[str, Method] = {
    "untuned": lambda p, n, s, t: s.plan,
    "tune (the chain of auto)": lambda p, n, s, t: learn.tune(p, n, seconds=t),
    "Levenberg, grid and times": _levenberg(("grid", "times")),
    "Levenberg, all but scale": _levenberg(("grid", "times", "mix")),
    "Levenberg, all": _levenberg(("grid", "times", "mix", "scale")),
    "least squares": lambda p, n, s, t: learn.least_squares(s.plan, p),
    "least squares, free": lambda p, n, s, t: learn.least_squares(s.plan, p, free=True),
    "ld3": lambda p, n, s, t: learn.ld3(p, n, options=_descent(t)),
    "time_tuner": lambda p, n, s, t: learn.time_tuner(p, n, options=_descent(t)),
    "s4s": lambda p, n, s, t: learn.s4s(p, n, options=_descent(t)),
    "bns": lambda p, n, s, t: learn.bns(p, n, options=_descent(t)),
    "bespoke": lambda p, n, s, t: learn.bespoke(p, n, options=_descent(t)),
    "neural_solver": lambda p, n, s, t: learn.neural_solver(p, n, options=_descent(t)),
    "boss": lambda p, n, s, t: learn.boss(p.take(slice(0, 16)), n),
    "gits": lambda p, n, s, t: learn.gits(p.take(slice(0, 16)), n),
    "ays": lambda p, n, s, t: learn.ays(p.take(slice(0, 16)), n),
    "dc_search": _ratios,
    "ems, scalar": _statistics(True),
    "ems, a number a dimension": _statistics(False),
    "autodiffusion": lambda p, n, s, t: learn.autodiffusion(p.take(slice(0, 12)), n),
    "s3": lambda p, n, s, t: learn.s3(p.take(slice(0, 12)), s.grid).plan,
    "amed (even calls)": lambda p, n, s, t: learn.amed(p.take(slice(0, 24)), n, seconds=t),
}


def methods(name: str, nfe: int, options: argparse.Namespace) -> None:
    subject: Any
    if name == "mixture":
        subject = Mixture(7.5, 16)
        problem = _mixture(7.5, range(16, 80))
    else:
        subject = Subject(name, options.guidance, 16, options.work)
        problem = teacher(name, options.guidance, 56, options.work).problem()
    reference, about = subject.reference(REFERENCE), machine()
    start = learn.untuned(problem, nfe)[0]
    kept = options.work / f"learn-methods-{subject.name}-{nfe}-{options.images}.json"
    entries: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for label, method in METHODS.items():
        if label in entries or ("even" in label and nfe % 2):
            continue
        began = time.monotonic()
        made = method(problem, nfe, start, options.seconds)
        seconds = time.monotonic() - began
        plan = made if isinstance(made, SolverPlan) else start.solver.compile(problem.schedule, made)
        entries[label] = {"error": error(plan, subject, reference), "seconds": seconds}
        if options.images and isinstance(subject, Subject):
            folder = options.work / f"learn-methods-{subject.name}-{nfe}" / label
            plan.save(folder.with_suffix(".json"))
            run = f"PlanScheduler(plan={str(folder.with_suffix('.json'))!r})"
            entries[label] |= scores(subject, run, nfe, options.images, folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(entries))
        print(f"{subject.name} {nfe} {label}: {entries[label]['error']:.4f}, {seconds:.0f} s", flush=True)
    entries = {label: entries[label] for label in METHODS if label in entries}
    body = {
        "model": subject.name,
        "calls": nfe,
        "start": f"{start.solver} on {start.grid.name}",
        "entries": entries,
        "machine": about,
    }
    untuned = entries["untuned"]["error"]
    rows = [
        (k, f"{e['error']:.4f}", f"{e['error'] / untuned:.2f}", *cells(e), f"{e['seconds']:.0f}")
        for k, e in entries.items()
    ]
    page = (
        f"# Every method on {subject.name}, {nfe} calls\n\n"
        + table(("method", "error", "of untuned", *SCORES.values(), "seconds"), rows)
        + f"\nAll start from {body['start']}; grids are used with its solver. Mean RMS error on 16 seeds that no method saw; "
        f"at most {options.seconds:g} seconds each{f'; FID over {options.images} images' if options.images else ''}.\n\n"
        + provenance(about)
    )
    write(options.out, f"methods-{subject.name}-{nfe}", body, page)


# -- predicted ratios -------------------------------------------------------------------------------------------------
SEARCHED = ((6, 8, 10, 12), (1.5, 2.0, 3.0, 4.0))
PREDICTED = ((7, 9, 11), (1.75, 2.5, 3.5))


def cascade(options: argparse.Namespace) -> None:
    about = machine()

    def searched(nfe: int, problem: learn.Problem) -> tuple[float, ...]:
        return learn.dc_search(problem.take(slice(0, 10)), _even(problem, nfe))

    def curve(nfe: int, problem: learn.Problem, start: tuple[float, ...] | None = None) -> tuple[float, ...]:
        return learn.dc_curve(problem.take(slice(0, 10)), _even(problem, nfe), start=start)

    def mean(nfe: int, problem: learn.Problem, ratios: tuple[float, ...] | None) -> float:
        plan = DCSolver(UniPC(), ratios).compile(problem.schedule, _even(problem, nfe))
        return float(learn.error(plan, problem.take(slice(10, 26))).mean())

    known = {g: _mixture(g) for g in SEARCHED[1]}
    table_of: dict[tuple[int, float], tuple[float, ...]] = {}
    for n in sorted(SEARCHED[0], reverse=True):  # every curve from its neighbour's
        for g, problem in known.items():
            near = [k for k in ((n, _before(SEARCHED[1], g)), (_before(SEARCHED[0][::-1], n), g)) if k in table_of]
            table_of[n, g] = curve(n, problem, table_of[near[0]] if near else None)
    fitted = learn.Cascade.fit(table_of)
    entries = []
    for g in PREDICTED[1]:
        problem = _mixture(g)
        for n in PREDICTED[0]:
            plain, found = mean(n, problem, None), mean(n, problem, searched(n, problem))
            entries.append(
                {
                    "calls": n,
                    "guidance": g,
                    "unipc": plain,
                    "searched": found,
                    "curve": mean(n, problem, curve(n, problem)),
                    "predicted": mean(n, problem, fitted.predict(n, g)),
                }
            )
    rows = []
    for e in entries:
        gain = e["unipc"] - e["curve"]
        share = f"{100 * (e['unipc'] - e['predicted']) / gain:.0f} %" if gain > 0.05 * e["unipc"] else "–"
        errors = (f"{e[k]:.4f}" for k in ("unipc", "searched", "curve", "predicted"))
        rows.append((f"{e['calls']}", f"{e['guidance']:g}", *errors, share))
    page = (
        "# DC-Solver's ratios, predicted, on the mixture\n\n"
        + table(
            ("calls", "guidance", "UniPC", "searched ratios", "searched curve", "predicted curve", "of its gain"), rows
        )
        + "\nMean RMS error on 16 noises that no search saw; the cascade was fitted at calls "
        f"{SEARCHED[0]} and guidance {SEARCHED[1]}. A dash: the curve gains less than 5 %.\n\n{provenance(about)}"
    )
    write(options.out, "cascade", {"searched": SEARCHED, "entries": entries, "machine": about}, page)


def _mixture(guidance: float, seeds: range = range(26)) -> learn.Problem:
    """That of benchmarks/subjects.py, with gradients to the time."""
    subject = Mixture(guidance, seeds.stop)
    schedule = NoiseSchedule.from_config(subject.config)
    model = GaussianMixture.random(8, 64, seed=0).guided(schedule, [0], guidance)
    return learn.solve(lambda x, t, which: model(x, t), schedule, subject.noise[list(seeds)], steps=96)


def _before(values: Sequence[Any], value: Any) -> Any:
    """The one before ``value``; of the first, itself."""
    return values[max(0, values.index(value) - 1)]


def _even(problem: learn.Problem, nfe: int) -> Grid:
    return Grid.uniform_lambda(problem.schedule, nfe, terminal="zero")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=sorted(pipelines.models()))
    parser.add_argument("--calls", nargs="+", type=int)
    parser.add_argument("--images", type=int, default=0, help="for FID; 0 measures latents only (%(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="of the conditional models (%(default)s)")
    parser.add_argument("--ship", action="store_true", help="learn the plans that are not there yet")
    parser.add_argument("--from", dest="source", help="the embedded model whose plans to start from")
    parser.add_argument("--minutes", type=float, default=15.0, help="a plan, with --ship (%(default)s)")
    parser.add_argument("--trajectories", type=int, default=100, help="with --ship; 20 of them held out (%(default)s)")
    parser.add_argument("--methods", action="store_true", help="compare the methods instead")
    parser.add_argument("--seconds", type=float, default=120.0, help="a method, with --methods (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path(".cache/baseline"))
    parser.add_argument("--out", type=Path, default=RESULTS / "learn")
    parser.add_argument("--cascade", action="store_true", help="compare predicted with searched ratios of DC-Solver")
    options = parser.parse_args()
    if options.cascade:
        cascade(options)
        return
    if options.ship:
        ship(options)
        return
    for name in options.model:
        if options.methods:
            for nfe in options.calls or (5,):
                methods(name, nfe, options)
        else:
            compare(name, options)


if __name__ == "__main__":
    main()
