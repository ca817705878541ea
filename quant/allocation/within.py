"""Which layers to leave in floating point so that the output error stays within a bound, at the least cost in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.quant.calibration.calls import Call
from fewstep.quant.layers.build import build
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site, sites

Shares = dict[str, float]


def within_error(model: nn.Module, plan: QuantPlan, calls: Sequence[Call], error: float, rounds: int = 4) -> QuantPlan:
    """The plan with as many layers left in floating point as it takes, those first that do most harm a multiplication.

    Contributions come from :func:`contributions`, a pass forward and one back, and add up as squares. The network is then
    run with the plan; where its error is above the bound all the same, the choice is made again for a tighter one.

    Args:
        model: the float network, as it was afterwards.
        plan: formats of all layers that may be quantised.
        calls: of the network.
        error: ||y_q - y|| / ||y|| of its output over the calls.
        rounds: times at most that the network is run with a plan.

    Raises:
        FewstepError: no calls, an error that is not positive, or one that no layer could be quantised within.
    """
    from fewstep.quant.allocation.allocate import output_noise

    if not calls:
        raise FewstepError("error= bounds the error on the network's calls; give some, see quant.record")
    if not error > 0:
        raise FewstepError(f"error is {error}; give a relative error above 0, such as 0.01")
    shares, work = contributions(model, plan, calls)
    aim, found = error, math.inf
    for _ in range(rounds):
        kept = _worst(shares, work, aim)
        if len(kept) == len(plan.layers):
            break
        chosen = plan.with_layers(dict.fromkeys(kept))
        found = math.sqrt(output_noise(model, chosen, calls))
        if found <= error:
            reasons = dict.fromkeys(kept, f"more error than error={error:g} has room for")
            return _explained(chosen, reasons, error, found, sum(work[n] for n in kept) / sum(work.values()))
        aim *= 0.98 * error / found
    left = (
        f"an output error of {found:.3%} with the worst layers kept" if found < math.inf else "too much in every layer"
    )
    raise FewstepError(f"{plan.method} has {left}; error={error:g} needs wider formats, or a wider bound")


def contributions(model: nn.Module, plan: QuantPlan, calls: Sequence[Call], seed: int = 0) -> tuple[Shares, Shares]:
    """What each layer of a plan adds to the squared relative error of the output, and how many multiplications it makes.

    Of a layer with rounding error e in its n outputs it is E ||J e||^2 with J the Jacobian of the network's output. Rounding
    errors being all but uncorrelated, that is ||e||^2 / n times ||J||_F^2, and ||J||_F^2 = E ||J^T u||^2 for random signs u
    (Hutchinson's estimator): one pass back serves all layers. e is measured on the layer's own inputs.

    Returns:
        Relative squared error and multiplications by layer, the means and sums over the calls.
    """
    there = [site for site in sites(model) if site.name in plan.layers]
    shares, work = (dict.fromkeys(plan.layers, 0.0) for _ in range(2))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    signal: list[float] = []

    def watch(site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            with torch.no_grad():
                quantised = build(site.module, plan.layers[site.name]).to(device)
                noise = float((quantised(args[0].detach()) - output).double().square().mean())
            work[site.name] += output.numel() * site.columns
            # The first layer's output begins the graph; a clone, which the network may write into.
            kept = output if output.requires_grad else output.detach().requires_grad_().clone()

            def arrived(gradient: Tensor) -> None:
                shares[site.name] += noise * float(gradient.double().square().sum())

            kept.register_hook(arrived)  # type: ignore[no-untyped-call]
            return kept

        return hook

    handles = [site.module.register_forward_hook(watch(site)) for site in there]
    try:
        model.requires_grad_(False)
        for call in calls:
            with torch.enable_grad():
                out = call.to(device).run(model)
                signs = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
                (out * signs).sum().backward()  # type: ignore[no-untyped-call]
            signal.append(float(out.detach().double().square().sum()))
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
    return {name: value / sum(signal) for name, value in shares.items()}, work


def _worst(shares: Mapping[str, float], work: Mapping[str, float], error: float) -> list[str]:
    """Layers, those with most error a multiplication first, without which the rest stays within ``error``."""
    order = sorted(shares, key=lambda name: -shares[name] / max(work[name], 1.0))
    left, kept = sum(shares.values()), []
    for name in order:
        if left <= error**2:
            break
        left -= shares[name]
        kept.append(name)
    # What was taken early and turns out not to be needed is given back, the dearest first.
    for name in sorted(kept, key=lambda name: -work[name]):
        if left + shares[name] <= error**2:
            left += shares[name]
            kept.remove(name)
    return kept


def _explained(plan: QuantPlan, reasons: Mapping[str, str], error: float, found: float, share: float) -> QuantPlan:
    settings = {**plan.provenance, "error": error, "error_found": found, "float_multiplications": share}
    return replace(plan, kept={**plan.kept, **reasons}, provenance=settings)
