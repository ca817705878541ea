"""Outputs of modules inside the network, trained towards the float network's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.quant.calibration.calls import Call

CALLS = 16
"""How many calls principal directions are found from."""


class Features:
    """Relative error of modules' outputs, the mean over modules; by channel, or within principal directions.

    Args:
        model: quantised.
        original: the float network.
        paths: the modules; one that is called several times counts with its last call.
        calls: which principal directions are found from, where ``share`` is not 1.
        share: of the channels: 1 for all, else so many of the float outputs' principal directions.

    Source: BinaryDM, 2404.05662, sec. 3.3 (a quarter of the directions); QuEST, 2402.03666, sec. 4.4 (whole outputs).
    """

    def __init__(
        self, model: nn.Module, original: nn.Module, paths: Sequence[str], calls: Sequence[Call], share: float = 1.0
    ) -> None:
        self.original = original
        self.target: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.handles = [
            network.get_submodule(path).register_forward_hook(_keeper(into, path))
            for network, into in ((original, self.target), (model, self.seen))
            for path in paths
        ]
        self.paths = list(paths)
        self.directions = self._principal(calls, share) if share < 1 else {}

    def teach(self, call: Call) -> Tensor:
        """The float network's output, whose features become the targets."""
        with torch.no_grad():
            return call.run(self.original).float()

    def loss(self) -> Tensor:
        """Of what the quantised network was called with last, the same as :meth:`teach`."""
        parts = []
        for path in self.paths:
            got, want = _rows(self.seen[path]), _rows(self.target[path]).detach()
            if path in self.directions:
                got, want = got @ self.directions[path], want @ self.directions[path]
            parts.append((got - want).square().mean() / want.square().mean().clamp(min=1e-12))
        return torch.stack(parts).mean()

    def error(self, model: nn.Module, calls: Sequence[Call]) -> float:
        """The mean of :meth:`loss` over calls."""
        total = 0.0
        with torch.no_grad():
            for call in calls:
                self.teach(call)
                call.run(model)
                total += float(self.loss())
        return total / len(calls)

    def _principal(self, calls: Sequence[Call], share: float) -> dict[str, Tensor]:
        device = next(self.original.parameters()).device
        kept: dict[str, list[Tensor]] = {path: [] for path in self.paths}
        for call in calls[:: -(-len(calls) // CALLS)]:
            self.teach(call.to(device))
            for path in self.paths:
                kept[path].append(_rows(self.target[path]).detach())
        found = {}
        for path, parts in kept.items():
            rows = torch.cat(parts)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found[path] = torch.pca_lowrank(rows, q=max(1, int(rows.shape[1] * share)), niter=2)[2]
        return found

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
