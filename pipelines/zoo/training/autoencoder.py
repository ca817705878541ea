"""Trains the autoencoder that the latent models share: 32 x 32 pixels to 8 x 8 x 4 latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import folders
from . import data
from .loop import batch_indices
from .task import Settings
from .untyped import diffusers as untyped


class AutoencoderTask:
    """Absolute and squared error plus a small KL term.

    There is no perceptual term: the only feature network at hand is the one that measures FID, and training on it
    would be training on the metric.
    """

    def __init__(self, name: str, settings: Settings, config: dict[str, Any], kl_weight: float = 1e-3) -> None:
        self.name = name
        self.settings = settings
        self.config = config
        self.kl_weight = kl_weight

    def build(self) -> nn.Module:
        autoencoder: nn.Module = untyped.AutoencoderKL(**self.config).to(memory_format=torch.channels_last)
        return autoencoder

    def loss(self, module: Any, step: int, generator: torch.Generator) -> torch.Tensor:
        split = data.load("train")
        indices = batch_indices(len(split), self.settings.batch_size, step, self.settings.seed)
        images = data.to_signed(split.images[indices]).contiguous(memory_format=torch.channels_last)
        posterior = module.encode(images).latent_dist
        decoded = module.decode(posterior.sample(generator=generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss: torch.Tensor = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + self.kl_weight * kl
        return loss

    @torch.no_grad()
    def evaluate(self, module: Any) -> dict[str, float]:
        errors = []
        for batch in torch.split(data.load("test").images, 250):
            images = data.to_signed(batch)
            decoded = module.decode(module.encode(images).latent_dist.mode()).sample
            errors.append((data.to_uint8(decoded).float() - batch.float()).square().mean(dim=(1, 2)))
        mse = torch.cat(errors)
        return {"test_psnr": float((10 * torch.log10(255**2 / mse)).mean()), "test_mse": float(mse.mean() / 255**2)}

    def export(self, module: Any, folder: Path) -> None:
        """Measures ``scaling_factor`` (one over the latents' standard deviation on the training split), then saves."""
        moments = latents(module, data.load("train").images[:10_000])
        module.register_to_config(scaling_factor=1 / float(sample(moments, torch.Generator().manual_seed(0)).std()))
        halved: Any = nn.Module.to(module, torch.float16)
        halved.save_pretrained(folder)


@torch.no_grad()
def latents(autoencoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation (N, 8, 8, 8), unscaled, of uint8 images (N, 32, 32): four channels each."""
    parts = []
    for batch in torch.split(images, 250):
        posterior = autoencoder.encode(data.to_signed(batch)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.std], dim=1).contiguous())
    return torch.cat(parts)


def sample(moments: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A draw (N, 4, 8, 8) from what :func:`latents` returned."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * torch.randn(mean.shape, generator=generator)


def load_autoencoder() -> Any:
    """The exported autoencoder, float32 and frozen."""
    autoencoder = untyped.AutoencoderKL.from_pretrained(folders.AUTOENCODER)
    return nn.Module.to(autoencoder, torch.float32).requires_grad_(False).eval()
