"""One grid of images from an embedded or a saved model: what ``fewstep generate`` does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep import artifact
from fewstep.errors import FewstepError
from fewstep.eval.checks import at_least, guidance_scale
from fewstep.eval.costs.total import CallCounter, Timer
from fewstep.eval.devices import usable
from fewstep.eval.drawing.batch import borrowed, draw
from fewstep.eval.reports.contact import sheet
from fewstep.eval.sweeps.sources import make_sources

GUIDANCE = 4.0
"""Where neither the caller nor a recipe has one."""


@dataclass(frozen=True)
class Generated:
    """What the images cost; the wall clock includes what the first call pays once."""

    nfe_per_image: float
    seconds: float


def generate_grid(
    out: Path,
    model: str,
    prompts: Sequence[str],
    *,
    scheduler: str,
    steps: int,
    guidance: float | None,
    seed: int,
    count: int,
    device: str | None = None,
    recipe: Path | None = None,
) -> Generated:
    """Draw ``count`` images of the seeds from ``seed`` on, prompts cycled, and write them as one PNG, atomically.

    Prompts are the names of classes for a model that draws classes, and play no part for one that draws neither. A
    recipe, the path of its file, decides in place of scheduler and steps, and for the guidance where that is None.

    Raises:
        ValueError: for an unknown model; FewstepError, which is one, for an unknown scheduler or device, for options or
            numbers that cannot be, and for images that came out as NaN or black.
    """
    for what, value, least in (("n", count, 1), ("steps", steps, 1), ("seed", seed, 0)):
        at_least(what, value, least)
    from fewstep.pipelines import Recipe, applied

    chosen = Recipe(scheduler, steps=steps) if recipe is None else Recipe.load(recipe)
    guidance = guidance if guidance is not None else chosen.guidance if chosen.guidance is not None else GUIDANCE
    guidance_scale(guidance)
    if device is not None:
        usable(device)
    (source,) = make_sources(model)
    if source.family == "unconditional":
        prompts = ("",)
    elif not prompts:
        raise FewstepError(f"{model} draws what it is told; give --prompt")
    pipe = source.load(device)
    seeds = range(seed, seed + count)
    wanted = [prompts[index % len(prompts)] for index in range(count)]
    with borrowed(pipe), applied(pipe, chosen), CallCounter(pipe) as counter, Timer() as timer:
        images = draw(pipe, wanted, seeds, steps=chosen.steps or steps, guidance=guidance)
    file = io.BytesIO()
    sheet(images).save(file, format="PNG")
    artifact.write_bytes(out, file.getvalue())
    return Generated(counter.nfe_per_image(count), timer.seconds)
