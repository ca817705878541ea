"""Distillation: the quantised network's output is trained towards the float network's, as far as the sampler is moved by it.

    loss = mean_i ||w_i e_i||^2 + ||sum_i w_i e_i||^2 / k        e_i = y_q - y at k calls of the same samples

The second term is what single errors leave out: a sampler adds errors up, and training for single calls leaves such as agree
from step to step. w_i is how far an error at call i moves the sample (:mod:`.weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.quant.calibration.calls import Call
from fewstep.quant.formats.scales import stored
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.training.data import Feed, split
from fewstep.quant.training.features import Features
from fewstep.quant.training.judge import Judge, fell
from fewstep.quant.training.layers import Trainable, TrainedLayer
from fewstep.quant.training.weights import call_weights

Layers = Mapping[str, tuple[nn.Module, Trainable]]


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, and on what.

    Attributes:
        iterations: of Adam.
        rate: of weights in steps of their own grid an iteration (EfficientDM's scale-aware rate).
        scale_rate: relative, of scales.
        bias_rate: of biases, relative to the mean magnitude of a layer's outputs.
        rows: of each call at most.
        together: calls an iteration, of the same samples.
        chance: how likely a call of relative noise u in [0, 1] is drawn; None for all alike.
        features: paths of modules whose outputs are trained too.
        share: of the principal directions of those outputs.
        mimic: weight of their error.
        blind: whether only they are trained and not the network's output.
    """

    iterations: int = 400
    rate: float = 0.02
    scale_rate: float = 1e-3
    bias_rate: float = 1e-3
    rows: int = 16
    together: int = 1
    chance: Callable[[float], float] | None = None
    features: Sequence[str] = ()
    share: float = 1.0
    mimic: float = 0.0
    blind: bool = False


