"""Trains fashion-clip: the text tower that conditions the diffusion models, and the towers that CLIP score needs."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..classes import PLAIN_PROMPTS
from . import captions, data, tokenizer
from .classifier import augment
from .loop import batch_indices
from .task import Settings


class ClipTask:
    """Contrastive training on images and captions; equal captions in a batch count as equally right.

    Only the distinct captions of a batch are embedded. Weighting each by its count gives the same loss as embedding
    them all.
    """

    def __init__(self, name: str, settings: Settings, text: dict[str, Any], vision: dict[str, Any], width: int) -> None:
        self.name = name
        self.settings = settings
        self.text = text
        self.vision = vision
        self.width = width

    @cached_property
    def token_ids(self) -> torch.Tensor:
        """Token ids (captions, longest) of all captions by their id."""
        ids = tokenize(captions.CAPTIONS)
        end = (ids == ids[0, -1]).int().argmax(dim=1)
        # The tower is causal and pooled at the first end token: what follows the longest caption changes nothing.
        return ids[:, : int(end.max()) + 1]

    @cached_property
    def attributes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Brightness and width of the training images."""
        split = data.load("train")
        return captions.measure(split.images, split.labels)

    def build(self) -> nn.Module:
        vocabulary = built_tokenizer()
        special = {
            "vocab_size": len(vocabulary),
            "max_position_embeddings": tokenizer.MAX_LENGTH,
            "bos_token_id": vocabulary.bos_token_id,
            "eos_token_id": vocabulary.eos_token_id,
            "pad_token_id": vocabulary.pad_token_id,
        }
        text = {**self.text, **special, "projection_dim": self.width}
        vision = {**self.vision, "projection_dim": self.width}
        model: nn.Module = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=self.width))
        return model

    def loss(self, module: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        assert isinstance(module, CLIPModel)
        split = data.load("train")
        indices = batch_indices(len(split), self.settings.batch_size, step, self.settings.seed)
        brightness, width = (attribute[indices] for attribute in self.attributes)
        drawn = captions.draw(split.labels[indices], brightness, width, generator)
        distinct, position, count = torch.unique(drawn, return_inverse=True, return_counts=True)
        pixels = pixel_values(augment(data.to_unit(split.images[indices]), generator))
        text = F.normalize(text_embeddings(module, self.token_ids[distinct]), dim=-1)
        image = F.normalize(image_embeddings(module, pixels), dim=-1)
        logits = module.logit_scale.exp().clamp(max=100) * image @ text.T
        to_text = F.cross_entropy(logits + count.log(), position) + count[position].log().mean()
        to_image = -logits.log_softmax(dim=0)[torch.arange(len(position)), position].mean()
        loss: torch.Tensor = (to_text + to_image) / 2
        return loss

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, CLIPModel)
        split = data.load("test")
        text = F.normalize(text_embeddings(module, tokenize(PLAIN_PROMPTS)), dim=-1)
        correct = 0
        for images, labels in zip(torch.split(split.images, 500), torch.split(split.labels, 500), strict=True):
            image = image_embeddings(module, pixel_values(data.to_unit(images)))
            correct += int(((image @ text.T).argmax(1) == labels).sum())
        return {"zero_shot_accuracy": correct / len(split)}

    def export(self, module: Any, folder: Path) -> None:
        from transformers import CLIPImageProcessor

        module.to(torch.float16).save_pretrained(folder)
        tokenizer.save(captions.CAPTIONS, folder)
        half = [0.5, 0.5, 0.5]
        size = {"height": data.SIZE, "width": data.SIZE}
        CLIPImageProcessor(
            size=size, do_center_crop=False, do_convert_rgb=True, image_mean=half, image_std=half
        ).save_pretrained(folder)


def built_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the fashion models, built anew."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(captions.CAPTIONS, Path(folder))
        built: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
        return built


def tokenize(prompts: tuple[str, ...]) -> torch.Tensor:
    """Token ids (N, 16), padded as StableDiffusionPipeline pads them."""
    encoded = built_tokenizer()(
        list(prompts), padding="max_length", max_length=tokenizer.MAX_LENGTH, truncation=True, return_tensors="pt"
    )
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    """Grey images (N, 1, 32, 32) in [0, 1] to the three channels in [-1, 1] that the vision tower takes."""
    return (2 * images - 1).expand(-1, 3, -1, -1)


def text_embeddings(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Projected text embeddings, not normalised."""
    embeddings: torch.Tensor = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    return embeddings


def image_embeddings(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Projected image embeddings, not normalised."""
    embeddings: torch.Tensor = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return embeddings
