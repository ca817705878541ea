"""What a training run is made of: a task, and the settings that the loop needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know of a run; everything else belongs to the task."""

    batch_size: int = 128
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 200
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    seed: int = 0


class Task(Protocol):
    """A model to train. ``loss`` must draw all its randomness from ``generator``: that makes a run resumable."""

    name: str
    settings: Settings

    def build(self) -> nn.Module:
        """The trained module, freshly initialised (the global seed is set before)."""
        ...

    def loss(self, module: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        """The scalar loss of step ``step``."""
        ...

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Measures the averaged weights on the test split."""
        ...

    def export(self, module: nn.Module, folder: Path) -> None:
        """Writes the averaged weights where the zoo loads them from."""
        ...
