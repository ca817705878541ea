"""Prior noise: a little of the initial noise is added back late in the trajectory, for texture that reuse loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewstep.errors import FewstepError

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def prior_noise(noise: Tensor | None = None, strength: float = 0.003, until: float = 0.5) -> Callback:
    """A ``callback_on_step_end`` that sets x <- x + strength x_T after each step where t / T < ``until``.

    Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference, arXiv 2312.09608, sec. 3.4. There it
    is added between the network and the scheduler's step, here after the step, which is the same for all but the network's
    next input where it looks at one.

    Args:
        noise: x_T, what was given to the pipeline as ``latents``. Where left out, the state after the first step stands
            for it, which is the noise but for one step's share of the image.
        strength: 0.003 is the authors'; pixel models want 0.
        until: share of the training timesteps below which it is added.

    Example:
        >>> noise = torch.randn(1, 4, 64, 64)
        >>> pipe(prompt, latents=noise, callback_on_step_end=caching.prior_noise(noise))
    """
    if strength < 0 or not 0 <= until <= 1:
        raise FewstepError(f"strength is {strength} and until {until}; give at least 0, and a share from 0 to 1")
    first: dict[str, Tensor] = {}

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        latents = kwargs["latents"]
        if noise is None and (step == 0 or "x" not in first):
            first["x"] = latents.clone()
        source = first["x"] if noise is None else noise.to(latents)
        if source.shape != latents.shape:
            raise FewstepError(f"noise has shape {tuple(source.shape)}, the latents have {tuple(latents.shape)}")
        if float(timestep) < until * pipe.scheduler.config.num_train_timesteps:
            return {"latents": latents + strength * source}
        return {}

    return callback
