"""What a denoiser learns to predict, and how the times of a batch weigh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from .untyped import diffusers as untyped


@dataclass(frozen=True)
class Noised:
    """A batch for the network: input, time as the network takes it, target, and the weight of each example."""

    sample: torch.Tensor
    timestep: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


class Objective(Protocol):
    """Draws times and noise for clean examples."""

    def __call__(self, clean: torch.Tensor, generator: torch.Generator) -> Noised: ...


@dataclass(frozen=True)
class Epsilon:
    """Noise prediction under a discrete variance-preserving schedule.

    Each time weighs min(SNR, gamma) / SNR, so that easy times do not drown the hard ones.

    References:
        Efficient Diffusion Training via Min-SNR Weighting Strategy (2303.09556), section 3.4.
    """

    scheduler: dict[str, Any]
    gamma: float = 5.0

    @cached_property
    def _noising(self) -> Any:
        return untyped.DDPMScheduler.from_config(self.scheduler)

    def __call__(self, clean: torch.Tensor, generator: torch.Generator) -> Noised:
        steps = self._noising.config["num_train_timesteps"]
        timestep = torch.randint(0, steps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        signal = self._noising.alphas_cumprod[timestep]
        snr = signal / (1 - signal)
        return Noised(self._noising.add_noise(clean, noise, timestep), timestep, noise, snr.clamp(max=self.gamma) / snr)


@dataclass(frozen=True)
class Flow:
    """Velocity (noise minus data) on straight paths, at logit-normal times shifted towards the noise.

    References:
        Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (2403.03206), section 3.1.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000

    def __call__(self, clean: torch.Tensor, generator: torch.Generator) -> Noised:
        time = torch.randn(len(clean), generator=generator).sigmoid()
        time = self.shift * time / (1 + (self.shift - 1) * time)
        noise = torch.randn(clean.shape, generator=generator)
        level = time.view(-1, *[1] * (clean.ndim - 1))
        noisy = (1 - level) * clean + level * noise
        return Noised(noisy, time * self.num_train_timesteps, noise - clean, torch.ones_like(time))
