"""How much a format in one layer changes what the network says: measured, or from curvature and weight errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fewstep.quant.calibration.calls import Call
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import build
from fewstep.quant.sites import Site
from fewstep.quant.views import weight_matrix

Metric = Callable[[Tensor, Tensor], float]


def noise(got: Tensor, want: Tensor) -> float:
    """Noise to signal, ||got - want||^2 / ||want||^2: 10^(-SQNR / 10)."""
    return float((got - want).double().square().sum() / want.double().square().sum().clamp(min=1e-300))


def dissimilarity(got: Tensor, want: Tensor) -> float:
    """1 - SSIM of the outputs as images, the mean over samples and channels; of outputs that are no images, :func:`noise`."""
    if want.ndim != 4 or min(want.shape[-2:]) < 4:
        return noise(got, want)
    from torchmetrics.functional.image import structural_similarity_index_measure

    side = min(7, *(s - 1 + s % 2 for s in want.shape[-2:]))
    similar = structural_similarity_index_measure(
        got.float(), want.float(), gaussian_kernel=False, kernel_size=side,
        data_range=float(want.max() - want.min()) or 1.0,
    )  # fmt: skip
    assert isinstance(similar, Tensor)
    return max(0.0, 1.0 - float(similar))


@contextmanager
def swapped(model: nn.Module, site: Site, plan: LayerPlan) -> Iterator[None]:
    """One layer rounded inside, as it was after."""
    parent, _, last = site.path.rpartition(".")
    holder = model.get_submodule(parent)
    holder._modules[last] = build(site.module, plan).to(next(site.module.parameters()).device)
    try:
        yield
    finally:
        holder._modules[last] = site.module


@torch.no_grad()
def measured(
    model: nn.Module,
    sites: Sequence[Site],
    options: Mapping[str, Mapping[str, LayerPlan]],
    calls: Sequence[Call],
    metric: Callable[[Site], Metric] = lambda site: noise,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Damage of each layer and choice, that layer alone rounded, averaged over the calls."""
    device = next(model.parameters()).device
    here = [call.to(device) for call in calls]
    wanted = [call.run(model) for call in here]
    found: dict[str, dict[str, float]] = {}
    for site in sites:
        found[site.name] = {}
        for choice, plan in options[site.name].items():
            with swapped(model, site, plan):
                score = [metric(site)(call.run(model), want) for call, want in zip(here, wanted, strict=True)]
            found[site.name][choice] = sum(score) / len(score)
        tick()
    return found


def traces(
    model: nn.Module,
    sites: Sequence[Site],
    calls: Sequence[Call],
    *,
    probes: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Tr(J^T J) of each layer's weight, J the Jacobian of the network's output: the Gauss-Newton trace of its squared error.

    Hutchinson's estimator with Rademacher vectors u on the side of the outputs: E ||J^T u||^2, so that one backward pass
    serves all layers. At the float weights the loss ||y_q - y||^2 has no gradient, and this is its whole Hessian.

    Args:
        probes: vectors at most; stopped when no running mean changes by more than ``tolerance``.

    Source: HAWQ-V2, 1911.03852, eq. 5 and sec. 3.2.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    weights = {site.name: site.module.weight for site in sites}
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    sums, before = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, math.inf)
    means = dict(sums)
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and any(parameter is w for w in weights.values()))
        for probe in range(1, probes + 1):
            call = calls[(probe - 1) % len(calls)].to(device)
            out = call.run(model)
            u = torch.randint(0, 2, out.shape, generator=generator).to(out) * 2 - 1
            gradients = torch.autograd.grad((out * u).sum(), list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                sums[name] += 0.0 if gradient is None else float(gradient.double().square().sum())
            means = {name: value / probe for name, value in sums.items()}
            if probe >= len(calls) and all(abs(means[n] - before[n]) <= tolerance * means[n] for n in means):
                break
            before = means
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
    return means


def curvature(
    sites: Sequence[Site], options: Mapping[str, Mapping[str, LayerPlan]], trace: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Tr(H_l) / n_l ||W - Q(W)||^2 of each layer and choice. Activations play no part in it.

    Source: HAWQ-V2, 1911.03852, eq. 6.
    """
    found: dict[str, dict[str, float]] = {}
    for site in sites:
        matrix = weight_matrix(site.weight).float()
        mean = trace[site.name] / matrix.numel()
        found[site.name] = {
            choice: mean * float((plan.weight.round(matrix) - matrix).double().square().sum())
            for choice, plan in options[site.name].items()
        }
    return found
