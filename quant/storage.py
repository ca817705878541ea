"""Quantised networks on disk: one JSON with the plan, one safetensors file with every array. Never pickle.

Nothing else is needed to have the network back, so the float weights need not be there. What is not quantised is stored in
the fewest bytes that keep every bit, or in fewer, see :mod:`.rest`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.artifact import read_json, read_tensors, write_with_tensors
from fewstep.errors import ArtifactError, FewstepError, PlanError
from fewstep.quant.attention.install import check as check_attention
from fewstep.quant.attention.install import install
from fewstep.quant.layers.base import ARRAYS, QuantLayer
from fewstep.quant.layers.build import build
from fewstep.quant.layers.moment import follow_times_
from fewstep.quant.plan import QuantPlan
from fewstep.quant.rest import Rest, check, packed, restored
from fewstep.quant.sites import architecture, canonical, quantized_layers, sites
from fewstep.quant.state import RECORD, Record, check_untouched, swap, unwrapped

INDEX = "quantized.json"
_KEYS = ("plan", "dtypes", "layer_dtypes", "eight", "names", "arrays", "arrays_sha256")


def save(module: nn.Module, folder: str | Path, *, rest: Rest = "exact") -> Path:
    """Write a quantised network to ``folder``; whole or not at all.

    Args:
        rest: how what the plan leaves in floating point is stored: ``exact``, bit for bit; ``float16``; or ``int8``, its
            large matrices (embeddings, tables of classes, low-rank branches) with 8 bits and a scale a row. Rounding those
            moves weights by some 0.4 %, far less than 4-bit codes do; quantised codes and scales are always exact.

    Returns:
        The path of the JSON file, ``quantized.json``; the arrays lie beside it.

    Raises:
        FewstepError: for a network that is not quantised, or an unknown ``rest``.
    """
    check(rest)
    model = unwrapped(module)
    record: Record | None = getattr(model, RECORD, None)
    if record is None:
        raise FewstepError(f"{type(model).__name__} is not quantised; quantize_ it first, or save it as diffusers does")
    if any(getattr(layer, "added", 0) for layer in quantized_layers(model).values()):
        raise FewstepError("adapters were added to the branches; remove_lora_ first, and keep them in their own file")
    tensors: dict[str, Tensor] = {}
    dtypes, eight = {}, {}
    buffers = {canonical(name) for name, _ in model.named_buffers()}
    seen: set[int] = set()
    for name, value in _tensors(model):
        array = value.detach().cpu()
        array = array.clone() if array.data_ptr() in seen else array  # tied: one number under two names
        seen.add(array.data_ptr())
        kept, how = packed(name, array, rest, buffer=name in buffers)
        if how is not None:
            eight[name] = how
        if how is not None or kept[name].dtype != value.dtype:
            dtypes[name] = str(value.dtype).removeprefix("torch.")
        tensors |= kept
    layer_dtypes = {
        name: str(next(m.dtype for m in layer.modules() if hasattr(m, "memory"))).removeprefix("torch.")
        for name, layer in quantized_layers(model).items()
    }
    path = Path(folder) / INDEX
    body: dict[str, Any] = {
        "plan": record.plan.to_json(),
        "dtypes": dtypes,
        "layer_dtypes": layer_dtypes,
        "eight": eight,
    }
    body["names"] = sorted(tensors)
    write_with_tensors(path, "QuantizedModel", body, tensors)
    return path


def load_(module: nn.Module, folder: str | Path, *, backend: str = "auto") -> QuantPlan:
    """Make a float network of the right architecture the one that was saved in ``folder``, in place.

    Its weights are not read and may be on the meta device: make the network from its config there, then load. All arrays
    are checked before anything changes.

    Returns:
        The plan it was quantised by.

    Raises:
        ArtifactError: missing, damaged, of another version, or for another architecture.
        FewstepError: for a network that is quantised already.

    Example:
        >>> with torch.device("meta"):
        ...     unet = UNet2DConditionModel.from_config(config)
        >>> quant.load_(unet, "unet-int8")
    """
    model = unwrapped(module)
    check_untouched(model)
    path = Path(folder) / INDEX
    body = read_json(path, "QuantizedModel", required=_KEYS)
    for key, kind, right in (("dtypes", dict, "a table"), ("layer_dtypes", dict, "a table"), ("names", list, "a list")):
        if not isinstance(body[key], kind):
            raise ArtifactError(f"{path}: {key} is {body[key]!r:.60}; it is {right}")
    try:
        plan = QuantPlan.from_json(body["plan"])
    except PlanError as error:
        raise ArtifactError(f"{path}: {error}") from None
    if plan.fingerprint != architecture(model):
        raise ArtifactError(
            f"{path} holds a {plan.model} with fingerprint {plan.fingerprint}; this {type(model).__name__} has "
            f"{architecture(model)}: another class, or other sizes in its config"
        )
    name = str(body["arrays"])
    if Path(name).name != name:
        raise ArtifactError(f"{path} names its arrays {name!r}; they lie beside it")
    stored = _restored(path, read_tensors(path.with_name(name), body["arrays_sha256"], body["names"]), body["eight"])
    tensors = {key: value.to(_dtype(body["dtypes"].get(key), value.dtype)) for key, value in stored.items()}
    check_attention(model, plan.attention)
    layers = _layers(model, plan, tensors, body["layer_dtypes"], path, backend)
    rest = {key: value for key, value in tensors.items() if not key.startswith(tuple(f"{n}." for n in layers))}
    places = _places(model, set(layers))
    if differing := set(rest) ^ set(places):
        raise ArtifactError(f"{path} and this {type(model).__name__} differ in {min(differing)}")
    for key, value in rest.items():
        if value.shape != places[key].shape:
            raise ArtifactError(
                f"{path}: {key} has shape {tuple(value.shape)}, the model's has {tuple(places[key].shape)}"
            )
    swap(model, layers)
    install(model, plan.attention)
    _assign(model, rest)
    follow_times_(model)
    setattr(model, RECORD, Record(plan, {}))
    return plan


def _restored(path: Path, tensors: Mapping[str, Tensor], eight: Any) -> dict[str, Tensor]:
    try:
        return restored(tensors, eight)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, FewstepError) as error:
        raise ArtifactError(f"{path} describes its 8-bit matrices wrongly: {error}") from None


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer by its canonical name, non-persistent buffers too: a model made on meta lacks them."""
    found = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(canonical(name), value) for name, value in found if "lora_" not in name]


