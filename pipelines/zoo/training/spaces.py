"""What a denoiser sees of an image: its pixels, or the latents of the shared autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from .. import folders
from . import data
from .autoencoder import latents, load_autoencoder, sample


class Space(Protocol):
    """Clean examples, scaled to a standard deviation of about one."""

    def clean(self, split: str, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The examples ``indices`` of a split, (N, channels, height, width)."""
        ...


class Pixels:
    """Images in [-1, 1]."""

    def clean(self, split: str, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return data.to_signed(data.load(split).images[indices])


@dataclass(frozen=True)
class Latents:
    """Draws from the autoencoder's posterior times its scaling factor. Encoded once, kept in ``cache``."""

    cache: Path

    @cached_property
    def _scale(self) -> float:
        return float(load_autoencoder().config["scaling_factor"])

    @cached_property
    def _moments(self) -> dict[str, torch.Tensor]:
        return {split: self._encode(split) for split in ("train", "test")}

    def clean(self, split: str, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return self._scale * sample(self._moments[split][indices], generator)

    def _encode(self, split: str) -> torch.Tensor:
        key = folders.sha256(folders.AUTOENCODER / folders.DIFFUSERS_WEIGHTS)[:16]
        path = self.cache / f"latents-{split}-{key}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            save_file({"moments": latents(load_autoencoder(), data.load(split).images)}, temporary)
            temporary.replace(path)
        moments: torch.Tensor = load_file(path)["moments"]
        return moments
