"""Inputs of layers while the network runs on calibration calls: gathered for some layers at a time, within a budget.

Large models do not fit twice, and the inputs of all their layers do not fit at all. Layers are taken in the order in which
they are called, as many as the budget holds; a pass stops as soon as the last of them was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.sites import Site


@dataclass
class LayerInputs:
    """What one layer saw.

    Attributes:
        sample: (R, K) rows for a linear layer, (R, C, H, W) images for a convolution; the same share from every call.
        channel_max: (K,) or (C,), the largest magnitude of each input channel over everything that was seen.
        low, high: a number for each call that reached the layer, the range of its inputs.
        calls: which calls those were.
        times: what the network was told at each of them, NaN where nothing.
        counts: how many rows of the sample each of them gave.
        first: (K,) the first token's input, where it was the same in all samples of all calls.
    """

    sample: Tensor
    channel_max: Tensor
    low: Tensor
    high: Tensor
    calls: tuple[int, ...]
    first: Tensor | None = None
    times: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass
class _Gathered:
    parts: list[Tensor] = field(default_factory=list)
    top: Tensor | None = None
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)

    def finished(self, name: str) -> LayerInputs:
        if self.top is None:
            raise FewstepError(f"{name} was never called during calibration; leave it out of the plan")
        sample = torch.cat(self.parts)
        if not bool(torch.isfinite(sample).all()):
            raise FewstepError(f"{name} saw NaN or infinity during calibration")
        low, high = (torch.tensor(v, dtype=torch.float64) for v in (self.low, self.high))
        return LayerInputs(
            sample, self.top, low, high, tuple(self.calls), self._constant_first(), tuple(self.times),
            tuple(map(len, self.parts)),
        )  # fmt: skip

    def _constant_first(self) -> Tensor | None:
        if not self.first:
            return None
        first = torch.cat(self.first)
        same = bool((first - first[0]).abs().max() <= 1e-6 * first[0].abs().max())
        return first[0] if same else None


class _Reached(Exception):
    pass


def call_order(network: nn.Module, sites: Sequence[Site], call: Call) -> tuple[list[Site], dict[str, int]]:
    """The sites in the order in which a call reaches them, and how many numbers each is given by it."""
    order: list[Site] = []
    sizes: dict[str, int] = {}

    def seen(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if site.name not in sizes:
                order.append(site)
                sizes[site.name] = args[0].numel()

        return hook

    handles = [site.module.register_forward_pre_hook(seen(site)) for site in sites]
    try:
        with torch.no_grad():
            call.run(network)
    finally:
        for handle in handles:
            handle.remove()
    return order, sizes


def gather(
    network: nn.Module,
    sites: Sequence[Site],
    calls: Sequence[Call],
    *,
    rows: int = 2048,
    budget: int = 2**30,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Site, LayerInputs]]:
    """Inputs of every site, one site at a time, in the order of the network.

    Args:
        network: not quantised; run without gradients as it is.
        sites: the layers that are asked about.
        calls: the calibration calls.
        rows: how many rows (tokens; pixels of whole images for a convolution) to keep of a layer, from all calls alike.
        budget: bytes of inputs held at once.
        seed: which rows.
        tick: called after each network call.

    Raises:
        FewstepError: for a layer that no call reaches, or that sees NaN.
    """
    order, sizes = call_order(network, sites, calls[0])
    if missing := {s.name for s in sites} - {s.name for s in order}:
        raise FewstepError(f"{min(missing)} is not called by the first calibration call; leave it out of the plan")
    device = next(network.parameters()).device
    share = -(-rows // len(calls))
    start = 0
    while start < len(order):
        group: list[Site] = []
        held = 0
        while start < len(order) and (not group or held < budget):
            site = order[start]
            group.append(site)
            held += 4 * min(rows * site.shape[1], sizes[site.name] * len(calls))
            start += 1
        found = _pass(network, group, calls, share, seed, device, tick)
        for site in group:
            yield site, found.pop(site.name).finished(site.name)


def _pass(
    network: nn.Module,
    group: Sequence[Site],
    calls: Sequence[Call],
    share: int,
    seed: int,
    device: torch.device,
    tick: Callable[[], None],
) -> dict[str, _Gathered]:
    found = {site.name: _Gathered() for site in group}
    current, last = 0, group[-1].name
    generator = torch.Generator().manual_seed(seed)

    def keeper(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            into = found[site.name]
            _keep(into, site, args[0].detach(), current, share, generator)
            into.times.append(calls[current].timestep)

        return hook

    def stopper(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        raise _Reached

    handles = [site.module.register_forward_pre_hook(keeper(site)) for site in group]
    handles += [site.module.register_forward_hook(stopper) for site in group if site.name == last]
    try:
        with torch.no_grad():
            for current, call in enumerate(calls):  # noqa: B007 - the hooks read it
                with suppress(_Reached):
                    call.to(device).run(network)
                tick()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _keep(into: _Gathered, site: Site, x: Tensor, call: int, share: int, generator: torch.Generator) -> None:
    dims = (0, 2, 3) if site.is_conv else tuple(range(x.ndim - 1))
    top = x.abs().amax(dims).float().cpu()
    into.top = top if into.top is None else torch.maximum(into.top, top)
    low, high = (float(value) for value in torch.aminmax(x))
    into.low.append(low)
    into.high.append(high)
    into.calls.append(call)
    if x.ndim == 3:
        into.first.append(x[:, 0].float().cpu())
    entries = x if site.is_conv else x.reshape(-1, x.shape[-1])
    wanted = max(1, share // (x.shape[2] * x.shape[3])) if site.is_conv else share
    if wanted < len(entries):
        entries = entries[torch.randperm(len(entries), generator=generator)[:wanted].to(x.device)]
    into.parts.append(entries.float().cpu().clone())
