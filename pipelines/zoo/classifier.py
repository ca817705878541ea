"""The feature network of the fashion models: a small residual classifier whose pooled features FID is measured in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fewstep.errors import FewstepError

from .classes import CLASSES


class FashionFeatures(nn.Module):
    """Classifies 32 x 32 grey garments; its 128 pooled activations are the features.

    Args:
        widths: channels of the three stages, at 16 x 16, 8 x 8 and 4 x 4. The last is the feature dimension.
        classes: number of classes.
    """

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128), classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.config = {"widths": list(widths), "classes": classes}
        channels = widths[0]
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(channels))
        stages: list[nn.Module] = []
        for stage, width in enumerate(widths):
            stages += [_Block(channels, width, stride=1 if stage == 0 else 2)]
            channels = width
        self.stages = nn.Sequential(*stages, _Block(channels, channels, stride=1))
        self.head = nn.Linear(channels, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, 128), float32, of images (N, 1, 32, 32): uint8, or float in [0, 1]."""
        if images.ndim != 4 or images.shape[1:] != (1, 32, 32):
            raise FewstepError(f"images have shape {tuple(images.shape)}; fashion-features takes (N, 1, 32, 32)")
        if not images.is_floating_point():
            images = images.float() / 255
        hidden = F.relu(self.stem((images.to(self.head.weight.dtype) - 0.5) * 2))
        features: torch.Tensor = self.stages(hidden).mean(dim=(2, 3)).float()
        return features

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (N, 10) of images as in :meth:`forward`."""
        scores: torch.Tensor = self.head(self(images))
        return scores

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` in the module's own dtype."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": "FashionFeatures", **self.config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FashionFeatures:
        """Loads what :meth:`save_pretrained` wrote, as float32 and in eval mode."""
        from safetensors.torch import load_file

        config = json.loads((Path(folder) / "config.json").read_text())
        network = cls(tuple(config["widths"]), config["classes"])
        network.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return network.float().eval()


class _Block(nn.Module):
    """Two 3 x 3 convolutions beside a (projected) identity."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(hidden) + self.skip(hidden))
