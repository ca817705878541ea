"""``fewstep generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import DeviceOption, SeedOption


def generate(
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help="What to draw, a class's name where the model draws classes, nothing where it takes neither; "
            "repeat it to cycle.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="An embedded model (`fewstep models`), or the folder of a saved pipeline."),
    ] = "fashion-sd",
    scheduler: Annotated[
        str | None, typer.Option(help="A scheduler, such as 'DPMSolver(solver_order=3)'.  [DPMSolver]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.  [10]")] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", "-g", help="Classifier-free guidance scale; at most 1 is without.  [4]"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe (`fewstep tune --recipe`) in place of scheduler, steps and guidance.")
    ] = None,
    seed: SeedOption = 0,
    n: Annotated[int, typer.Option("--n", "-n", help="How many images.")] = 8,
    device: DeviceOption = None,
) -> None:
    """Draw images and write them as one PNG grid."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"out is {str(out)!r}; give a file that ends in .png")
    if out.is_dir():
        raise ValueError(f"out is the folder {str(out)!r}; give a file in it")
    if recipe is not None and (scheduler is not None or steps is not None):
        raise ValueError("a recipe has a scheduler and steps of its own; give --recipe without --scheduler and --steps")
    from fewstep.eval.drawing.generation import generate_grid

    made = generate_grid(
        out, model, prompt or (), scheduler=scheduler or "DPMSolver", steps=10 if steps is None else steps,
        guidance=guidance, seed=seed, count=n, device=device, recipe=recipe,
    )  # fmt: skip
    print(f"{out}: {n} images, {made.nfe_per_image:g} NFE/image, {made.seconds / n:.3g} s/image")
