"""A cache's correction fitted together with the quantisation: what is reused is corrected towards the float network.

    F_i ~ a_i F_q + b_i        F_i computed by the float layers, F_q kept from an earlier step of the quantised ones

so that one affine map a channel takes off what skipping and rounding do, on the path that the cached and quantised network
takes itself. Steps that are computed keep their quantisation error; :func:`~fewstep.quant.fit_correction` is for those.

Source: CacheQuant: Comprehensively Accelerated Diffusion Models, 2503.01323, sec. 3.3 (decoupled error correction).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.eval.costs.calls import denoisers
from fewstep.quant.state import RECORD, Record, evaluating, float_inside, unwrapped

if TYPE_CHECKING:
    from fewstep.caching import CachePlan


def fit_cache(
    pipe: Any,
    plan: CachePlan,
    prompts: Sequence[str] | None = None,
    *,
    guidance_scale: float | None = None,
    samples: int = 16,
    held_out: int = 4,
    seed: int = 10_000,
    batch: int = 8,
    call: Mapping[str, Any] | None = None,
) -> CachePlan:
    """The cache plan with its predictions fitted for the quantised network of ``pipe``, towards the float one.

    Args:
        pipe: a pipeline whose network is quantised with ``keep_originals=True``, with the scheduler it will be used with and
            no cache on; left as it was.
        plan: a table of steps and sites, such as ``caching.calibrate`` makes. When what is computed stays as it is.
        prompts: drawn in turn; names of classes, or nothing, where the pipeline takes these.
        guidance_scale: the pipeline's default where left out.
        samples: all samples, those held out among them.
        held_out: samples that nothing is fitted to. Where the float network's latents are not nearer with the new plan
            there, the given one is returned.
        seed: of the first sample.
        batch: samples drawn at once.
        call: further arguments of the pipeline.

    Returns:
        The better plan; in its provenance under ``quantised`` the network's plan and the held-out errors of both.

    Raises:
        FewstepError: a network that is not quantised or whose float layers are gone, a pipeline with a cache on, or a plan
            that reuses nothing.

    Example:
        >>> plan = caching.calibrate(pipe, caching.DPCache(), prompts, num_inference_steps=20)
        >>> quant.quantize_(pipe.transformer, quant.W4A8())
        >>> caching.apply_(pipe, quant.fit_cache(pipe, plan, prompts))
    """
    from fewstep.caching import CachePlan, controller_of
    from fewstep.caching.actions import Action
    from fewstep.caching.calibration.calibrate import default_guidance
    from fewstep.caching.calibration.fitting import Fitter
    from fewstep.caching.calibration.recording import Deep
    from fewstep.caching.calibration.runs import Runs
    from fewstep.caching.controller import applied
    from fewstep.eval.drawing.batch import borrowed

    model = unwrapped(denoisers(pipe)[0])
    record: Record | None = getattr(model, RECORD, None)
    if record is None or not record.originals:
        raise FewstepError("a cache is fitted against the float layers; quantize_ the network with keep_originals=True")
    if controller_of(pipe) is not None:
        raise FewstepError("the pipeline has a cache; take it away before fitting one (caching.remove_)")
    if not isinstance(plan, CachePlan):
        raise FewstepError(f"plan is of type {type(plan).__name__}; give a CachePlan, such as caching.calibrate makes")
    if not (plan.actions == Action.REUSE).any():
        raise FewstepError("the cache plan reuses nothing that could be fitted")
    guidance = default_guidance(pipe) if guidance_scale is None else guidance_scale
    train, test = Runs.of(pipe, prompts, samples, plan.num_inference_steps, guidance, seed, batch, call).split(held_out)
    depth = max(1, plan.predictor.depth)
    fitter = Fitter(depth, plan.steps)
    with evaluating(model), torch.no_grad(), borrowed(pipe):
        with float_inside(model, record):
            wanted = test.latents()
        with applied(pipe, replace(plan, predictor=Deep(depth))) as controller:
            for cache in controller.caches:
                cache.teacher, cache.truth = fitter, lambda: float_inside(model, record)
            train.latents()
        fitted = replace(plan, predictor=fitter.predictor())
        errors = []
        for candidate in (plan, fitted):
            with applied(pipe, candidate):
                errors.append(_error(test.latents(), wanted))
    better = fitted if errors[1] < errors[0] else plan
    said = [error if math.isfinite(error) else None for error in errors]  # JSON knows no infinity
    found = {"method": record.plan.method, "fingerprint": record.plan.fingerprint, "latent_rms": said}
    return replace(better, provenance={**plan.provenance, "quantised": found})


def _error(latents: Tensor, wanted: Tensor) -> float:
    """Mean over samples of the RMS error."""
    return float((latents - wanted).double().flatten(1).square().mean(1).sqrt().mean().nan_to_num(nan=torch.inf))
