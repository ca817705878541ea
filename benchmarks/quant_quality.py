"""What each method costs in quality on the embedded models: same seeds with and without quantisation.

    python benchmarks/quant_quality.py [--models fashion-dit-small fashion-sd] [--methods NAME ...] [--redo NAME ...]

Every method is calibrated on a trajectory of other seeds, then draws the images of the same seeds as the float network. PSNR
and latent RMS are against those; FID is of N images against the test images and has its bias, so it is to be read beside the
float network's FID at the same N. Bytes are of the file. Methods that train are compared with the row that they start from.
Goes on where it was: finished rows are kept in the results.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, machine, provenance, table, write
from torch import Tensor

from fewstep import caching, pipelines, quant
from fewstep import eval as evaluation
from fewstep.eval.costs.calls import denoisers
from fewstep.eval.drawing.batch import borrowed
from fewstep.pipelines import zoo
from fewstep.quant.methods.base import Method
from fewstep.quant.state import RECORD, float_inside

AGAINST_DATA = {"fid": 3, "clip_score": 2, "accuracy": 1}
"""Scores that need no float image, and their digits."""
SEEDS = 10_000
"""Calibration draws the seeds from here on, far from those that are judged."""


@dataclass(frozen=True)
class Arm:
    """A method, and what is done beside it.

    Attributes:
        make: the config.
        start: the row that it has to beat.
        samples, keep: of its calibration trajectory; training needs more samples than rounding.
        before: what is done to the float network, with its calls; undone when the context closes.
        while_drawing: what is on while images are drawn.
    """

    make: Callable[[], Method]
    start: str | None = None
    samples: int = 8
    keep: int | None = 4
    before: Callable[[Judge, list[quant.Call]], AbstractContextManager[None]] | None = None
    while_drawing: Callable[[Judge, list[quant.Call]], AbstractContextManager[None]] | None = None


def from_trajectories(make: Callable[[], Method], start: str | None = None) -> Arm:
    return Arm(make, start, samples=32, keep=None)


@contextmanager
def folded(judge: Judge, calls: list[quant.Call], centre: bool = False) -> Iterator[None]:
    quant.fold_smoothing_(judge.network, calls, centre=centre)
    try:
        yield
    finally:
        quant.unfold_smoothing_(judge.network)


@contextmanager
def corrected(judge: Judge, calls: list[quant.Call], by_channel: bool = True) -> Iterator[None]:
    quant.correct_(judge.network, quant.fit_correction(judge.network, calls, by_channel=by_channel))
    try:
        yield
    finally:
        quant.remove_correction_(judge.network)


@contextmanager
def ancestral(judge: Judge, calls: list[quant.Call], absorb: bool = False) -> Iterator[None]:
    """The stochastic sampler, compared with the float network's images by the same; PTQD's correction with ``absorb``."""
    from fewstep.samplers import DDIM, Grid, PlanScheduler
    from fewstep.samplers.schedule import NoiseSchedule

    scheduler, reference = judge.pipe.scheduler, judge.reference
    schedule = NoiseSchedule.from_config(scheduler.config)
    plan = DDIM(eta=1.0).compile(schedule, Grid.named("linspace", schedule, judge.steps))
    judge.pipe.scheduler = PlanScheduler.from_plan(plan, scheduler.config)
    with judge.floats():
        judge.reference = judge.draw()
        mine = judge.calls(8, 8)  # corrections belong to the sampler
    try:
        if absorb:
            correction = quant.fit_correction(judge.network, mine)
            quant.correct_(judge.network, correction)
            quiet = correction.absorbed(plan, guidance=judge.guidance)
            judge.pipe.scheduler = PlanScheduler.from_plan(quiet, scheduler.config)
        yield
    finally:
        quant.remove_correction_(judge.network)
        judge.pipe.scheduler, judge.reference = scheduler, reference


@contextmanager
def cached(judge: Judge, calls: list[quant.Call], joint: bool = False) -> Iterator[None]:
    """Half of the network's work skipped by a plan that was fitted to the float network, or to both (CacheQuant)."""
    prompts = judge.prompts[5000:5016] or judge.prompts
    with borrowed(judge.pipe), judge.floats():
        plan = caching.calibrate(
            judge.pipe, caching.DPCache(budget=0.5, refine=0), prompts, num_inference_steps=judge.steps,
            guidance_scale=judge.guidance, samples=16, held_out=4, seed=SEEDS, progress=False,
        )  # fmt: skip
    if joint:
        plan = quant.fit_cache(judge.pipe, plan, prompts, guidance_scale=judge.guidance, samples=16, seed=SEEDS)
    with caching.applied(judge.pipe, plan):
        yield


