"""Trains any denoiser: a network, a space, an objective, and how the network is told what to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from .. import folders
from ..classes import CLASSES
from . import captions, data
from .loop import batch_indices
from .objectives import Objective
from .spaces import Space
from .task import Settings


@dataclass(frozen=True)
class Conditions:
    """What a batch is to show. ``hidden`` (N, 16, width) and ``pooled`` (N, width) come from the frozen text tower."""

    labels: torch.Tensor
    """Classes (N,); 10 where the condition was dropped."""
    hidden: torch.Tensor
    pooled: torch.Tensor


@dataclass
class DenoiserTask:
    """Denoises images of the training split under their captions.

    Args:
        network: builds the network.
        predict: calls it: (network, noisy sample, timestep, conditions) -> prediction.
        assemble: writes a whole pipeline around the trained network into a folder.
        drop: how often the caption is replaced by the empty prompt, for classifier-free guidance.
    """

    name: str
    settings: Settings
    network: Callable[[], nn.Module]
    space: Space
    objective: Objective
    predict: Callable[[nn.Module, torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
    assemble: Callable[[nn.Module, Path], None]
    drop: float = 0.1

    def build(self) -> nn.Module:
        return self.network()

    def loss(self, module: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        indices = batch_indices(len(data.load("train")), self.settings.batch_size, step, self.settings.seed)
        return self._loss(module, "train", indices, generator)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """The training loss on 2,000 test images with a fixed draw of times, noise and captions."""
        generator = torch.Generator().manual_seed(0)
        batches = torch.split(torch.arange(2000), 250)
        return {"test_loss": sum(float(self._loss(module, "test", b, generator)) for b in batches) / len(batches)}

    def export(self, module: nn.Module, folder: Path) -> None:
        self.assemble(module, folder)

    def _loss(self, module: nn.Module, split: str, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        clean = self.space.clean(split, indices, generator)
        noised = self.objective(clean, generator)
        prediction = self.predict(module, noised.sample, noised.timestep, self._conditions(split, indices, generator))
        errors = (prediction - noised.target).square().flatten(1).mean(dim=1)
        return (noised.weight * errors).mean()

    def _conditions(self, split: str, indices: torch.Tensor, generator: torch.Generator) -> Conditions:
        labels, brightness, width = (column[indices] for column in self._attributes[split])
        drawn = captions.draw(labels, brightness, width, generator)
        dropped = torch.rand(len(indices), generator=generator) < self.drop
        drawn = drawn.masked_fill(dropped, captions.UNCONDITIONAL)
        hidden, pooled = self._text
        return Conditions(labels.masked_fill(dropped, len(CLASSES)), hidden[drawn], pooled[drawn])

    @cached_property
    def _attributes(self) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        splits = {name: data.load(name) for name in ("train", "test")}
        return {name: (s.labels, *captions.measure(s.images, s.labels)) for name, s in splits.items()}

    @cached_property
    def _text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and pooled output of every caption, by caption id."""
        encoder, tokenizer = folders.load_text_tower(folders.weights("fashion-clip"))
        encoded = tokenizer(
            list(captions.CAPTIONS), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        with torch.no_grad():
            output = encoder(encoded["input_ids"])
        return output.last_hidden_state, output.pooler_output
