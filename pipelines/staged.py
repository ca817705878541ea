"""Bottleneck Sampling: high, low, and high resolution again along one trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.pipelines.text_to_image import Generators, Prompts, finish, start
from fewstep.samplers.convert import conversion
from fewstep.samplers.executor import draw
from fewstep.samplers.grid import Grid
from fewstep.samplers.schedule import NoiseSchedule


@dataclass(frozen=True)
class Stage:
    """A part of the trajectory at one size.

    Attributes:
        share: of the steps.
        scale: side of the latents, as a share of the full one.
        renoise: at the entry the noise level is that of the step this share of all steps earlier, so that steps are
            taken anew: what resizing did is noised over. 0 goes on at the level where the stage before ended.
    """

    share: float
    scale: float = 1.0
    renoise: float = 0.0


STAGES = (Stage(0.2), Stage(0.5, 0.5), Stage(0.3, 1.0, 0.1))


@torch.no_grad()
def bottleneck(
    pipe: Any,
    prompt: Prompts,
    *,
    stages: Sequence[Stage] = STAGES,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: Prompts | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    fresh: bool = True,
    generator: Generators = None,
    latents: Tensor | None = None,
    output_type: str = "pil",
) -> Any:
    """Text to image with the middle of the trajectory at a lower resolution, where the network costs less.

    Steps are DDIM's. Between stages, from the noise level s to the level t where the next one begins,

        x_t = alpha_t resize(x0(x_s)) + sigma_t eps

    with eps fresh, or the network's own, resized to unit variance. Stages of one size with ``fresh`` False and no
    ``renoise`` are the plain loop. The idea and the order of the sizes are those of Training-free Diffusion Acceleration
    with Bottleneck Sampling, arXiv 2503.18940; the shares, levels and the resizing (area down, bicubic up) are ours.

    Args:
        pipe: a ``StableDiffusionPipeline``, or one of its shape; its UNet takes any size that its blocks can halve.
        stages: their shares add up to 1. ``renoise`` adds steps.
        fresh: draw eps anew at a change of size; image i from its own generator where there is a list.
        latents: standard normal of the full size, to start from instead of drawn noise.

    All other arguments mean what they mean to the pipeline. The scheduler says what the noise process is.

    Raises:
        FewstepError: for a pipeline of another make, or stages that are none.
    """
    _check(stages)
    run = start(
        pipe, prompt, negative_prompt, guidance_scale, num_images_per_prompt, (height, width), generator, latents
    )
    schedule = NoiseSchedule.from_config(pipe.scheduler.config)
    grid = Grid.named("trailing", schedule, num_inference_steps)
    p, q = (v.tolist() for v in conversion(schedule.prediction, "data", grid.alpha[:-1], grid.sigma[:-1]))
    alpha, sigma, times = grid.alpha.tolist(), grid.sigma.tolist(), grid.model_time.tolist()
    side = run.noise.shape[-2:]
    x = resized(run.noise, _size(side, stages[0]), 1.0)
    for number, (begin, end) in enumerate(spans(stages, num_inference_steps)):
        for i in range(begin, end):
            raw = run.combined(
                pipe.unet(run.doubled(x).to(pipe.unet.dtype), times[i], encoder_hidden_states=run.embeds).sample
            ).to(x.dtype)
            x0 = p[i] * x + q[i] * raw
            eps = (x - alpha[i] * x0) / sigma[i]
            entry = i + 1
            if i == end - 1 and number + 1 < len(stages):
                entry = spans(stages, num_inference_steps)[number + 1][0]
                size = _size(side, stages[number + 1])
                x0 = resized(x0, size, None)
                eps = draw(x0, generator) if fresh else resized(eps, size, 1.0)
            x = alpha[entry] * x0 + sigma[entry] * eps
    return finish(pipe, x, output_type)


def spans(stages: Sequence[Stage], steps: int) -> list[tuple[int, int]]:
    """First step and the one after the last of every stage, on a grid of ``steps`` steps."""
    found, reached = [], 0.0
    end = 0
    for stage in stages:
        begin = max(0, end - round(stage.renoise * steps))
        reached += stage.share
        end = round(reached * steps)
        found.append((begin, end))
    return found


def resized(x: Tensor, size: tuple[int, int], deviation: float | None) -> Tensor:
    """(N, C, h, w) at another size: areas averaged down, bicubic up; scaled to a standard deviation where one is given."""
    if tuple(x.shape[-2:]) == size:
        return x
    down = size[0] < x.shape[-2]
    y = torch.nn.functional.interpolate(x, size, mode="area" if down else "bicubic")
    return y if deviation is None else y * (deviation / y.std(dim=(1, 2, 3), keepdim=True))


def _size(side: Sequence[int], stage: Stage) -> tuple[int, int]:
    return max(1, round(side[0] * stage.scale)), max(1, round(side[1] * stage.scale))


def _check(stages: Sequence[Stage]) -> None:
    if not stages or abs(sum(stage.share for stage in stages) - 1) > 1e-6:
        raise FewstepError(f"shares of the stages are {[s.share for s in stages]}; they have to add up to 1")
    for stage in stages:
        if stage.share <= 0 or stage.scale <= 0 or not 0 <= stage.renoise < 1:
            raise FewstepError(f"{stage} has a share or a scale of 0 or less, or a renoise that is no share")
    if stages[-1].scale != 1:
        raise FewstepError(f"the last stage's scale is {stages[-1].scale}; it has to be 1, the size that is asked for")
