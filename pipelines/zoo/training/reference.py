"""The reference of FID: moments of the test images' features, written beside the network that made them."""

from __future__ import annotations

from pathlib import Path

from fewstep.eval import FeatureNet, fingerprint, image_moments

from ..classifier import FashionFeatures
from . import data

REFERENCE = "reference.safetensors"


def write(folder: Path) -> None:
    """Writes the moments under the network exported into ``folder``."""
    network = FashionFeatures.from_pretrained(folder)
    test = data.load("test")
    moments = image_moments(test.images, FeatureNet("fashion", network, fingerprint.of_module(network)))
    moments.recipe |= {
        "images": f"Fashion-MNIST test split, all {len(test)}",
        "images_sha256": test.sha256,
        "size": "28 x 28 zero-padded to 32 x 32, grey",
    }
    moments.save(folder / REFERENCE)