def _places(model: nn.Module, quantized: set[str]) -> dict[str, Tensor]:
    starts = tuple(f"{name}." for name in quantized)
    return {name: value for name, value in _tensors(model) if not name.startswith(starts)}


def _layers(
    model: nn.Module,
    plan: QuantPlan,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, str],
    path: Path,
    backend: str,
) -> dict[str, nn.Module]:
    made = {}
    for site in sites(model):
        if site.name not in plan.layers:
            continue
        start = f"{site.name}."
        arrays = {key[len(start) :].removeprefix("parts."): v for key, v in tensors.items() if key.startswith(start)}
        if not arrays or any(key.split(".")[-1] not in ARRAYS for key in arrays):
            raise ArtifactError(f"{path} has no arrays, or unknown ones, for {site.name}")
        made[site.name] = layer = build(site.module, plan.layers[site.name], arrays)
        for part in layer.modules():
            if isinstance(part, QuantLayer):
                part.dtype = _dtype(dtypes.get(site.name), torch.float32)
                part.backend = backend
    return made


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    paths = {canonical(name): name for name, _ in named}
    for key, value in tensors.items():
        parent, _, last = paths[key].rpartition(".")
        holder = model.get_submodule(parent)
        before = holder._parameters.get(last)
        if last in holder._buffers:
            holder._buffers[last] = value if holder._buffers[last].is_meta else value.to(holder._buffers[last].device)  # type: ignore[union-attr]
        else:
            assert before is not None
            here = value if before.is_meta else value.to(before.device)
            holder._parameters[last] = nn.Parameter(
                here, requires_grad=before.requires_grad and value.is_floating_point()
            )


def _dtype(name: Any, otherwise: torch.dtype) -> torch.dtype:
    found = getattr(torch, str(name), None) if name is not None else otherwise
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"{name!r} is no dtype of torch")
    return found
