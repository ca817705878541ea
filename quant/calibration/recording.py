"""record: what a network is called with while its own sampler draws, spread evenly over the time steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fewstep.errors import FewstepError
from fewstep.eval.costs.calls import denoisers
from fewstep.quant.calibration.calls import Call, Recording


def record(
    pipe: Any,
    prompts: Sequence[str] = ("",),
    *,
    num_inference_steps: int = 20,
    samples: int = 8,
    guidance: float = 4.0,
    seed: int = 0,
    keep: int | None = None,
    component: nn.Module | None = None,
) -> Recording:
    """What a pipeline's network is called with while it draws: every step alike, as Q-Diffusion samples.

    Args:
        pipe: a diffusers pipeline; its scheduler and its own weights make the trajectory.
        prompts: cycled; names of classes for a model that draws classes, nothing for an unconditional one.
        num_inference_steps: of the trajectory. Statistics belong to the sampler they were taken with.
        samples: images drawn, in one batch.
        guidance: scale; the halves of a guided batch both count.
        seed: of the first image.
        keep: rows kept of every call's batch, of samples that are drawn anew for every call; all where left out. Both halves
            of a guided sample are kept or neither, so at least these.
        component: which network, where the pipeline has two.

    Returns:
        One call a network call, in order, on the CPU; with the pipeline, so that methods that train can draw the samples
        again.

    Raises:
        FewstepError: for fewer than one image, step or row.

    Source: Q-Diffusion, 2302.04304, algorithm 1.
    """
    from fewstep.caching.calibration.runs import Runs
    from fewstep.eval.checks import at_least
    from fewstep.eval.drawing.batch import borrowed, draw

    for what, value in (("num_inference_steps", num_inference_steps), ("samples", samples), ("keep", keep)):
        if value is not None:
            at_least(what, value, 1)
    calls: list[Call] = []
    generator = torch.Generator().manual_seed(seed)

    def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs)
        rows = call.batch
        if rows % samples:
            raise FewstepError(
                f"the network was called with {rows} rows for {samples} samples; which is whose is unknown"
            )
        call = Call(args, kwargs, tuple(i % samples for i in range(rows)))
        if keep is not None and keep < rows:
            count = max(1, keep * samples // rows)
            chosen = set(torch.randperm(samples, generator=generator)[:count].tolist())
            call = call.select([i for i in range(rows) if i % samples in chosen])
        calls.append(call.to("cpu"))

    network = component or denoisers(pipe)[0]
    handle = network.register_forward_pre_hook(keep_call, with_kwargs=True)
    given = [prompts] if isinstance(prompts, str) else list(prompts) or [""]
    wanted = [given[i % len(given)] for i in range(samples)]
    try:
        with borrowed(pipe):
            draw(pipe, wanted, range(seed, seed + samples), steps=num_inference_steps, guidance=guidance)
    finally:
        handle.remove()
    runs = Runs(pipe, tuple(wanted), tuple(range(seed, seed + samples)), num_inference_steps, guidance)
    return Recording(calls, runs)