TIMES = {"activation": "zint4:tensor", "times": 20}
METHODS: dict[str, Arm] = {
    "Int8": Arm(quant.Int8),
    "W4A4 naive": Arm(quant.Int4),
    "W4A4 SVDQuant r8": Arm(lambda: quant.SVDQuant(rank=8, grid=8, iterations=10), "W4A4 naive"),
    "W4A8 int": Arm(quant.W4A8),
    "W4A8 GPTQ": Arm(quant.GPTQ, "W4A8 int"),
    "W4A8 float (FPQuant)": Arm(lambda: quant.FPQuant(steps=60), "W4A8 int"),
    "MixDQ 5 bits": Arm(quant.MixDQ),
    "MixDQ 5 bits GPTQ": Arm(lambda: quant.MixDQ(gptq=True), "MixDQ 5 bits"),
    "W4A8 AdaQuant": Arm(lambda: quant.AdaQuant(steps=60), "W4A8 int"),
    "W4A4 SVDQuant r32": Arm(lambda: quant.SVDQuant(rank=32, grid=8, iterations=10), "W4A4 naive"),
    "W4A4 SVDQuant r0": Arm(lambda: quant.SVDQuant(rank=0, grid=8), "W4A4 naive"),
    "W4A4 SVDQuant r8 GPTQ": Arm(lambda: quant.SVDQuant(rank=8, grid=8, iterations=10, gptq=True), "W4A4 SVDQuant r8"),
    "W4A4 SVDQuant r32 GPTQ": Arm(
        lambda: quant.SVDQuant(rank=32, grid=8, iterations=10, gptq=True), "W4A4 SVDQuant r32"
    ),
    "W4A4 EfficientDM": from_trajectories(quant.EfficientDM, "W4A4 naive"),
    "W4A4 QuEST": from_trajectories(quant.QuEST, "W4A4 naive"),
    "W4A4 by time, start": from_trajectories(lambda: quant.EfficientDM(iterations=0, **TIMES)),
    "W4A4 by time, EfficientDM": from_trajectories(lambda: quant.EfficientDM(**TIMES), "W4A4 by time, start"),
    "W4A4 embeddings, start": from_trajectories(lambda: quant.QuEST(iterations=0, embeddings=True)),
    "W4A4 embeddings, QuEST": from_trajectories(lambda: quant.QuEST(embeddings=True), "W4A4 embeddings, start"),
    "W4A8 embeddings, start": from_trajectories(lambda: quant.TFMQ(iterations=0)),
    "W4A8 embeddings, TFMQ": from_trajectories(quant.TFMQ, "W4A8 embeddings, start"),
    "W4A4 folded into AdaLN": Arm(quant.Int4, "W4A4 naive", before=folded),
    "W4A4 folded, centred": Arm(quant.Int4, "W4A4 naive", before=partial(folded, centre=True)),
    "W4A4 AdaLog": Arm(quant.AdaLog, "W4A4 naive"),
    "W4A4 log sqrt 2 (RepQ)": Arm(lambda: quant.AdaLog(steps=(8,)), "W4A4 naive"),
    "W4A4 corrected": Arm(quant.Int4, "W4A4 naive", while_drawing=corrected),
    "W4A4 ancestral": Arm(quant.Int4, while_drawing=ancestral),
    "W4A4 ancestral, PTQD": Arm(quant.Int4, "W4A4 ancestral", while_drawing=partial(ancestral, absorb=True)),
    "W4A8 cached": Arm(quant.W4A8, while_drawing=cached),
    "W4A8 cached, CacheQuant": Arm(quant.W4A8, "W4A8 cached", while_drawing=partial(cached, joint=True)),
    "Int8 static": from_trajectories(lambda: quant.Int8(static=True)),
    "Int8 static by time": from_trajectories(lambda: quant.Int8(static=True, times=20), "Int8 static"),
    "FP8": Arm(quant.FP8),
    "W6 float (FP6)": Arm(quant.FP6),
    "MXFP6": Arm(lambda: quant.FP6.of("mxfp6")),
    "NVFP4 naive": Arm(quant.FP4),
    "NVFP4 SVDQuant r8": Arm(lambda: quant.SVDQuant("nvfp4", "nvfp4", rank=8, grid=8, iterations=10), "NVFP4 naive"),
    "W2A8 two signs": Arm(lambda: quant.Binary(bases=2)),
    "W2A8 BinaryDM": from_trajectories(quant.BinaryDM, "W2A8 two signs"),
    "W2 balanced, start": Arm(lambda: quant.BitsFusion(iterations=0)),
    "W2 BitsFusion": from_trajectories(quant.BitsFusion, "W2 balanced, start"),
    "W2 BitsFusion, stage II": from_trajectories(lambda: quant.BitsFusion(second=150), "W2 balanced, start"),
}


