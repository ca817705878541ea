"""What caches cost in quality: every method here and its peers on the same model, scheduler, prompts and seeds.

    python benchmarks/caching_quality.py [--model NAME ...] [--steps 20] [--only WORD ...] [--fid 1000] [--fid-of all]
    python benchmarks/caching_quality.py --calibrate 0.5 [--fit dp router erta] [--model NAME ...] [--steps 20] [--at SITE ...]

An arm draws the images of --seeds seeds with DPM-Solver++ 2M and guidance 2 (none for the pixel model). Its MACs are those of
the network calls that really ran; its error is the RMS difference of the final latents to those of the same seeds without a
cache, mean and worst; PSNR is of the images. Nothing was fitted to these prompts and seeds. With --fid the main contenders
draw that many images more, with --fid-of all every arm.

Plans are calibrated apart and kept beside the results; every plan file there is an arm. --fit says which: `dp` is the search
of DPCache, NAME-STEPS-50.json for half of the MACs; `router` trains gates of attention and feed-forwards as HarmoniCa does,
NAME-STEPS-router.json; `l2c` as Learning-to-Cache does; `ertacache` shortens steps too where the model is a flow, and is drawn on
that grid. Each arm's numbers and each chunk of
images are kept in --work, so that a killed run goes on, and a new method is one more arm. Peers that are not installed, or
fail, are named with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from caching_arms import OUT, PLANS, UNUSED, arms, full, plans
from caching_pages import PLAN, page, picture
from caching_peers import Peer
from record import machine, write
from torch import Tensor

from fewstep import caching, pipelines, samplers
from fewstep import eval as evaluation
from fewstep.artifact import write_bytes
from fewstep.errors import FewstepError
from fewstep.eval.drawing.batch import draw
from fewstep.eval.pairs.latents import capture_latents, latent_rmse
from fewstep.eval.pairs.pixels import psnr
from fewstep.pipelines import zoo

UNCACHED = "uncached"


class Subject:
    """A model with the scheduler, prompts and seeds of the comparison."""

    def __init__(self, name: str, steps: int, seeds: int, guidance: float, work: Path) -> None:
        self.name, self.steps, self.seeds = name, steps, seeds
        self.pipe = pipelines.load(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = samplers.make_scheduler("DPMSolver", self.pipe.scheduler.config)
        self.prompts = zoo.prompts(name)
        self.guidance = guidance if any(self.prompts) else 1.0
        self.work = work / f"{name}-{steps}-g{self.guidance:g}"
        self.work.mkdir(parents=True, exist_ok=True)

    @property
    def unet(self) -> bool:
        return hasattr(self.pipe, "unet")

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Images and latents of the seeds from ``first`` on, as the pipeline is now."""
        seeds = range(first, first + count)
        prompts = [self.prompts[(UNUSED + seed) % len(self.prompts)] for seed in seeds]
        with capture_latents(self.pipe) as captured, torch.no_grad():
            images = draw(self.pipe, prompts, seeds, steps=self.steps, guidance=self.guidance)
        return images, captured.latents(count)

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor, int, float]:
        """Images, latents, MACs and seconds of computing everything."""
        return self.run(full)

    def run(self, arm: Peer) -> tuple[Tensor, Tensor, int, float]:
        """Half of the seeds with MACs counted, the other half timed: the counter watches every operator."""
        half = self.seeds // 2
        with arm(self.pipe, self.steps) as reset:
            reset()
            with evaluation.MacCounter(self.pipe) as counter:
                counted = self.batch(0, half)
            reset()
            begin = time.process_time()
            timed = self.batch(half, half)
            seconds = time.process_time() - begin
        images, latents = (torch.cat(pair) for pair in zip(counted, timed, strict=True))
        return images, latents, counter.executed, seconds


