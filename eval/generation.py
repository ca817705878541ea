"""One grid of images from an embedded model: what ``fewstep generate`` does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep import artifact
from fewstep.eval.checks import at_least, guidance_scale
from fewstep.eval.contact import sheet
from fewstep.eval.costs import CallCounter, Timer
from fewstep.eval.devices import load_model, usable
from fewstep.eval.drawing import borrowed, draw
from fewstep.eval.scheduling import scheduler_for


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
    guidance: float,
    seed: int,
    count: int,
    device: str | None = None,
) -> Generated:
    """Draw ``count`` images of the seeds from ``seed`` on, prompts cycled, and write them as one PNG, atomically.

    Raises:
        ValueError: for an unknown model; FewstepError, which is one, for an unknown scheduler or device, for options or
            numbers that cannot be, and for images that came out as NaN or black.
    """
    from fewstep.samplers import parse_spec

    for what, value, least in (("n", count, 1), ("steps", steps, 1), ("seed", seed, 0)):
        at_least(what, value, least)
    guidance_scale(guidance)
    if device is not None:
        usable(device)
    parse_spec(scheduler)
    pipe = load_model(model, device)
    seeds = range(seed, seed + count)
    wanted = [prompts[index % len(prompts)] for index in range(count)]
    with borrowed(pipe), CallCounter(pipe) as counter, Timer() as timer:
        pipe.scheduler = scheduler_for(scheduler, pipe.scheduler.config)
        images = draw(pipe, wanted, seeds, steps=steps, guidance=guidance)
    file = io.BytesIO()
    sheet(images).save(file, format="PNG")
    artifact.write_bytes(out, file.getvalue())
    return Generated(counter.nfe_per_image(count), timer.seconds)