def distil(
    model: nn.Module,
    original: nn.Module,
    layers: Layers,
    calls: Sequence[Call],
    schedule: Schedule,
    *,
    targets: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Train quantised layers of ``model`` in place; the start is kept where training did not help samples set apart.

    Args:
        model: quantised.
        original: the float network; its outputs are the targets.
        layers: paths of quantised layers, with their float layers and what is trained of them.
        calls: network calls. Those of :func:`~fewstep.quant.record` know their samples: a quarter of these is set apart, and
            what the sampler ends with has to be nearer by more than the standard error of the mean of paired differences.
            Of others a quarter of each batch is set apart, and the error of single calls has to fall.
        schedule: how long and how fast.
        targets: what each call should give, in place of the float network's outputs; the first channels where fewer.

    Returns:
        Findings: noise to signal on the samples set apart before and after, of single calls and of the final latents
        (``drift``, their RMS in standard deviations), the latter None where the sampler is not at hand; and what was kept.
    """
    judge = Judge(model, original, calls)

    def measured() -> tuple[float, Tensor | None, float]:
        with _taught(model, original, calls, schedule) as teacher:
            unlike = teacher.error(model, judge.calls) if teacher is not None and schedule.blind else 0.0
        return judge.noise(), judge.drifts(), unlike

    noise, drifts, unlike = measured()
    with training(model, layers) as trained, _taught(model, original, calls, schedule) as teacher:
        _train(model, original, trained, calls, schedule, teacher, targets)
    before = _store(model, trained)
    after = measured()
    if schedule.blind:  # features are all it is trained for
        no_further = drifts is None or after[1] is None or float(after[1].mean()) <= float(drifts.mean())
        better = no_further and after[2] < unlike
    else:
        better = after[0] < noise if drifts is None or after[1] is None else fell(drifts, after[1])
    if not better:
        _restore(model, before)
        after = noise, drifts, unlike
    return {
        "noise_before_training": noise,
        "noise_after_training": after[0],
        "drift_before_training": None if drifts is None else float(drifts.mean()),
        "drift_after_training": None if after[1] is None else float(after[1].mean()),
        "kept": "what was trained" if better else "the start",
    }


@contextmanager
def _taught(
    model: nn.Module, original: nn.Module, calls: Sequence[Call], schedule: Schedule
) -> Iterator[Features | None]:
    """Features that are trained too, watched inside."""
    if not schedule.features:
        yield None
        return
    features = Features(model, original, schedule.features, calls, schedule.share)
    try:
        yield features
    finally:
        features.close()


@contextmanager
def training(model: nn.Module, layers: Layers) -> Iterator[dict[str, TrainedLayer]]:
    """Layers in training in place of quantised ones, and no other parameter with a gradient; as before after."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    quantized: dict[str, QuantLayer] = {}
    trained: dict[str, TrainedLayer] = {}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for path, (layer, what) in layers.items():
            found = model.get_submodule(path)
            assert isinstance(found, QuantLayer)
            quantized[path], trained[path] = found, TrainedLayer(layer, found, what)
        for path, made in trained.items():
            _hang(model, path, made)
        yield trained
    finally:
        for path, kept in quantized.items():
            _hang(model, path, kept)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _train(
    model: nn.Module,
    original: nn.Module,
    trained: Mapping[str, TrainedLayer],
    calls: Sequence[Call],
    schedule: Schedule,
    teacher: Features | None,
    targets: Sequence[Tensor] | None,
) -> None:
    device = next(original.parameters()).device
    seen, _ = split(calls)
    with torch.no_grad():
        wanted = targets or [call.to(device).run(original).float().cpu() for call in calls]
    weights = call_weights(calls, [float(want.square().mean()) for want in wanted])
    optimizer = torch.optim.Adam(_groups(trained, schedule))
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.0, 1 - i / max(1, schedule.iterations)))
    draws = iter(Feed(calls, seen, schedule.rows, schedule.together, schedule.chance))
    for _ in range(schedule.iterations):
        drawn = next(draws)
        with torch.enable_grad():
            total: Tensor | None = None
            loss = torch.zeros((), device=device)
            for i, rows in drawn:
                call = calls[i].select(rows).to(device)
                if teacher is not None:
                    teacher.teach(call)
                want = wanted[i][rows].to(device)
                error = weights[i] * (call.run(model).float()[:, : want.shape[1]] - want)
                if not schedule.blind:
                    loss = loss + error.square().mean() / len(drawn)
                    total = error if total is None else total + error
                if teacher is not None:
                    loss = loss + (1.0 if schedule.blind else schedule.mimic) * teacher.loss() / len(drawn)
            if total is not None and len(drawn) > 1:
                loss = loss + total.square().mean() / len(drawn)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()


def _groups(trained: Mapping[str, TrainedLayer], schedule: Schedule) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for layer in trained.values():
        for parameters, rate in (
            ([layer.delta, layer.a, layer.b], schedule.rate * layer.step),
            ([layer.stretch, layer.input_stretch], schedule.scale_rate),
            ([layer.bias], schedule.bias_rate),
        ):
            used = [p for p in parameters if p is not None and p.requires_grad]
            if used:
                groups.append({"params": used, "lr": rate})
    return groups


def _store(model: nn.Module, trained: Mapping[str, TrainedLayer]) -> dict[str, dict[str, nn.Parameter | None]]:
    """Codes, scales and biases of what was trained, into the quantised layers; what was there before."""
    before: dict[str, dict[str, nn.Parameter | None]] = {}
    for path, source in trained.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantLayer)
        before[path] = {name: getattr(layer, name) for name in ("codes", "scale", "bias", "input_scale")}
        codes, bias = source.finished()
        layer.codes = _fixed(codes.packed()["codes"])
        layer.scale = _fixed(stored(codes.scale, layer.plan.weight.scale))
        if layer.bias is not None or bool(bias.any()):
            layer.bias = _fixed(bias.to(layer.dtype))
        inputs = source.input_scales()
        if inputs is not None:
            layer.input_scale = _fixed(inputs.detach())
        layer.memory.clear()
    return before


def _restore(model: nn.Module, arrays: Mapping[str, Mapping[str, nn.Parameter | None]]) -> None:
    for path, values in arrays.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantLayer)
        for name, value in values.items():
            setattr(layer, name, value)
        layer.memory.clear()


def _hang(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    model.get_submodule(parent)._modules[last] = layer


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=False)
