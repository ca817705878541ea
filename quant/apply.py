"""quantize_ and dequantize_: the executor of plans. A network is changed at the very end, all layers at once, or not at all."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.eval.costs.memory import model_bytes
from fewstep.quant.attention.install import install, remove
from fewstep.quant.attention.plan import AttentionPlan
from fewstep.quant.backends import named
from fewstep.quant.calibration.calls import Call, as_calls
from fewstep.quant.calibration.checkpoint import Checkpoint
from fewstep.quant.calibration.inputs import LayerInputs, gather
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.layers.build import build, unbuild
from fewstep.quant.layers.moment import follow_times_, forget_times_
from fewstep.quant.methods.base import Method
from fewstep.quant.methods.mixed import MixedPrecision
from fewstep.quant.plan import QuantPlan, make_plan
from fewstep.quant.report import QuantReport
from fewstep.quant.sites import Site, quantized_layers, sites
from fewstep.quant.state import RECORD, Record, check_untouched, evaluating, swap, twin, unwrapped


def quantize_(
    module: nn.Module,
    config: Method | QuantPlan | AttentionPlan,
    calibration: Any = None,
    *,
    attention: AttentionPlan | Mapping[str, AttentionPlan] | None = None,
    keep_originals: bool = True,
    backend: str = "auto",
    checkpoint: str | Path | None = None,
    rows: int = 2048,
    budget: int = 2**30,
    progress: bool = False,
) -> QuantReport:
    """Quantise a network in place.

    Args:
        module: a denoiser or any other network, such as ``pipe.unet`` or ``pipe.transformer``.
        config: a method with its settings; a plan, whose layers are rounded to the nearest; or an attention's plan, for
            all attentions and nothing else.
        calibration: calls of the network, see :func:`~fewstep.quant.record`; dicts of keywords, tuples or single tensors
            will do. Not needed by plain rounding.
        attention: attentions in 8 bits besides the layers: one plan for all, or by name or pattern (``*``).
        keep_originals: keep the float layers beside, so that :func:`dequantize_` gives back every bit. Costs their memory.
        backend: which backend computes the layers; ``auto`` chooses by device, formats and shape.
        checkpoint: a folder in which finished layers are kept while calibration runs; the same call goes on from there.
        rows: rows of each layer's inputs that calibration looks at.
        budget: bytes of inputs that are held at once.
        progress: show a bar.

    Returns:
        What was done.

    Raises:
        PlanError: a layer that the network lacks or that cannot take its format; a plan for another network.
        FewstepError: bad calibration data, a network that is quantised or offloaded already, an unknown backend, or one
            that cannot compute the plan. In all cases the network is as it was.

    Example:
        >>> calls = quant.record(pipe, prompts, num_inference_steps=20)
        >>> report = quant.quantize_(pipe.unet, quant.SVDQuant(rank=32), calibration=calls)
    """
    started = time.monotonic()
    model = unwrapped(module)
    if isinstance(config, AttentionPlan):
        empty = make_plan(model, lambda site: "attention only", "AttentionPlan", may_be_empty=True)
        config = empty.with_attention(model, config)
    method = config if isinstance(config, Method) else None
    if isinstance(config, QuantPlan):
        method = MixedPrecision(config)
    if method is None:
        raise FewstepError(f"config is a {type(config).__name__}; give one such as quant.Int8(), or a QuantPlan")
    if backend != "auto":
        named(backend)
    check_untouched(model)
    calls = as_calls(calibration)
    if method.inputs and not calls:
        raise FewstepError(f"{type(method).__name__} looks at what layers see; give calibration, see quant.record")
    before = sum(model_bytes(model).values())
    with evaluating(model):
        plan = method.plan(model, calls)
        plan = (plan if attention is None else plan.with_attention(model, attention)).validate(model)
        made = _solve(model, method, plan, calls, checkpoint, rows, budget, progress)
        quantized = _assembled(model, plan, made, backend)
        record = Record(plan, {})
        record.originals = swap(model, quantized)
        follow_times_(model)
        try:
            install(model, plan.attention)
            record_noise = _noise(record.originals, quantized)
            findings, error = _finish(model, record, method, calls)
            _check_backends(quantized, model, calls)
        except BaseException:
            swap(model, record.originals)
            forget_times_(model)
            remove(model)
            raise
    if not keep_originals:
        record.originals = {}
    setattr(model, RECORD, record)
    return QuantReport(
        plan=plan,
        weight_sqnr=record_noise,
        output_error=error,
        seconds=time.monotonic() - started,
        float_bytes=before,
        bytes=sum(model_bytes(model).values()),
        findings=findings,
    )


def dequantize_(module: nn.Module) -> int:
    """Make a quantised network a float one again; a network that is not quantised stays as it is.

    With its originals kept, every bit is as before, in the device and dtype that the network has now. Without, layers get
    the weights that their codes stand for.

    Returns:
        How many layers were replaced; attentions in 8 bits are made what they were as well.

    Raises:
        FewstepError: where a layer or attention has a hook around it, such as a cache's on that very module; nothing is done
            then.
    """
    from fewstep.quant.correction import remove_correction_

    model = unwrapped(module)
    record: Record | None = getattr(model, RECORD, None)
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if "forward" in vars(layer):
            raise FewstepError(f"{name} has a hook around it, such as a cache's; take that off first (caching.remove_)")
    remove(model)
    remove_correction_(model)
    originals = record.originals if record else {}
    floats = {}
    for name, layer in layers.items():
        like = next(layer.parameters())
        dtype = next(m.dtype for m in layer.modules() if isinstance(m, QuantLayer))
        floats[name] = originals[name].to(like.device, dtype) if name in originals else unbuild(layer)
        floats[name].train(layer.training)
    swap(model, floats)
    forget_times_(model)
    if record is not None:
        delattr(model, RECORD)
    return len(layers)


def _solve(
    model: nn.Module,
    method: Method,
    plan: QuantPlan,
    calls: Sequence[Call],
    folder: str | Path | None,
    rows: int,
    budget: int,
    progress: bool,
) -> dict[str, dict[str, Tensor]]:
    """The arrays of every layer of the plan."""
    from fewstep.quant.calibration.progress import bar

    wanted = {site.name: site for site in sites(model) if site.name in plan.layers}
    done = Checkpoint.open(folder, plan, calls) if folder is not None else None
    arrays = {} if done is None else {name: done.read(name) for name in wanted if done.has(name)}
    missing = [site for name, site in wanted.items() if name not in arrays]
    with bar(f"{plan.method}: layers", len(wanted), progress, start=len(arrays)) as advance:
        for site, inputs in _with_inputs(model, method, missing, calls, rows, budget):
            with torch.no_grad():
                arrays[site.name] = method.arrays(site, plan.layers[site.name], inputs)
            if done is not None:
                done.write(site.name, arrays[site.name])
            advance()
    return {name: arrays[name] for name in wanted}


def _with_inputs(
    model: nn.Module, method: Method, wanted: Sequence[Site], calls: Sequence[Call], rows: int, budget: int
) -> Iterator[tuple[Site, LayerInputs | None]]:
    reading = [site for site in wanted if method.reads(site)] if calls else []
    plain = [site for site in wanted if site not in reading]
    yield from ((site, None) for site in plain)
    if reading:
        yield from gather(model, reading, calls, rows=rows, budget=budget)


def _assembled(
    model: nn.Module, plan: QuantPlan, arrays: Mapping[str, Mapping[str, Tensor]], backend: str
) -> dict[str, nn.Module]:
    layers = {}
    for site in sites(model):
        if site.name in arrays:
            device = site.module.weight.device
            assert isinstance(device, torch.device)
            layer = build(site.module, plan.layers[site.name], arrays[site.name]).to(device)
            for part in layer.modules():
                if isinstance(part, QuantLayer):
                    part.backend = backend
            layers[site.name] = layer
    return layers


def _noise(floats: Mapping[str, nn.Module], quantized: Mapping[str, nn.Module]) -> dict[str, float]:
    """Signal to noise ratio of each weight, in dB."""
    found = {}
    for name, layer in quantized.items():
        weight, got = (one.weight for one in (floats[name], layer))
        assert isinstance(weight, Tensor)
        assert isinstance(got, Tensor)
        weight = weight.detach().float()
        noise = float((got.float() - weight).square().sum())
        signal = float(weight.square().sum())
        found[name] = 10 * math.log10(signal / noise) if noise and signal else math.inf
    return found


def _finish(
    model: nn.Module, record: Record, method: Method, calls: Sequence[Call]
) -> tuple[dict[str, Any], float | None]:
    if not calls:
        return {}, None
    device = next(model.parameters()).device
    with twin(model, record) as original:
        findings = method.finish(model, original, calls)
        noise = signal = 0.0
        with torch.no_grad():
            for call in calls:
                here = call.to(device)
                want, got = here.run(original).double(), here.run(model).double()
                noise += float((got - want).square().sum())
                signal += float(want.square().sum())
    return findings, math.sqrt(noise / signal) if signal else None


def _check_backends(layers: Mapping[str, nn.Module], model: nn.Module, calls: Sequence[Call]) -> None:
    """A backend that was asked for by name must take every layer: said now and not at the first image."""
    from fewstep.quant.backends import problem_of

    for name, layer in layers.items():
        for part in layer.modules():
            if isinstance(part, QuantLayer) and part.backend != "auto":
                plan, device = part.plan, str(part.codes.device)
                activation = None if plan.activation is None else str(plan.activation)
                reason = problem_of(named(part.backend), activation, str(plan.weight), device)
                if reason:
                    raise FewstepError(f"backend {part.backend} cannot compute {name} ({plan}): {reason}")
