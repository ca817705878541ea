"""Faster Diffusion's parallel form: the decoders of the steps between two key steps in one batch."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.caching.controller import applied
from fewstep.caching.hooks import installed
from fewstep.caching.methods.encoder_propagation import EncoderPropagation
from fewstep.caching.plan import CachePlan
from fewstep.caching.rows import Rows, repeated
from fewstep.errors import FewstepError
from fewstep.pipelines.text_to_image import Generators, Prompts, finish, start


@torch.no_grad()
def generate_propagated(
    pipe: Any,
    prompt: Prompts,
    *,
    keys: str | int | tuple[int, ...] = "50ls",
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    negative_prompt: Prompts | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    prior_noise: float = 0.0,
    most: int | None = None,
    eta: float = 0.0,
    generator: Generators = None,
    latents: Tensor | None = None,
    output_type: str = "pil",
) -> Any:
    """What ``pipe(prompt, ...)`` makes with :class:`~fewstep.caching.EncoderPropagation`, with fewer, larger calls.

    Between key steps the UNet looks at the time and at the encoder's features of the key step, not at the sample. So all
    steps up to the next key step are one call of the decoder, on as many copies of these features; the scheduler then
    steps through their outputs in order. The multiply-accumulates are the sequential form's, and so are the images, up to
    what the decoder's sums differ by between batch sizes. It pays where small batches leave the device idle.

    Args:
        pipe: a ``StableDiffusionPipeline``, or one of its shape, with any scheduler.
        keys: see :class:`~fewstep.caching.EncoderPropagation`.
        prior_noise: x <- x + prior_noise x_T before the scheduler's steps of the trajectory's second half (t / T < 0.5);
            the authors' value is 0.003.
        most: most steps in a call, to bound the memory; a call has that many times the images, twice with guidance.
        latents: standard normal, to start from instead of drawn noise.

    All other arguments mean what they mean to the pipeline.

    Raises:
        FewstepError: for a pipeline of another make, or a UNet that has a cache already.

    Source: Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference, arXiv 2312.09608, sec. 3.3.
    """
    if most is not None and most < 1:
        raise FewstepError(f"most is {most}; give at least 1 step a call")
    method = EncoderPropagation(keys)
    run = start(
        pipe, prompt, negative_prompt, guidance_scale, num_images_per_prompt, (height, width), generator, latents
    )
    scheduler = pipe.scheduler
    scheduler.set_timesteps(num_inference_steps, device=run.noise.device)
    times = scheduler.timesteps
    extra = {"eta": eta, "generator": generator}
    known = inspect.signature(scheduler.step).parameters
    extra = {name: value for name, value in extra.items() if name in known}
    late = [t < 0.5 * scheduler.config.num_train_timesteps for t in times.tolist()]
    x = first = run.noise * scheduler.init_noise_sigma
    # a key step, then calls that reuse its features: as many as there could be
    segment = CachePlan(("encoder",), (np.arange(len(times)) > 0).astype(np.int8)[:, None], method=method.describe())
    with applied(pipe.unet, segment, num_inference_steps=segment.steps) as controller:
        decoder = _Decoder(pipe.unet, controller.caches[0], run.embeds)
        for key, following in _segments([method.is_key(i, len(times)) for i in range(len(times))]):
            outputs = [decoder.key(run.doubled(scheduler.scale_model_input(x, times[key])), times[key])]
            size = len(following) if most is None else most
            for begin in range(0, len(following), size or 1):
                outputs += decoder.following(times[following[begin : begin + size]])
            for i, raw in zip((key, *following), outputs, strict=True):
                if i != key:
                    scheduler.scale_model_input(x, times[i])  # schedulers count these calls
                if prior_noise and late[i]:
                    x = x + prior_noise * first
                x = scheduler.step(run.combined(raw), times[i], x, **extra, return_dict=False)[0]
    return finish(pipe, x, output_type)


class _Decoder:
    """The UNet, called in full at a key step and then for several steps at once."""

    def __init__(self, unet: Any, cache: Any, embeds: Tensor) -> None:
        self.unet, self.cache, self.embeds = unet, cache, embeds
        self.hook = installed(unet)

    def key(self, sample: Tensor, time: Tensor) -> Tensor:
        """The output at a key step; the encoder's features are kept."""
        self.cache.reset()
        self.sample, self.copies, self.calls = sample, 1, 0
        return self._call(sample, time.clone(), self.embeds)  # no element of a list: the place in the segment counts

    def following(self, times: Tensor) -> list[Tensor]:
        """The outputs at later steps, (steps,) timesteps."""
        count, batch = len(times), len(self.sample)
        grown = repeated(self.sample, count)  # its numbers are not looked at
        if count != self.copies:
            one = Rows(0, 1, self.copies)
            self.cache.rebatch(lambda x: repeated(one.of(x), count), grown)
            self.copies = count
        out = self._call(grown, times.repeat_interleave(batch), repeated(self.embeds, count))
        return list(out.chunk(count))

    def _call(self, sample: Tensor, time: Tensor, embeds: Tensor) -> Tensor:
        from diffusers.hooks.hooks import CacheContext

        assert self.hook is not None
        self.hook.context.set_context(CacheContext("decode", self.calls))
        self.calls += 1
        out: Tensor = self.unet(sample, time, encoder_hidden_states=embeds, return_dict=False)[0]
        return out


def _segments(is_key: list[bool]) -> list[tuple[int, list[int]]]:
    """Every key step with the steps up to the next one."""
    found: list[tuple[int, list[int]]] = []
    for i, key in enumerate(is_key):
        if key:
            found.append((i, []))
        else:
            found[-1][1].append(i)
    return found
