"""The one door for images: whatever the caller has becomes uint8 batches of shape (n, C, H, W).

Float images are rounded half up, ``floor(255 x + 1/2)``, as an image file would hold them. Truncation, which some
metric libraries do, makes every image half a grey level darker on average and moves FID.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import FewstepError

ROUNDING = "u8=round"
CHANNELS = (1, 3)
_PIL_CHANNELS = {"L": 1, "RGB": 3}

Images: TypeAlias = "Tensor | npt.NDArray[Any] | Image.Image | Iterable[Any]"


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1] of any shape to uint8, half up; uint8 passes unchanged.

    Raises:
        FewstepError: for NaN or infinity, values outside [0, 1], or a dtype that is neither floating nor uint8.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.dtype.is_floating_point:
        raise FewstepError(f"images have dtype {images.dtype}; give uint8 in 0..255, or float in [0, 1]")
    images = images.detach().float()
    if not bool(torch.isfinite(images).all()):
        raise FewstepError("images contain NaN or infinite values; give uint8 in 0..255, or finite floats in [0, 1]")
    if images.numel():
        low, high = float(images.min()), float(images.max())
        # 1e-3 of slack is a quarter of a grey level: rounding passes, a [-1, 1] range or 0..255 floats do not.
        if low < -1e-3 or high > 1 + 1e-3:
            raise FewstepError(f"float images span [{low:.4g}, {high:.4g}]; give floats in [0, 1], or uint8 in 0..255")
    return (images.clamp(0, 1) * 255 + 0.5).floor().to(torch.uint8)


def batches(images: Images, batch_size: int = 250) -> Iterator[Tensor]:
    """Images in any accepted form as uint8 batches (n, C, H, W) on the CPU, n <= ``batch_size``, C 1 or 3.

    Args:
        images: a tensor or array (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or float in [0, 1]; one PIL image; or
            an iterable whose items are such batches or PIL images (mode L or RGB). Where both ends of a 4-d shape could
            be channels, tensors are read as (N, C, H, W) and arrays as (N, H, W, C), as PyTorch and PIL lay them out.
        batch_size: the most images in one batch.

    Raises:
        FewstepError: for anything else, for images of several sizes, and for NaN; the message names the value.
    """
    if batch_size < 1:
        raise FewstepError(f"batch_size is {batch_size}; give at least 1")
    shape: tuple[int, ...] | None = None
    for item in _grouped(images, batch_size):
        stack = _channels_first(item)
        for start in range(0, len(stack), batch_size):
            batch = stack[start : start + batch_size]
            if shape is not None and tuple(batch.shape[1:]) != shape:
                raise FewstepError(f"images have shapes (C, H, W) {shape} and {tuple(batch.shape[1:])}; give one size")
            shape = tuple(batch.shape[1:])
            yield to_uint8(batch).cpu()


def _grouped(images: Images, batch_size: int) -> Iterator[Tensor | npt.NDArray[Any]]:
    """Arrays as they come; PIL images stacked, ``batch_size`` at a time, so that a list is not run one by one."""
    if isinstance(images, Tensor | np.ndarray):
        yield images
        return
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, str | bytes) or not isinstance(images, Iterable):
        raise FewstepError(f"images are a {type(images).__name__}; give a tensor, an array, PIL images or batches")
    waiting: list[npt.NDArray[np.uint8]] = []
    for item in images:
        if isinstance(item, Image.Image):
            waiting.append(_pil_array(item, waiting[0].shape if waiting else None))
            if len(waiting) == batch_size:
                yield np.stack(waiting)
                waiting = []
        elif isinstance(item, Tensor | np.ndarray):
            yield item
        else:
            raise FewstepError(f"an item of images is a {type(item).__name__}; give PIL images, or tensors or arrays")
    if waiting:
        yield np.stack(waiting)


def _pil_array(image: Image.Image, shape: tuple[int, ...] | None) -> npt.NDArray[np.uint8]:
    if image.mode not in _PIL_CHANNELS:
        raise FewstepError(f"a PIL image has mode {image.mode!r}; convert it to 'L' or 'RGB'")
    array = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, _PIL_CHANNELS[image.mode])
    if shape is not None and array.shape != shape:
        raise FewstepError(f"images have shapes (H, W, C) {shape} and {array.shape}; give one size")
    return array


def _channels_first(images: Tensor | npt.NDArray[Any]) -> Tensor:
    array_like = isinstance(images, np.ndarray)
    tensor = torch.as_tensor(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    if tensor.ndim == 3:
        return tensor.unsqueeze(1)
    if tensor.ndim == 4:
        first, last = tensor.shape[1] in CHANNELS, tensor.shape[3] in CHANNELS
        if last and (array_like or not first):
            return tensor.permute(0, 3, 1, 2)
        if first:
            return tensor
    raise FewstepError(
        f"images have shape {tuple(tensor.shape)}; give (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
    )
