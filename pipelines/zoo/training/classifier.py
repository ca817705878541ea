"""Trains fashion-features, the network in whose features FID is measured."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..classifier import FashionFeatures
from . import data, reference
from .loop import batch_indices
from .task import Settings


class ClassifierTask:
    """Cross entropy on the ten classes, with shifts of one pixel and horizontal flips."""

    def __init__(self, name: str, settings: Settings, label_smoothing: float = 0.05) -> None:
        self.name = name
        self.settings = settings
        self.label_smoothing = label_smoothing

    def build(self) -> nn.Module:
        return FashionFeatures()

    def loss(self, module: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        assert isinstance(module, FashionFeatures)
        split = data.load("train")
        indices = batch_indices(len(split), self.settings.batch_size, step, self.settings.seed)
        images = augment(data.to_unit(split.images[indices]), generator, shift=1)
        return F.cross_entropy(module.logits(images), split.labels[indices], label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, FashionFeatures)
        split = data.load("test")
        correct = 0
        for images, labels in zip(torch.split(split.images, 500), torch.split(split.labels, 500), strict=True):
            correct += int((module.logits(data.to_unit(images)).argmax(1) == labels).sum())
        return {"test_accuracy": correct / len(split)}

    def export(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, FashionFeatures)
        module.half().save_pretrained(folder)
        reference.write(folder)


def augment(images: torch.Tensor, generator: torch.Generator, shift: int = 2) -> torch.Tensor:
    """Flips half of the images and moves each by up to ``shift`` pixels, filling with black."""
    count, _, height, width = images.shape
    flips = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    offsets = torch.randint(0, 2 * shift + 1, (2, count), generator=generator)
    padded = F.pad(images[:, 0], (shift,) * 4)
    rows = offsets[0, :, None] + torch.arange(height)
    columns = offsets[1, :, None] + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)
