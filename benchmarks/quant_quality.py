"""What each method costs in quality on the embedded models: same seeds with and without quantisation.

    python benchmarks/quant_quality.py [--models fashion-dit-small fashion-sd] [--images 256] [--steps 20] [--methods NAME ...]

Every method is calibrated on a trajectory of other seeds, then draws the images of the same seeds as the float network. PSNR
and latent RMS are against those; FID is of N images against the test images and has its bias, so it is to be read beside the
float network's FID at the same N. Bytes are of the file. Goes on where it was: finished rows are kept in the results.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, machine, provenance, table, write
from torch import Tensor

from fewstep import eval as evaluation
from fewstep import pipelines, quant
from fewstep.eval.costs.calls import denoisers
from fewstep.eval.drawing.batch import borrowed
from fewstep.pipelines import zoo
from fewstep.quant.methods.base import Method

SEEDS = 10_000
"""Calibration draws the seeds from here on, far from those that are judged."""

METHODS: dict[str, Callable[[], Method]] = {
    "Int8": quant.Int8,
    "W4A4 naive": quant.Int4,
    "W4A4 SVDQuant r8": lambda: quant.SVDQuant(rank=8, grid=8, iterations=10),
    "W4A8 int": quant.W4A8,
    "W4A8 GPTQ": quant.GPTQ,
    "W4A8 float (FPQuant)": lambda: quant.FPQuant(steps=60),
    "MixDQ 5 bits": lambda: quant.MixDQ(budget=5.0, splits=5, finalists=2),
    "MixDQ 5 bits GPTQ": lambda: quant.MixDQ(budget=5.0, splits=5, finalists=2, gptq=True),
    "W4A8 AdaQuant": lambda: quant.AdaQuant(steps=60),
    "W4A4 SVDQuant r32": lambda: quant.SVDQuant(rank=32, grid=8, iterations=10),
    "W4A4 SVDQuant r0": lambda: quant.SVDQuant(rank=0, grid=8),
    "W4A4 SVDQuant r8 GPTQ": lambda: quant.SVDQuant(rank=8, grid=8, iterations=10, gptq=True),
    "W4A4 EfficientDM": lambda: quant.EfficientDM(iterations=300),
    "W4A4 QuEST": lambda: quant.QuEST(iterations=300),
    "FP8": quant.FP8,
    "NVFP4 naive": quant.FP4,
    "NVFP4 SVDQuant r8": lambda: quant.SVDQuant("nvfp4", "nvfp4", rank=8, grid=8, iterations=10),
    "W2A8 two signs": lambda: quant.Binary(bases=2),
    "W2A8 BinaryDM": lambda: quant.BinaryDM(iterations=300),
    "W2 BitsFusion": lambda: quant.BitsFusion(iterations=300),
}


class Judge:
    """One model: its float images and latents, and what a quantised network's are worth beside them."""

    def __init__(self, name: str, images: int, steps: int, guidance: float, batch: int) -> None:
        self.name, self.count, self.steps, self.guidance, self.batch = name, images, steps, guidance, batch
        self.pipe = pipelines.load(name)
        self.prompts = zoo.prompts(name)
        self.network = denoisers(self.pipe)[0]
        self.reference = self.draw()

    def draw(self) -> tuple[Tensor, Tensor]:
        pictures, latents = [], []
        with borrowed(self.pipe):
            for start in range(0, self.count, self.batch):
                seeds = range(start, min(start + self.batch, self.count))
                wanted = [self.prompts[i % len(self.prompts)] for i in seeds]
                with evaluation.capture_latents(self.pipe) as captured:
                    made = evaluation.draw(self.pipe, wanted, seeds, steps=self.steps, guidance=self.guidance)
                pictures.append(made)
                latents.append(captured.latents(len(made)))
        return torch.cat(pictures), torch.cat(latents)

    def calls(self) -> list[quant.Call]:
        return quant.record(
            self.pipe, self.prompts[5000:5008] or self.prompts, num_inference_steps=self.steps, samples=8,
            guidance=self.guidance, seed=SEEDS, keep=4,
        )  # fmt: skip

    def scores(self, images: Tensor, latents: Tensor) -> dict[str, float]:
        pairs = evaluation.fidelity(images, self.reference[0], latents=(latents, self.reference[1]))
        spread = float(self.reference[1].std())
        return {
            "psnr": float(np.mean(np.minimum(pairs["psnr"].values, 99.0))),
            "latent_rms": float(np.mean(pairs["latent_rmse"].values)) / spread,
            "fid": float(evaluation.fid(images)),
        }

    def row(self, method: str) -> dict[str, Any]:
        calls = self.calls()
        report = quant.quantize_(self.network, METHODS[method](), calls, rows=1024)
        with tempfile.TemporaryDirectory() as folder:
            quant.save(self.network, folder)
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        try:
            found = self.scores(*self.draw())
        finally:
            quant.dequantize_(self.network)
        sqnr = [value for value in report.weight_sqnr.values() if math.isfinite(value)]
        return {
            "model": self.name, "method": method, "bits": report.bits, "bytes": size,
            "of_16_bits": size / report.plan.float_bytes, "minutes": report.seconds / 60, "weight_sqnr": float(np.mean(sqnr)),
            "output_sqnr": -20 * math.log10(report.output_error or 1e-9), **found,
        }  # fmt: skip


def page(rows: list[dict[str, Any]], about: dict[str, Any], what: str) -> str:
    head = (
        "method", "bits", "MB", "of 16 bits", "calibration min", "weight SQNR dB", "output SQNR dB", "PSNR dB", "latent RMS",
        "FID",
    )  # fmt: skip
    parts = [f"# Quality of quantised networks\n\n{what}\n"]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [
            [
                r["method"], f"{r['bits']:.2f}", f"{r['bytes'] / 1e6:.2f}", f"{r['of_16_bits']:.3f}", f"{r['minutes']:.1f}",
                f"{r['weight_sqnr']:.1f}", f"{r['output_sqnr']:.1f}", f"{r['psnr']:.2f}",
                f"{r['latent_rms']:.4f}", f"{r['fid']:.3f}",
            ]
            if "psnr" in r
            else [r["method"], "16", "–", "1", "–", "–", "–", "–", "0", f"{r['fid']:.3f}"]
            for r in rows
            if r["model"] == model
        ]  # fmt: skip
        parts.append(f"\n## {model}\n\n" + table(head, cells))
    return "".join(parts) + "\n" + provenance(about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fashion-dit-small", "fashion-sd"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--images", type=int, default=128)
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
        rows = before["rows"]
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
                row: dict[str, Any] = {
                    "model": name,
                    "method": method,
                    "fid": float(evaluation.fid(judge.reference[0])),
                }
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
