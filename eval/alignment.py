"""Does the image show what its prompt says: CLIP score and class accuracy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError, unknown
from fewstep.eval import fingerprint
from fewstep.eval.distribution.features import inference, module_device
from fewstep.eval.images import ROUNDING, Images, batches
from fewstep.eval.score import Score, recipe

ClipLike: TypeAlias = "str | Path | tuple[nn.Module, Any] | Clip"


@dataclass(frozen=True)
class Clip:
    """A CLIP with a name to print.

    Attributes:
        name: as it stands in recipes: the registered name, the path, or ``Class:hash`` for a model of the caller's.
        model: a transformers CLIPModel.
        processor: its CLIPProcessor.
        sha256: hash of the weights.
    """

    name: str
    model: Any
    processor: Any
    sha256: str

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 cos(image, prompt) of uint8 images (n, C, H, W) and their n prompts: (n,) float64 on the CPU.

        Raises:
            FewstepError: for another number of prompts than images.
        """
        if len(prompts) != len(images):
            raise FewstepError(f"there are {len(prompts)} prompts for {len(images)} images; give one each")
        with inference(self.model):
            pictures = _unit(self._embed_images(images))
            words = _unit(self._embed_texts(list(prompts)))
        return 100 * (pictures * words).sum(dim=-1).double().cpu()

    def _embed_images(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1 and self.model.config.vision_config.num_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return _pooled(self.model.get_image_features(pixel_values=pixels.to(module_device(self.model))))

    def _embed_texts(self, prompts: list[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.processor(text=prompts, return_tensors="pt", padding=True)
        if tokens["input_ids"].shape[-1] > longest:
            warnings.warn(f"captions of more than {longest} tokens are cut to that length", stacklevel=4)
            tokens = self.processor(
                text=prompts, return_tensors="pt", padding=True, truncation=True, max_length=longest
            )
        device = module_device(self.model)
        return _pooled(
            self.model.get_text_features(
                input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
            )
        )


def load_clip(model: ClipLike) -> Clip:
    """The CLIP of that name, folder or hub id, or the caller's own.

    Args:
        model: ``"fashion"``; a folder or hub id that ``transformers`` can load a CLIPModel and CLIPProcessor from; or
            the pair (model, processor) itself.

    Raises:
        FewstepError: for anything else, or a folder that does not load.
    """
    if isinstance(model, Clip):
        return model
    if isinstance(model, tuple):
        if len(model) != 2 or not isinstance(model[0], nn.Module):
            raise FewstepError("model is a tuple that is not (CLIPModel, CLIPProcessor)")
        sha256 = fingerprint.of_module(model[0])
        return Clip(f"{type(model[0]).__name__}:{sha256[:8]}", *model, sha256)
    name = str(model)
    if name == "fashion":
        from fewstep.pipelines import zoo

        net, processor = zoo.clip()
    elif "/" in name or Path(name).is_dir():
        net, processor = _from_pretrained(name)
    else:
        raise FewstepError(f"unknown CLIP {name!r}; known: 'fashion', or give a folder, a hub id or a pair")
    return Clip(name, net, processor, fingerprint.of_module(net))


def _from_pretrained(name: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(name), CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FewstepError(f"no CLIP can be loaded from {name!r}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class ClipDefinition:
    """One of the numbers that go by the name of CLIP score.

    Attributes:
        scale: what the cosine is multiplied with.
        clamp: where negative cosines become 0: in every ``sample``, or only if the ``mean`` is negative.
        prefix: what stands before every prompt.
        recipe: how it stands in recipes.
    """

    scale: float
    clamp: Literal["sample", "mean"]
    prefix: str
    recipe: str


DEFINITIONS = {
    "torchmetrics": ClipDefinition(100, "mean", "", "100cos"),
    "hessel": ClipDefinition(2.5, "sample", "A photo depicts ", "2.5max(cos,0), 'A photo depicts '"),
}


def clip_definition(name: str) -> ClipDefinition:
    """The definition of that name. Raises FewstepError where there is none."""
    if name not in DEFINITIONS:
        raise FewstepError(unknown("definition of the CLIP score", name, DEFINITIONS))
    return DEFINITIONS[name]


class ClipStream:
    """CLIP score of images and prompts that come batch by batch; see :func:`clip_score`."""

    def __init__(self, clip: Clip, definition: str = "torchmetrics") -> None:
        self._clip, self._definition = clip, clip_definition(definition)
        self._values: list[Tensor] = []

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add uint8 images (n, C, H, W) and their n prompts."""
        d = self._definition
        values = d.scale / 100 * self._clip.scores(images, [d.prefix + prompt for prompt in prompts])
        self._values.append(values.clamp(min=0) if d.clamp == "sample" else values)

    def score(self) -> Score:
        """The score so far. Raises FewstepError where there were no images."""
        if not self._values:
            raise FewstepError("there are no images")
        values = torch.cat(self._values).numpy()
        made = recipe("clip_score", self._clip.name, self._definition.recipe, ROUNDING, f"N={len(values)}")
        return Score(max(float(values.mean()), 0.0), made, len(values), values)


def _pooled(output: Any) -> Tensor:
    """The projected embedding: transformers 4 returns it, transformers 5 returns it as ``pooler_output``."""
    tensor: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return tensor


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def clip_score(
    images: Images,
    prompts: Sequence[str],
    model: ClipLike = "fashion",
    batch_size: int = 250,
    definition: str = "torchmetrics",
) -> Score:
    """How well images fit their prompts: the cosine of their CLIP embeddings, in one of two definitions.

        torchmetrics: max(0, mean_i 100 cos_i)                                 0..100
        hessel:       mean_i 2.5 max(cos_i, 0), prompts after "A photo depicts "   0..2.5

    The first clamps the mean of all images, so images with a negative cosine pull it down; the second clamps each of
    them, as its paper has it. Without a negative cosine, and up to the prefix, the first is 40 times the second. Scores
    of two CLIP models are never comparable; the model stands in the recipe. Captions beyond the model's context are cut
    with a warning, the end token kept (torchmetrics cuts the end token off).

    Args:
        images: in any form that :func:`~fewstep.eval.images.batches` takes; one grey channel is repeated where the
            model expects three.
        prompts: one a image.
        model: ``"fashion"``, a folder or hub id, or (CLIPModel, CLIPProcessor).
        batch_size: images in one pass.
        definition: ``"torchmetrics"`` or ``"hessel"``.

    Returns:
        The score; as ``per_sample`` the single values, which torchmetrics' definition leaves unclamped.

    Raises:
        FewstepError: for bad images, another number of prompts than images, no images, or an unknown model or
            definition.

    References:
        Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", arXiv:2104.08718,
        section 3. torchmetrics 1.9, ``functional/multimodal/clip_score.py``.
    """
    if isinstance(prompts, str):
        raise FewstepError("prompts is one string; give a list with one prompt for each image")
    clip_definition(definition)  # before the model is loaded
    stream = ClipStream(load_clip(model), definition)
    done = 0
    for batch in batches(images, batch_size):
        stream.update(batch, prompts[done : done + len(batch)])
        done += len(batch)
    if done != len(prompts):
        raise FewstepError(f"there are {len(prompts)} prompts for {done} images; give one each")
    return stream.score()


def prompted_class(prompt: str, classes: Sequence[str]) -> int:
    """Index of the class that ``prompt`` names; the longest name wins ("t-shirt" before "shirt").

    Raises:
        FewstepError: where the prompt names none.
    """
    text = prompt.lower()
    named = [c for c in classes if re.search(rf"(?<![\w-]){re.escape(c.lower())}(?![\w-])", text)]
    if not named:
        raise FewstepError(f"prompt {prompt!r} names none of the classes {', '.join(classes)}")
    return list(classes).index(max(named, key=len))


def hits(logits: Tensor, prompts: Sequence[str], classes: Sequence[str]) -> list[bool]:
    """Of each image whether its largest logit, of (n, classes), is that of the class that its prompt names.

    Raises:
        FewstepError: for another number of prompts than images, or one that names no class.
    """
    if len(prompts) != len(logits):
        raise FewstepError(f"there are {len(prompts)} prompts for {len(logits)} images; give one each")
    number = {prompt: prompted_class(prompt, classes) for prompt in set(prompts)}
    wanted = torch.tensor([number[prompt] for prompt in prompts])
    right: list[bool] = (logits.argmax(dim=-1).cpu() == wanted).tolist()
    return right


def accuracy(right: Sequence[bool], name: str, classes: Sequence[str]) -> Score:
    """The share of right images in percent, by the classifier of that name. Raises FewstepError for no images."""
    if not right:
        raise FewstepError("there are no images")
    values = 100 * np.asarray(right, dtype=np.float64)
    made = recipe("accuracy", name, f"{len(classes)} classes", ROUNDING, f"N={len(values)}")
    return Score(float(values.mean()), made, len(values), values)


class AccuracyStream:
    """How often a classifier sees the class that the prompt names.

    Args:
        classifier: has ``logits(images)``, (n, classes) of uint8 images (n, C, H, W).
        classes: names, in the order of the logits.
        name: of the classifier, for the recipe.
    """

    def __init__(self, classifier: Any, classes: Sequence[str], name: str) -> None:
        self._classifier, self._classes, self._name = classifier, tuple(classes), name
        self._right: list[bool] = []

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Add uint8 images (n, C, H, W) and their n prompts."""
        with inference(self._classifier):
            logits = self._classifier.logits(images.to(module_device(self._classifier)))
        self._right += hits(logits, prompts, self._classes)

    def score(self) -> Score:
        """The share of right images in percent. Raises FewstepError where there were no images."""
        return accuracy(self._right, self._name, self._classes)
