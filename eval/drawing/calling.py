"""How each family of pipelines is asked for images: with prompts, with classes, or with nothing but their number."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError

Family = Literal["text", "class", "unconditional"]

# What a call takes tells the family, so that pipelines nobody here has heard of are asked rightly too. The first hit
# counts: a pipeline that takes prompts may take other things beside them.
_TOLD_BY: dict[str, Family] = {"prompt": "text", "class_labels": "class", "batch_size": "unconditional"}
# Some pipelines refuse one negative prompt beside several prompts.
_TEXT = re.compile(r"(negative_)?prompt(_\d+)?")
_NEEDED = ("generator", "num_inference_steps", "output_type")


def family(pipeline_class: type[Any]) -> Family:
    """What the images of a pipeline class are asked for with, from the signature of its call.

    Raises:
        FewstepError: where the call takes neither prompts, nor classes, nor a number of images, or lacks an argument
            without which image i could not be made from seed i.
    """
    takes = _parameters(pipeline_class)
    missing = [name for name in _NEEDED if name not in takes]
    if missing:
        raise FewstepError(
            f"{pipeline_class.__name__} cannot be asked for images: its call lacks {', '.join(missing)}; "
            f"give a pipeline whose call takes {', '.join(_NEEDED)}"
        )
    for argument, told in _TOLD_BY.items():
        if argument in takes:
            return told
    raise FewstepError(
        f"{pipeline_class.__name__} cannot be asked for images: its call takes none of {', '.join(_TOLD_BY)}"
    )


def guided(pipeline_class: type[Any]) -> bool:
    """Whether a pipeline class takes a classifier-free guidance scale."""
    return "guidance_scale" in _parameters(pipeline_class)


def call_defaults(pipe: Any) -> dict[str, Any]:
    """What a pipeline is given unless the caller says otherwise.

    The embedded Stable Diffusion 3 has no third text encoder. Its pipeline then fills ``max_sequence_length`` tokens
    with zeros, 256 of them beside 16 of the image. The model was trained with 1 as well, at an eighth of the work;
    other models without that encoder may not have been, so theirs stays what the pipeline takes.
    """
    lacks_encoder = hasattr(pipe, "text_encoder_3") and pipe.text_encoder_3 is None
    return {"max_sequence_length": 1} if lacks_encoder and _embedded(pipe) else {}


def ask(
    pipe: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float,
    call: Mapping[str, Any] | None = None,
) -> Tensor:
    """One image for every generator, float (n, C, H, W) in [0, 1]; arguments as of :func:`request`.

    Raises:
        FewstepError: as :func:`request` does, and for what is no batch of pictures.
    """
    arguments = request(pipe, prompts, generators, steps=steps, guidance=guidance, call=call)
    return _pictures(pipe(**arguments), type(pipe).__name__)


def request(
    pipe: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float,
    call: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The arguments with which a pipeline is asked for one image a generator.

    Args:
        pipe: a diffusers pipeline.
        prompts: one a generator. The labels where the pipeline draws classes; not looked at where it draws neither.
        generators: on the CPU, one a sample.
        steps: ``num_inference_steps``.
        guidance: classifier-free guidance scale, handed on where the pipeline takes one.
        call: further arguments, over what :func:`call_defaults` and this function choose. A prompt or negative prompt
            that is one string is that of every image.

    Raises:
        FewstepError: for a pipeline that cannot be asked, a label that it does not know, or an argument that it lacks or
            does not take.
    """
    kind = family(type(pipe))
    arguments: dict[str, Any] = {
        "generator": list(generators),
        "num_inference_steps": steps,
        "output_type": "pt",
        **call_defaults(pipe),
    }
    if kind == "text":
        arguments["prompt"] = list(prompts)
    elif kind == "class":
        arguments["class_labels"] = _labels(pipe, prompts)
    else:
        arguments["batch_size"] = len(generators)
    if guided(type(pipe)):
        arguments["guidance_scale"] = guidance
    for name, value in (call or {}).items():
        of_each = isinstance(value, str) and _TEXT.fullmatch(name)
        arguments[name] = [value] * len(generators) if of_each else value
    _check(type(pipe), arguments)
    return arguments


def _parameters(pipeline_class: type[Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline_class.__call__).parameters


def _check(pipeline_class: type[Any], arguments: Mapping[str, Any]) -> None:
    """One sentence instead of a TypeError from the depths of the call."""
    takes = {name: p for name, p in _parameters(pipeline_class).items() if name != "self"}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    strange = [name for name in arguments if name not in takes]
    if strange and not open_ended:
        raise FewstepError(f"{pipeline_class.__name__} takes no {', '.join(strange)}; it takes {', '.join(takes)}")
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [name for name, p in takes.items() if p.default is p.empty and p.kind not in variadic]
    if missing := [name for name in needed if name not in arguments]:
        raise FewstepError(f"{pipeline_class.__name__} also needs {', '.join(missing)}; give them in call")


def _labels(pipe: Any, prompts: Sequence[str]) -> list[int]:
    """The class numbers of labels; a pipeline that names none takes the numbers themselves."""
    labels: Mapping[str, int] = getattr(pipe, "labels", None) or {}
    if labels:
        for prompt in prompts:
            if prompt not in labels:
                near = difflib.get_close_matches(prompt, labels, n=3) or list(labels)[:3]
                raise FewstepError(
                    f"{type(pipe).__name__} knows no class {prompt!r}; it knows {len(labels)}, such as "
                    + ", ".join(map(repr, near))
                )
        return [labels[prompt] for prompt in prompts]
    try:
        return [int(prompt) for prompt in prompts]
    except ValueError:
        raise FewstepError(
            f"{type(pipe).__name__} names no classes; give their numbers as prompts, such as '0', not {prompts[0]!r}"
        ) from None


def _pictures(output: Any, name: str) -> Tensor:
    """Some pipelines know "pt", others give arrays (n, H, W, C) for whatever is not "pil"."""
    images = output.images if hasattr(output, "images") else output
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    if isinstance(images, Tensor) and images.ndim == 4:
        return images
    shape = getattr(images, "shape", None)
    shown = f"a {type(images).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else "")
    raise FewstepError(f"{name} made {shown}; a batch of pictures (n, C, H, W) is needed")


def _embedded(pipe: Any) -> bool:
    from fewstep.pipelines.zoo import folders

    origin = getattr(pipe, "config", {}).get("_name_or_path") or ""
    return folders.WEIGHTS.resolve() in Path(str(origin)).resolve().parents
