"""Captions: a garment's name and two attributes measured from its pixels, each word sometimes left out."""

from __future__ import annotations

import itertools

import torch

from ..classes import CLASSES

UNCONDITIONAL = 0
"""The caption id of the empty prompt."""

_BRIGHTNESS_WORDS = ("dark", "", "bright")
_WIDTH_WORDS = ("narrow", "", "wide")

_LIT = 32  # a pixel above this grey level belongs to the garment
_DARK, _BRIGHT = 130.0, 185.0  # mean grey level of the lit pixels: about a third of all images lies outside each

# Mean number of lit pixels in a row that has any: the terciles of each class on the training split, because a narrow
# bag is wider than a wide trouser.
_WIDTHS = (
    (14.4, 15.8),
    (8.4, 9.3),
    (16.1, 18.0),
    (9.8, 11.9),
    (15.2, 16.9),
    (11.0, 14.0),
    (15.2, 17.5),
    (15.6, 17.5),
    (16.0, 22.1),
    (15.6, 16.7),
)

_PLAIN = 0.45  # how often both words are left out at once
_KEEP = 0.75  # how often each word stays otherwise


def _caption(label: int, brightness: int, width: int) -> str:
    words = [word for word in (_BRIGHTNESS_WORDS[brightness], _WIDTH_WORDS[width], CLASSES[label]) if word]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


CAPTIONS: tuple[str, ...] = (
    "",
    *(_caption(*words) for words in itertools.product(range(len(CLASSES)), range(3), range(3))),
)
"""All captions by id; id 0 is the empty prompt."""


def measure(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness and width of uint8 images (N, 32, 32), each 0 (dark, narrow), 1 (neither) or 2 (bright, wide)."""
    lit = images > _LIT
    area = lit.sum(dim=(1, 2)).clamp(min=1)
    mean = (images.float() * lit).sum(dim=(1, 2)) / area
    width = area / lit.any(dim=2).sum(dim=1).clamp(min=1)
    bounds = torch.tensor(_WIDTHS)[labels]
    brightness = 1 - (mean < _DARK).long() + (mean > _BRIGHT).long()
    return brightness, 1 - (width < bounds[:, 0]).long() + (width > bounds[:, 1]).long()


def draw(
    labels: torch.Tensor, brightness: torch.Tensor, width: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Caption ids (N,) with words left out at random; the plain name alone is more than 45 % of the draws."""
    chance = torch.rand(3, len(labels), generator=generator)
    plain = chance[0] < _PLAIN
    brightness = torch.where(plain | (chance[1] > _KEEP), 1, brightness)
    width = torch.where(plain | (chance[2] > _KEEP), 1, width)
    return 1 + 9 * labels + 3 * brightness + width


def of_split(images: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> list[str]:
    """One caption an image, drawn as in training with a fixed seed."""
    ids = draw(labels, *measure(images, labels), torch.Generator().manual_seed(seed))
    return [CAPTIONS[index] for index in ids.tolist()]