def cell(subject: Subject, name: str, arm: Peer) -> dict[str, Any]:
    """The numbers of one arm, or why there are none."""
    images, latents, macs, seconds = subject.reference
    try:
        with torch.random.fork_rng():
            drawn = subject.run(arm)
    except Exception as error:  # whatever a peer raises, or a method that the model has no sites for
        return {"arm": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    errors = latent_rmse(drawn[1], latents)
    return {
        "arm": name,
        "macs": drawn[2] / macs,
        "cpu_time": drawn[3] / seconds,
        "latent_rms": float(errors.mean()),
        "latent_rms_worst": float(errors.max()),
        "psnr": float(np.mean(np.minimum(psnr(drawn[0], images), 99.0))),
    }


def key_of(subject: Subject, name: str) -> str:
    """What an arm's results are kept under: its name and, where a plan file is in it, what that plan does."""
    digests = [plan.digest for title, plan in plans(subject).items() if name.startswith(title)]
    return hashlib.sha256("".join([name, *digests]).encode()).hexdigest()[:12]


def measured(subject: Subject, only: Sequence[str], again: bool) -> list[dict[str, Any]]:
    """Every arm's cell, those of earlier runs from their files."""
    found = []
    for name, arm in arms(subject).items():
        path = subject.work / f"{key_of(subject, name)}-{subject.seeds}.json"
        if (again or not path.exists()) and any(word in name for word in only):
            entry = cell(subject, name, arm)
            write_bytes(path, json.dumps(entry).encode())
            print(json.dumps(entry), flush=True)
        if path.exists():
            found.append(json.loads(path.read_text()))
    return found


# -- distribution ----------------------------------------------------------------------------------------------------------


CHUNK = 50


def pictures(subject: Subject, name: str, arm: Peer, count: int) -> Tensor:
    """So many images of an arm, in chunks that are kept."""
    key = key_of(subject, name)
    with arm(subject.pipe, subject.steps) as reset:
        chunks = []
        for first in range(0, count, CHUNK):
            path = subject.work / f"{key}-images-{first}.pt"
            if not path.exists():
                reset()
                torch.save(subject.batch(1000 + first, CHUNK)[0], path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
            chunks.append(torch.load(path, weights_only=True))
    return torch.cat(chunks)


def distributions(
    subject: Subject, entries: list[dict[str, Any]], count: int, chosen: Sequence[str]
) -> list[dict[str, Any]]:
    """FID and class accuracy of the contenders, and how much FID rises over that of computing everything."""
    found: list[dict[str, Any]] = []
    known = {UNCACHED: full} | arms(subject)
    prompts = [subject.prompts[(UNUSED + 1000 + i) % len(subject.prompts)] for i in range(count)]
    features: dict[str, np.ndarray[Any, Any]] = {}
    for name in (UNCACHED, *chosen):
        images = pictures(subject, name, known[name], count)
        features[name] = evaluation.image_features(images).values.double().numpy()
        rise = {} if name == UNCACHED else fid_rise(features[name], features[UNCACHED])
        asked = ["fid", *(["accuracy"] if any(subject.prompts) else [])]
        scores = evaluation.measure_images(images, asked, prompts=prompts if any(subject.prompts) else ()).scores
        found.append({"arm": name, **{k: s.value for k, s in scores.items()}, **rise})
        print(json.dumps(found[-1]), flush=True)
    return found


def fid_rise(cached: np.ndarray[Any, Any], uncached: np.ndarray[Any, Any], blocks: int = 20) -> dict[str, float]:
    """FID(cached) - FID(uncached) as a share of the latter, with its 95 % interval from a jackknife.

    Both are of the same prompts and seeds, and blocks of these are left out together: what the seeds' choice does to both
    cancels.
    """
    from scipy.stats import t

    from fewstep.eval.distribution.collect import Need
    from fewstep.eval.distribution.features import feature_net
    from fewstep.eval.distribution.frechet import frechet_distance, sqrt_factor
    from fewstep.eval.distribution.moments import Moments
    from fewstep.eval.distribution.reference import reference_moments

    reference = reference_moments("fashion-test", Need(feature_net("fashion"), "features"))
    factor = sqrt_factor(reference.covariance)

    def rise(rows: np.ndarray[Any, Any]) -> float:
        one, other = (
            frechet_distance(reference, Moments.of(torch.from_numpy(f[rows])), factor=factor)
            for f in (cached, uncached)
        )
        return one / other - 1

    index = np.arange(len(cached))
    block = index * blocks // len(cached)
    left = np.array([rise(index[block != b]) for b in range(blocks)])
    error = np.sqrt((blocks - 1) / blocks * ((left - left.mean()) ** 2).sum()) * t.ppf(0.975, blocks - 1)
    value = rise(index)
    return {"fid_rise": value, "fid_rise_low": value - error, "fid_rise_high": value + error}


def contenders(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Our calibrated plan at half the MACs, and of every peer the setting whose MACs are nearest, the better one of equals."""
    done = {e["arm"]: e for e in entries if "macs" in e}
    if PLAN not in done:
        return []
    chosen = [PLAN]
    for family in ("DeepCache 0.1.1", "diffusers TaylorSeer", "diffusers FirstBlockCache", "diffusers PAB"):
        own = [e for name, e in done.items() if name.startswith(family)]
        if own:
            off = [(abs(e["macs"] - done[PLAN]["macs"]), e["latent_rms"]) for e in own]
            chosen.append(own[off.index(min(off))]["arm"])
    return chosen


FITS = ("dp", "router", "l2c", "ertacache")


def fits(subject: Subject, budget: float, at: Sequence[str], refine: int) -> dict[str, Any]:
    """What can be calibrated, by name."""
    sites, flow = tuple(at) or None, bool(subject.pipe.scheduler.config.get("use_flow_sigmas"))
    return {
        "dp": caching.DPCache(budget=budget, at=sites, refine=refine),
        "router": caching.Router(budget=budget, at=sites),
        "l2c": caching.Router(budget=budget, scheme="l2c", at=sites),
        "ertacache": caching.ERTACache(budget=budget, adjust=flow),
    }


def plan_path(subject: Subject, kind: str, budget: float) -> Path:
    """Where a plan is kept: its word is the share of the MACs, in per cent, and the kind where it is another than the search."""
    share = f"{round(100 * budget)}"
    word = share if kind == "dp" else kind if share == "50" else f"{kind}{share}"
    return PLANS / f"{subject.name}-{subject.steps}-{word}.json"


def calibrate(subject: Subject, kind: str, method: Any, samples: int, batch: int) -> None:
    """Make the plan file of a method, unless there is one."""
    path = plan_path(subject, kind, method.budget)
    if path.exists():
        return
    begin = time.process_time()
    try:
        plan = caching.calibrate(
            subject.pipe, method, subject.prompts[:UNUSED], num_inference_steps=subject.steps, guidance_scale=subject.guidance,
            samples=samples, held_out=8, batch=batch, progress=False,
        )  # fmt: skip
    except FewstepError as error:  # no such branches, a budget that cannot be kept
        print(f"{path.stem}: {error}", flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    print(plan, f"{time.process_time() - begin:.0f} s of CPU time", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["fashion-sd", "fashion-dit", "fashion-flow", "fashion-pixel"])
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--seeds", type=int, default=16, help="even (%(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--only", nargs="*", default=[""], help="arms whose name has one of these")
    parser.add_argument("--again", action="store_true", help="also those that are measured")
    parser.add_argument("--fid", type=int, default=0, help=f"images for FID, a multiple of {CHUNK}")
    parser.add_argument("--fid-of", choices=("contenders", "all"), default="contenders")
    parser.add_argument("--calibrate", type=float, help="make the plan of this share of the MACs instead")
    parser.add_argument("--fit", nargs="+", default=["dp"], choices=FITS, help="what is calibrated")
    parser.add_argument(
        "--at", nargs="*", default=(), help="sites to choose from in calibration (the family's usual ones)"
    )
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--refine", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path(".cache/caching"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.model:
        for steps in asked.steps:
            subject = Subject(name, steps, asked.seeds, asked.guidance, asked.work)
            if asked.calibrate:
                for kind, method in fits(subject, asked.calibrate, asked.at, asked.refine).items():
                    if kind in asked.fit:
                        calibrate(subject, kind, method, asked.samples, asked.batch)
                continue
            about = machine()
            entries = measured(subject, asked.only, asked.again)
            wanted = {"contenders": contenders, "all": lambda found: [e["arm"] for e in found if "macs" in e]}
            chosen = wanted[asked.fid_of](entries) if asked.fid else []
            body = {
                "model": name,
                "steps": steps,
                "guidance": subject.guidance,
                "seeds": asked.seeds,
                "images": asked.fid,
                "arms": entries,
                "distribution": distributions(subject, entries, asked.fid, chosen) if chosen else [],
                "machine": about,
            }
            write(OUT, f"{name}-{steps}", body, page(body))
            picture(OUT)


if __name__ == "__main__":
    main()
