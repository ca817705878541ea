"""Every scheduler as it comes, with no option set, against DDIM in the same few calls.

    python benchmarks/defaults.py [--model NAME ...] [--calls 5 8] [--seeds 8] [--out FOLDER]

A number is the RMS error of the latents to 1,000 steps from the same noise, mean over the seeds, over that of DDIMScheduler:
above 1 a scheduler is worse than the simplest one. Schedulers are made from the model's own config, as pipelines do, so all
of a model's are on the same grid but for what differs by default between classes. The embedded models run at guidance 2, the
mixture of benchmarks/subjects.py at 7.5.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from record import RESULTS, machine, provenance, table, write
from rich.progress import track
from subjects import Mixture, Subject

from fewstep import pipelines
from fewstep.eval.pairs.latents import latent_rmse
from fewstep.samplers.specs import scheduler_names

SEEDS = 16
WITH_NOISE_OR_OWN_PROCESS = ("MeanReverting", "Restart")


def ratios(subject: Subject | Mixture, calls: int, seeds: int) -> dict[str, float]:
    """Each scheduler's error over DDIM's."""
    which = [*range(seeds)]
    reference = subject.reference()[which]
    names = [n for n in scheduler_names() if n not in WITH_NOISE_OR_OWN_PROCESS and (subject.flow or n != "Flow")]
    errors = {name: float(latent_rmse(subject.latents(name, calls, which), reference).mean()) for name in names}
    return {name: error / errors["DDIM"] for name, error in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["mixture", *sorted(pipelines.models())])
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 8])
    parser.add_argument(
        "--seeds", type=int, default=8, help=f"of the {SEEDS} that references are made for (%(default)s)"
    )
    parser.add_argument("--references", type=Path, default=Path(".cache/baseline"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    about, found = machine(), dict[str, dict[int, dict[str, float]]]()
    for name in options.model:
        subject = Mixture(7.5, options.seeds) if name == "mixture" else Subject(name, 2.0, SEEDS, options.references)
        with torch.no_grad():
            found[subject.name] = {n: ratios(subject, n, options.seeds) for n in track(options.calls, subject.name)}
    columns = [(model, n) for model in found for n in options.calls]
    names = sorted({name for of_model in found.values() for of_calls in of_model.values() for name in of_calls})
    rows = [[name, *(_cell(found[model][n].get(name)) for model, n in columns)] for name in names]
    page = (
        "# Every scheduler as it comes, over DDIM\n\n"
        + table(["", *(f"{model}, {n}" for model, n in columns)], rows)
        + "\nErrors over DDIM's in the same calls; more than 1.1 is set in bold.\n\n"
        + provenance(about)
    )
    write(options.out, "defaults", {"seeds": options.seeds, "ratios": found, "machine": about}, page)
    print(page)


def _cell(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio <= 1.1 else f"**{ratio:.2f}**"


if __name__ == "__main__":
    main()
