"""What diffusers' own schedulers reach on every embedded model: the baseline that everything here has to beat.

    python benchmarks/baseline.py [--model NAME ...] [--images 1000] [--fidelity 24] [--guidance 2] [--out FOLDER]

For every budget of network calls an image, all of diffusers' ODE schedulers that fit the model, with the options that users
turn, are compared by the RMS error of their latents to those of 1,000 steps from the same noise (for the pixel model, of its
samples). The best of them then draws the images that FID, class accuracy and CLIP score are measured on. With guidance a call
sees the batch twice; budgets count calls.

A scheduler gets the most steps whose calls stay within the budget (Heun's takes two a step, PNDM's one more than its steps).

The reference is diffusers' DPM-Solver++ 2M with 1,000 steps, see benchmarks/subjects.py. How far that is from 500 steps is
said beside each table: errors not well above it say nothing.

Images of a killed run are kept in --work, and the run goes on from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, machine, provenance, table, write
from rich.progress import track
from subjects import AS_FLOW, REFERENCE, Subject, affordable, quality

from fewstep import pipelines
from fewstep.eval.pairs.latents import latent_rmse

BUDGETS = (5, 8, 10, 20, 50)

_DPM = [f"DPMSolverMultistepScheduler(solver_order={order}" for order in (2, 3)]
DIFFUSION = (
    *(f"DDIMScheduler(timestep_spacing='{spacing}')" for spacing in ("leading", "trailing")),
    *(f"EulerDiscreteScheduler(timestep_spacing='{spacing}')" for spacing in ("linspace", "trailing")),
    "EulerDiscreteScheduler(use_karras_sigmas=True)",
    "HeunDiscreteScheduler()",
    "HeunDiscreteScheduler(use_karras_sigmas=True)",
    "LMSDiscreteScheduler()",
    "LMSDiscreteScheduler(use_karras_sigmas=True)",
    "PNDMScheduler(skip_prk_steps=True)",
    *(f"{dpm})" for dpm in _DPM),
    *(f"{dpm}, timestep_spacing='trailing')" for dpm in _DPM),
    *(f"{dpm}, use_karras_sigmas=True)" for dpm in _DPM),
    *(f"{dpm}, use_lu_lambdas=True)" for dpm in _DPM),
    f"{_DPM[0]}, solver_type='heun')",
    f"{_DPM[0]}, euler_at_final=True)",
    "DPMSolverSinglestepScheduler(solver_order=2)",
    "DPMSolverSinglestepScheduler(solver_order=3)",
    *(f"UniPCMultistepScheduler(solver_order={order})" for order in (2, 3)),
    *(f"UniPCMultistepScheduler(solver_order={order}, timestep_spacing='trailing')" for order in (2, 3)),
    *(f"UniPCMultistepScheduler(solver_order={order}, use_karras_sigmas=True)" for order in (2, 3)),
    *(f"DEISMultistepScheduler(solver_order={order})" for order in (2, 3)),
)
FLOW = (
    "FlowMatchEulerDiscreteScheduler()",
    "FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)",
    "FlowMatchEulerDiscreteScheduler(shift=2.0)",
    "FlowMatchHeunDiscreteScheduler()",
    *(f"{dpm}, {AS_FLOW})" for dpm in _DPM),
    *(f"UniPCMultistepScheduler(solver_order={order}, {AS_FLOW})" for order in (2, 3)),
    *(f"DEISMultistepScheduler(solver_order={order}, {AS_FLOW})" for order in (2, 3)),
)


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    model: str
    guidance: float
    budget: int
    scheduler: str
    steps: int
    latent_rmse: float
    second: str
    """The runner-up."""
    second_rmse: float
    scores: dict[str, float]
    images_per_second: float


def candidates(subject: Subject) -> tuple[str, ...]:
    """Specs of diffusers' schedulers for this model's process."""
    return tuple(f"diffusers:{spec}" for spec in (FLOW if subject.flow else DIFFUSION))


def ranked(subject: Subject, budget: int, reference: torch.Tensor) -> list[tuple[float, str, int]]:
    """Every candidate's mean error at ``budget`` calls, the best first; what fails or is not finite is left out."""
    found = []
    for spec in candidates(subject):
        steps = affordable(spec, subject.config, budget)
        if steps is None:
            continue
        try:
            error = float(np.mean(latent_rmse(subject.latents(spec, steps), reference)))
        except Exception as failure:
            print(f"  {spec} at {steps} steps: {failure}")
            continue
        found.append((error, spec, steps))
    return sorted(found)


def measured(subject: Subject, images: int) -> Iterator[Entry]:
    reference = subject.reference(REFERENCE)
    for budget in track(BUDGETS, subject.name):
        (error, spec, steps), (second_error, second, _), *_ = ranked(subject, budget, reference)
        row = quality(subject, spec, steps, images, subject.work / f"{subject.name}-{budget}")
        scores = {name: row.value(name) for name in ("fid", "clip_score", "accuracy")}
        yield Entry(
            subject.name, subject.guidance, budget, spec.removeprefix("diffusers:"), steps, error,
            second.removeprefix("diffusers:"), second_error,
            {name: float(value) for name, value in scores.items() if value is not None},
            1 / row.seconds_per_image if row.seconds_per_image else float("nan"),
        )  # fmt: skip


def page(body: dict[str, Any]) -> str:
    """The model's table for people."""
    header = ("calls", "best by latent RMS", "latent RMS", "runner-up", "FID", "accuracy %", "CLIP", "images/s")
    rows = []
    for entry in body["entries"]:
        scores = entry["scores"]
        cells = [
            f"{scores[key]:.{digits}f}" if key in scores else "–"
            for key, digits in (("fid", 2), ("accuracy", 1), ("clip_score", 2))
        ]
        best = f"`{entry['scheduler']}`, {entry['steps']} steps"
        second = f"{entry['second_rmse']:.4f} `{entry['second']}`"
        rows.append(
            (
                f"{entry['budget']}",
                best,
                f"{entry['latent_rmse']:.4f}",
                second,
                *cells,
                f"{entry['images_per_second']:.1f}",
            )
        )
    return (
        f"# diffusers' best scheduler on {body['model']}, guidance {body['guidance']:g}\n\n"
        + table(header, rows)
        + f"\nFID over {body['images']} images; mean error of the latents of {body['fidelity']} seeds, against a reference that "
        f"moves by {body['reference_error']:.5f} from 500 to 1,000 steps. How it is measured stands in `benchmarks/baseline.py`."
        "\n\n" + provenance(body["machine"])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=sorted(pipelines.models()))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--fidelity", type=int, default=24, help="seeds whose latents are compared (%(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="of the conditional models (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path(".cache/baseline"))
    parser.add_argument("--out", type=Path, default=RESULTS / "baseline")
    options = parser.parse_args()
    for name in options.model:
        subject = Subject(name, options.guidance, options.fidelity, options.work)
        about = machine()
        drift = float(np.mean(latent_rmse(subject.reference(REFERENCE // 2), subject.reference(REFERENCE))))
        entries = [asdict(entry) for entry in measured(subject, options.images)]
        body = {
            "model": name,
            "guidance": subject.guidance,
            "images": options.images,
            "fidelity": options.fidelity,
            "reference_error": drift,
            "entries": entries,
            "machine": about,
        }
        write(options.out, name, body, page(body))


if __name__ == "__main__":
    main()