class Judge:
    """One model: its float images and latents, and what a quantised network's are worth beside them."""

    def __init__(self, name: str, images: int, steps: int, guidance: float, batch: int) -> None:
        self.name, self.count, self.steps, self.guidance, self.batch = name, images, steps, guidance, batch
        self.pipe = pipelines.load(name)
        self.prompts = zoo.prompts(name)
        self.network = denoisers(self.pipe)[0]
        self.reference = self.draw()

    def floats(self) -> AbstractContextManager[None]:
        """The quantised network with its float layers inside."""
        record: Any = getattr(self.network, RECORD)
        return float_inside(self.network, record)

    def draw(self) -> tuple[Tensor, Tensor]:
        pictures, latents = [], []
        with borrowed(self.pipe):
            for start in range(0, self.count, self.batch):
                seeds = range(start, min(start + self.batch, self.count))
                with evaluation.capture_latents(self.pipe) as captured:
                    made = evaluation.draw(
                        self.pipe, self.wanted(seeds), seeds, steps=self.steps, guidance=self.guidance
                    )
                pictures.append(made)
                latents.append(captured.latents(len(made)))
        return torch.cat(pictures), torch.cat(latents)

    def wanted(self, seeds: range) -> list[str]:
        return [self.prompts[seed % len(self.prompts)] for seed in seeds]

    def calls(self, samples: int, keep: int | None) -> list[quant.Call]:
        return quant.record(
            self.pipe, self.prompts[5000 : 5000 + samples] or self.prompts, num_inference_steps=self.steps,
            samples=samples, guidance=self.guidance, seed=SEEDS, keep=keep,
        )  # fmt: skip

    def scores(self, images: Tensor, latents: Tensor) -> dict[str, float]:
        pairs = evaluation.fidelity(images, self.reference[0], latents=(latents, self.reference[1]))
        spread = float(self.reference[1].std())
        return {
            "psnr": float(np.mean(np.minimum(pairs["psnr"].values, 99.0))),
            "latent_rms": float(np.mean(pairs["latent_rmse"].values)) / spread,
            **self.against_data(images),
        }

    def against_data(self, images: Tensor) -> dict[str, float]:
        """FID to the test images and, where there are prompts, how well the images keep to them."""
        wanted = self.wanted(range(len(images)))
        metrics = ("fid", "clip_score", "accuracy") if any(wanted) else ("fid",)
        found = evaluation.measure_images(images, metrics, prompts=wanted)
        return {name: float(score) for name, score in found.scores.items()}

    def row(self, method: str) -> dict[str, Any]:
        arm = METHODS[method]
        calls = self.calls(arm.samples, arm.keep)
        with arm.before(self, calls) if arm.before else nullcontext():
            report = quant.quantize_(self.network, arm.make(), calls, rows=1024)
            with tempfile.TemporaryDirectory() as folder:
                quant.save(self.network, folder)
                size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
            try:
                with arm.while_drawing(self, calls) if arm.while_drawing else nullcontext():
                    found = self.scores(*self.draw())
            finally:
                quant.dequantize_(self.network)
        sqnr = [value for value in report.weight_sqnr.values() if math.isfinite(value)]
        return {
            "model": self.name, "method": method, "kept": report.findings.get("kept"), "bits": report.bits, "bytes": size,
            "of_16_bits": size / report.plan.float_bytes, "minutes": report.seconds / 60, "weight_sqnr": float(np.mean(sqnr)),
            "output_sqnr": -20 * math.log10(report.output_error or 1e-9), **found,
        }  # fmt: skip


