"""Distillation: the quantised network's output is trained towards the float network's on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.quant.calibration.calls import Call
from fewstep.quant.formats.scales import stored
from fewstep.quant.layers.base import QuantLayer
from fewstep.quant.training.layers import Trainable, TrainedLayer

CHECKS = 10
"""How often training is judged."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        iterations: of Adam, each on one call.
        rate: of weights in steps of their own grid an iteration (EfficientDM's scale-aware rate); a product of thin
            matrices has it for its outer one.
        scale_rate: relative, of scales.
        bias_rate: of biases, relative to the mean magnitude of a layer's outputs.
        time_weight: how likely a call of relative noise u in [0, 1] is to be drawn.
        mimic: weight of the error of blocks' outputs in the float network's own principal directions, 0 for none.
    """

    iterations: int = 400
    rate: float = 0.01
    scale_rate: float = 1e-3
    bias_rate: float = 1e-3
    time_weight: Callable[[float], float] = lambda u: 1.0
    mimic: float = 0.0


def distil(
    model: nn.Module,
    original: nn.Module,
    layers: Mapping[str, tuple[nn.Module, Trainable]],
    calls: Sequence[Call],
    schedule: Schedule,
    blocks: Sequence[str] = (),
) -> dict[str, Any]:
    """Train quantised layers of ``model`` in place; kept only if the output error on the calls falls.

    Args:
        model: quantised.
        original: the float network; its outputs are the targets.
        layers: paths of quantised layers, with their float layers and what is trained of them.
        calls: network calls; every one a target.
        schedule: how long and how fast.
        blocks: paths of modules whose outputs are mimicked as well, where ``schedule.mimic`` is not 0.

    Some samples are held out: the state with the least error on them is what is kept, the start if that is it.

    Returns:
        Findings: noise to signal of the output on the samples held out, before and after.
    """
    device = next(original.parameters()).device
    seen, unseen = held_out([call.to(device) for call in calls])
    with torch.no_grad():
        wanted, unseen_wanted = ([call.run(original).float() for call in part] for part in (seen, unseen))

    def score() -> float:
        return _noise(model, unseen, unseen_wanted)

    before = score()
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
            _hang(model, path, trained[path])
        with torch.enable_grad():
            _train(model, original, trained, seen, wanted, schedule, blocks, score)
    finally:
        for path, layer in quantized.items():
            _hang(model, path, layer)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    kept = {path: {n: getattr(layer, n) for n in ("codes", "scale", "bias")} for path, layer in quantized.items()}
    for path, layer in quantized.items():
        codes, bias = trained[path].finished()
        packed = codes.packed()
        layer.codes = _fixed(packed["codes"])
        layer.scale = _fixed(stored(codes.scale, layer.plan.weight.scale))
        if layer.bias is not None or bool(bias.any()):
            layer.bias = _fixed(bias.to(layer.dtype))
        layer.memory.clear()
    after = score()
    if not after < before:
        for path, arrays in kept.items():
            for name, value in arrays.items():
                setattr(quantized[path], name, value)
            quantized[path].memory.clear()
    return {"noise_before_training": before, "noise_after_training": min(before, after)}


def _train(
    model: nn.Module,
    original: nn.Module,
    trained: Mapping[str, TrainedLayer],
    calls: Sequence[Call],
    wanted: Sequence[Tensor],
    schedule: Schedule,
    blocks: Sequence[str],
    score: Callable[[], float],
) -> None:
    groups: list[dict[str, Any]] = []
    for layer in trained.values():
        for parameters, rate in (
            ([layer.delta, layer.b], schedule.rate * layer.step),
            ([layer.a], schedule.rate * layer.step),
            ([layer.stretch], schedule.scale_rate),
            ([layer.bias], schedule.bias_rate),
        ):
            used = [p for p in parameters if p is not None and p.requires_grad]
            if used:
                groups.append({"params": used, "lr": rate})
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.0, 1 - i / max(1, schedule.iterations)))
    times = [call.timestep for call in calls]
    top = max((t for t in times if math.isfinite(t)), default=0.0)
    chances = torch.tensor(
        [schedule.time_weight(t / top) if top > 0 and math.isfinite(t) else 1.0 for t in times], dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(0)
    mimic = Mimic(model, original, blocks, calls) if schedule.mimic and blocks else None
    least, best = float("inf"), _state(trained)
    for step in range(schedule.iterations):
        i = int(torch.multinomial(chances, 1, generator=generator))
        out = calls[i].run(model).float()
        loss = (out - wanted[i]).square().sum() / wanted[i].square().sum()
        if mimic is not None:
            loss = loss + schedule.mimic * mimic.loss(i)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        if (step + 1) % max(1, schedule.iterations // CHECKS) == 0 or step + 1 == schedule.iterations:
            now = score()
            if now < least:
                least, best = now, _state(trained)
    for path, values in best.items():
        trained[path].load_state_dict(values)
    if mimic is not None:
        mimic.close()


def held_out(calls: Sequence[Call]) -> tuple[list[Call], list[Call]]:
    """Calls to train on and calls to judge by: of every call the last quarter of its samples; of single ones every fourth."""
    seen, unseen = [], []
    for i, call in enumerate(calls):
        rows, apart = list(range(call.batch)), call.batch // 4
        if apart:
            seen.append(call.select(rows[:-apart]))
            unseen.append(call.select(rows[-apart:]))
        else:
            (unseen if i % 4 == 3 else seen).append(call)
    return (seen, unseen) if unseen else (seen, seen)


def _state(trained: Mapping[str, TrainedLayer]) -> dict[str, dict[str, Tensor]]:
    return {path: {n: v.detach().clone() for n, v in layer.state_dict().items()} for path, layer in trained.items()}


class Mimic:
    """Error of blocks' outputs in the first quarter of the float outputs' principal directions, by channel.

    Source: BinaryDM, 2404.05662, sec. 3.3.
    """

    def __init__(self, model: nn.Module, original: nn.Module, blocks: Sequence[str], calls: Sequence[Call]) -> None:
        self.targets: list[dict[str, Tensor]] = []
        found: dict[str, Tensor] = {}
        handles = [original.get_submodule(path).register_forward_hook(_keeper(found, path)) for path in blocks]
        with torch.no_grad():
            for call in calls:
                call.run(original)
                self.targets.append({path: value.detach() for path, value in found.items()})
        for handle in handles:
            handle.remove()
        self.directions: dict[str, Tensor] = {}
        for path in blocks:
            rows = torch.cat([_rows(target[path]) for target in self.targets])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.directions[path] = torch.pca_lowrank(rows, q=max(1, rows.shape[1] // 4), niter=2)[2]
        self.seen: dict[str, Tensor] = {}
        self.handles = [model.get_submodule(path).register_forward_hook(_keeper(self.seen, path)) for path in blocks]

    def loss(self, call: int) -> Tensor:
        parts = []
        for path, directions in self.directions.items():
            want = _rows(self.targets[call][path]) @ directions
            parts.append(
                (_rows(self.seen[path]) @ directions - want).square().mean() / want.square().mean().clamp(min=1e-12)
            )
        return torch.stack(parts).mean()

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _keeper(into: dict[str, Tensor], path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        into[path] = (output[0] if isinstance(output, tuple) else output).float()

    return hook


def _rows(value: Tensor) -> Tensor:
    """(tokens or pixels, channels)."""
    return value.permute(0, 2, 3, 1).flatten(0, 2) if value.ndim == 4 else value.reshape(-1, value.shape[-1])


def _noise(model: nn.Module, calls: Sequence[Call], wanted: Sequence[Tensor]) -> float:
    with torch.no_grad():
        error = sum(
            float((call.run(model).float() - want).square().sum()) for call, want in zip(calls, wanted, strict=True)
        )
    return error / sum(float(want.square().sum()) for want in wanted)


def _hang(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    model.get_submodule(parent)._modules[last] = layer


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=False)
