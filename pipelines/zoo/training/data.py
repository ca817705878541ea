"""Fashion-MNIST from its idx files, padded to 32 x 32."""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from fewstep.errors import ArtifactError, FewstepError, unknown
from fewstep.eval.images import to_uint8 as quantized

FOLDER_VARIABLE = "FEWSTEP_FASHION_MNIST"
DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"
SIZE = 32

_FILES = {"train": "train", "test": "t10k"}
_PADDING = (SIZE - 28) // 2


@dataclass(frozen=True)
class Split:
    """One split: ``images`` uint8 (N, 32, 32), zero-padded from 28 x 28, and ``labels`` int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    sha256: str
    """Hash of the image file as it was read (compressed)."""

    def __len__(self) -> int:
        return len(self.images)


def folder() -> Path:
    """Where the four ``idx.gz`` files are looked for."""
    return Path(os.environ.get(FOLDER_VARIABLE, DEFAULT_FOLDER))


@lru_cache(maxsize=2)
def load(split: str) -> Split:
    """The ``"train"`` (60,000 images) or the ``"test"`` (10,000 images) split.

    Raises:
        FewstepError: for any other split.
        ArtifactError: if the data set is not installed.
    """
    if split not in _FILES:
        raise FewstepError(unknown("split", split, _FILES))
    images_path = folder() / f"{_FILES[split]}-images-idx3-ubyte.gz"
    images = torch.from_numpy(_read_idx(images_path))
    labels = torch.from_numpy(_read_idx(folder() / f"{_FILES[split]}-labels-idx1-ubyte.gz")).long()
    padded = torch.nn.functional.pad(images, (_PADDING,) * 4)
    return Split(padded, labels, hashlib.sha256(images_path.read_bytes()).hexdigest())


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 32, 32) to float32 (N, 1, 32, 32) in [0, 1]."""
    return images.unsqueeze(1).float() / 255


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 32, 32) to float32 (N, 1, 32, 32) in [-1, 1], as diffusion models take them."""
    return images.unsqueeze(1).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float (N, 1, 32, 32) in [-1, 1] to uint8 (N, 32, 32), clamped and rounded."""
    return quantized((images[:, 0].clamp(-1, 1) + 1) / 2)


def _read_idx(path: Path) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} is missing: install the Debian package dataset-fashion-mnist, "
            f"or set {FOLDER_VARIABLE} to a folder that holds the four Fashion-MNIST idx.gz files"
        ) from None
    if raw[:3] != b"\0\0\x08":
        raise ArtifactError(f"{path} is not an idx file of unsigned bytes (it begins with {raw[:4].hex()})")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy()
