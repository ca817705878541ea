"""Every accepted form of images becomes the same uint8 batches; everything else is refused by value."""

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.eval.images import batches, to_uint8


def gather(images, batch_size: int = 4) -> torch.Tensor:
    parts = list(batches(images, batch_size))
    assert all(1 <= len(part) <= batch_size for part in parts)
    return torch.cat(parts)


@pytest.fixture
def rgb() -> torch.Tensor:
    return torch.randint(0, 256, (7, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_all_forms_are_the_same_images(rgb):
    last = rgb.permute(0, 2, 3, 1)
    forms = [
        rgb,
        last,
        rgb.numpy(),
        last.numpy(),
        [Image.fromarray(image) for image in last.numpy()],
        (part for part in rgb.split(3)),
        rgb.double() / 255,
        rgb.float() / 255,
    ]
    for form in forms:
        assert torch.equal(gather(form), rgb)


def test_grey_forms(rgb):
    grey = rgb[:, :1]
    forms = [grey, grey[:, 0], grey[:, 0].numpy(), [Image.fromarray(image) for image in grey[:, 0].numpy()]]
    for form in forms:
        assert torch.equal(gather(form), grey)
    assert torch.equal(gather(Image.fromarray(grey[0, 0].numpy())), grey[:1])


def test_ambiguous_shapes_are_read_as_their_library_lays_them_out():
    shape = (2, 3, 5, 3)
    assert gather(torch.zeros(shape, dtype=torch.uint8)).shape == (2, 3, 5, 3)
    assert gather(np.zeros(shape, dtype=np.uint8)).shape == (2, 3, 3, 5)


def test_every_grey_level_survives_and_halves_round_up():
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(levels.to(dtype) / 255), levels)
    halves = (torch.arange(255, dtype=torch.float64) + 0.5 + 1e-4) / 255
    assert torch.equal(to_uint8(halves), levels[1:])
    assert torch.equal(to_uint8(halves - 2e-4 / 255), levels[:-1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 1, 4, 4), float("nan")), "NaN"),
        (torch.full((2, 1, 4, 4), -1.0), r"\[-1, -1\]"),
        (torch.full((2, 1, 4, 4), 255.0), r"\[255, 255\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), "int64"),
        (torch.zeros(2, 4, 8, 8), r"\(2, 4, 8, 8\)"),
        (torch.zeros(8, 8), r"\(8, 8\)"),
        ([torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 5, 5)], "one size"),
        ([Image.new("RGBA", (4, 4))], "RGBA"),
        ([Image.new("L", (4, 4)), Image.new("L", (5, 4))], "one size"),
        (["picture.png"], "str"),
        ("folder", "str"),
        (3, "int"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        gather(images)


def test_batch_size_must_be_positive(rgb):
    with pytest.raises(ValueError, match="batch_size is 0"):
        list(batches(rgb, 0))
