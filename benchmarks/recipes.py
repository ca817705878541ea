"""Recipes: what a joint search of sampler, cache and quantisation finds for a bound on the error, and what it is worth.

    python benchmarks/recipes.py [--model NAME ...] [--quality 0.05 0.02] [--minutes 10] [--out FOLDER]

For every model and bound: ``pipelines.tune`` with int8 and caches at 50 and 70 % of the MACs; then, on seeds that the search did
not see, the latents' error to 100 steps and seconds an image, beside 20 steps of DPM-Solver++ 2M, in turns. A recipe that is
there is kept and measured again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from record import RESULTS, machine, provenance, table, write
from rich.console import Console

from fewstep import eval as evaluation
from fewstep import pipelines
from fewstep.caching.calibration.runs import Runs
from fewstep.eval.pairs.latents import latent_rmse
from fewstep.pipelines import Recipe, zoo
from fewstep.samplers import UniPCScheduler

USUAL = Recipe("DPMSolver", steps=20)
"""What a recipe is compared with."""
BATCH, SEEDS = 8, 16


def found(name: str, pipe: Any, quality: float, options: argparse.Namespace, console: Console) -> Recipe:
    path = options.out / f"{name}-{quality:g}.json"
    if path.exists():
        return Recipe.load(path)
    recipe = pipelines.tune(
        pipe, zoo.prompts(name)[-48:], quality=quality, guidance=options.guidance, minutes=options.minutes,
        folder=options.work / f"recipe-{name}", tell=lambda text: console.print(f"{name} {quality:g}: {text}"),
    )  # fmt: skip
    recipe.save(path)
    return recipe


def loaded(name: str) -> Any:
    pipe = pipelines.load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measured(name: str, recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    prompts = zoo.prompts(name)
    exact = loaded(name)
    exact.scheduler = UniPCScheduler.from_config(exact.scheduler.config, solver_order=3, grid="uniform_lambda")
    truth = Runs.of(exact, prompts, SEEDS, 100, options.guidance).latents()
    entry: dict[str, Any] = {}
    runs = {}
    for key, one in (("usual", USUAL), ("recipe", recipe)):
        pipe = loaded(name)  # one an arm, so that they can take turns
        pipelines.apply_(pipe, one)
        runs[key] = Runs.of(pipe, prompts, SEEDS, one.steps or 0, options.guidance)
        entry[f"{key}_error"] = float(latent_rmse(runs[key].latents(), truth).mean())
    clock = evaluation.compare_clock({key: partial(r.batch_latents, 0) for key, r in runs.items()}, 1, 5)
    entry["seconds"] = {key: times.median / BATCH for key, times in clock.clocks.items()}
    entry["times_as_fast"] = clock.speedup("recipe", over="usual").median
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["fashion-sd", "fashion-dit"])
    parser.add_argument("--quality", nargs="+", type=float, default=[0.05, 0.02], help="bounds (%(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--minutes", type=float, default=10.0, help="of learning a search (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path(".cache/baseline"))
    parser.add_argument("--out", type=Path, default=RESULTS / "recipes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console, about, entries = Console(), machine(), list[dict[str, Any]]()
    for name in options.model:
        pipe = loaded(name)
        for quality in options.quality:
            recipe = found(name, pipe, quality, options, console)
            recipe.plot().savefig(options.out / f"{name}-{quality:g}.png", dpi=110)
            said = str(recipe).removeprefix("Recipe: ")
            entries.append({"model": name, "quality": quality, "recipe": said, "work": recipe.provenance["work"],
                            **measured(name, recipe, options)})  # fmt: skip
    header = ("model", "bound", "recipe", "work, calls", "error", "of the usual", "times as fast as the usual")
    rows = [
        (
            e["model"], f"{e['quality']:g}", e["recipe"], f"{e['work']:.2f}", f"{e['recipe_error']:.4f}",
            f"{e['usual_error']:.4f}", f"{e['times_as_fast']:.2f}",
        )
        for e in entries
    ]  # fmt: skip
    page = (
        "# Recipes found for a bound on the error\n\n"
        + table(header, rows)
        + f"\nGuidance {options.guidance:g}. Errors: RMS of the latents of {SEEDS} seeds that no search saw, to 100 steps of "
        "UniPC of order 3; the bound was kept on other held-out seeds. The usual: 20 steps of DPM-Solver++ 2M. Wall clock of "
        f"batches of {BATCH} in turns on one thread, the decoder left out.\n\n{provenance(about)}"
    )
    write(options.out, "README", {"entries": entries, "machine": about}, page)


if __name__ == "__main__":
    main()