def beats(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """By how much the latents are nearer than those of the row it starts from."""
    arm = METHODS.get(row["method"])
    start = next((r for r in rows if arm and r["model"] == row["model"] and r["method"] == arm.start), None)
    if start is None:
        return ""
    if row.get("kept") == "the start":
        return f"kept {start['method']}"
    gain = 20 * math.log10(start["latent_rms"] / row["latent_rms"])
    return f"{'yes' if gain > 0 else 'no'}, {gain:+.1f} dB to {start['method']}"


def against_data(row: dict[str, Any]) -> list[str]:
    return [f"{row[metric]:.{digits}f}" if metric in row else "–" for metric, digits in AGAINST_DATA.items()]


def page(rows: list[dict[str, Any]], about: dict[str, Any], what: str) -> str:
    head = (
        "method", "bits", "MB", "of 16 bits", "calibration min", "weight SQNR dB", "output SQNR dB", "PSNR dB", "latent RMS",
        "FID", "CLIP", "accuracy %", "beats its start",
    )  # fmt: skip
    parts = [f"# Quality of quantised networks\n\n{what}\n"]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [
            [
                r["method"], f"{r['bits']:.2f}", f"{r['bytes'] / 1e6:.2f}", f"{r['of_16_bits']:.3f}", f"{r['minutes']:.1f}",
                f"{r['weight_sqnr']:.1f}", f"{r['output_sqnr']:.1f}", f"{r['psnr']:.2f}",
                f"{r['latent_rms']:.4f}", *against_data(r), beats(r, rows),
            ]
            if "psnr" in r
            else [r["method"], "16", "–", "1", "–", "–", "–", "–", "0", *against_data(r), ""]
            for r in rows
            if r["model"] == model
        ]  # fmt: skip
        parts.append(f"\n## {model}\n\n" + table(head, cells))
    return "".join(parts) + "\n" + provenance(about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fashion-dit-small", "fashion-sd"])
    parser.add_argument("--methods", nargs="+", metavar="NAME", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--redo", nargs="+", default=[], help="methods whose finished rows are forgotten")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine()
    settings = {k: getattr(options, k) for k in ("images", "steps", "guidance")}
    kept = options.out / "quant_quality.json"
    rows: list[dict[str, Any]] = []
    if kept.exists() and (before := json.loads(kept.read_text()))["settings"] == settings:
        rows = [row for row in before["rows"] if row["method"] not in options.redo]
    what = (
        f"{options.images} images, {options.steps} steps, guidance {options.guidance:g}, same seeds as the float network. "
        "Latent RMS in standard deviations of the latents. FID of N images has its bias: compare with the first row."
    )
    for name in options.models:
        done = {row["method"] for row in rows if row["model"] == name}
        missing = [method for method in ("float", *options.methods) if method not in done]
        if not missing:
            continue
        judge = Judge(name, options.images, options.steps, options.guidance, options.batch)
        for method in missing:
            if method == "float":
                row: dict[str, Any] = {"model": name, "method": method, **judge.against_data(judge.reference[0])}
            else:
                row = judge.row(method)
            print(row, flush=True)
            rows.append(row)
            write(
                options.out,
                "quant_quality",
                {"machine": about, "settings": settings, "rows": rows},
                page(rows, about, what),
            )


if __name__ == "__main__":
    main()
