"""What loops of our own share with ``StableDiffusionPipeline``: the prompts, the first latents, guidance, the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError

Prompts = str | Sequence[str]
Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        embeds: (N, tokens, width), with guidance (2N, ...), the negative ones first.
        noise: (N, C, h, w) standard normal.
        scale: of guidance; 1 for none.
    """

    embeds: Tensor
    noise: Tensor
    scale: float

    @property
    def guided(self) -> bool:
        """Whether the batch is [uncond, cond]."""
        return self.scale > 1

    def doubled(self, x: Tensor) -> Tensor:
        """The batch as the network sees it."""
        return torch.cat([x, x]) if self.guided else x

    def combined(self, raw: Tensor) -> Tensor:
        """What guidance makes of the network's output."""
        if not self.guided:
            return raw
        without, given = raw.chunk(2)
        return without + self.scale * (given - without)


def start(
    pipe: Any,
    prompt: Prompts,
    negative_prompt: Prompts | None,
    guidance_scale: float,
    num_images_per_prompt: int,
    size: tuple[int | None, int | None],
    generator: Generators,
    latents: Tensor | None,
) -> Start:
    """Prompts encoded and noise drawn as the pipeline does it.

    Raises:
        FewstepError: for a pipeline of another make, or latents of another number than there are images.
    """
    from diffusers.utils.torch_utils import randn_tensor

    parts = ("unet", "vae", "encode_prompt", "image_processor", "scheduler")
    if missing := [part for part in parts if not hasattr(pipe, part)]:
        raise FewstepError(f"{type(pipe).__name__} has no {missing[0]}; a StableDiffusionPipeline is needed")
    device, guided = pipe._execution_device, guidance_scale > 1
    positive, negative = pipe.encode_prompt(
        prompt if isinstance(prompt, str) else list(prompt), device, num_images_per_prompt, guided, negative_prompt
    )[:2]
    if latents is None:
        high, wide = (
            pixels // pipe.vae_scale_factor if pixels is not None else pipe.unet.config.sample_size for pixels in size
        )
        shape = (len(positive), pipe.unet.config.in_channels, high, wide)
        latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=positive.dtype)
    if len(latents) != len(positive):
        raise FewstepError(f"{len(latents)} latents were given for {len(positive)} images")
    return Start(torch.cat([negative, positive]) if guided else positive, latents, guidance_scale)


def finish(pipe: Any, latents: Tensor, output_type: str) -> Any:
    """Latents as images of the ``output_type``; ``latent`` returns them as they are."""
    if output_type == "latent":
        return latents
    pixels = pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type=output_type)
