"""``fewstep generate``."""

from __future__ import annotations

from fewstep.cli import options


def generate(
    out: options.Picture,
    prompt: options.Prompt = None,
    model: options.Model = "fashion-sd",
    scheduler: options.Scheduler = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    recipe: options.UsedRecipe = None,
    seed: options.Seed = 0,
    n: options.Images = 8,
    device: options.Device = None,
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
    print(f"{out}: {n} image{'s' if n > 1 else ''}, {made.nfe_per_image:g} NFE/image, {made.seconds / n:.3g} s/image")
