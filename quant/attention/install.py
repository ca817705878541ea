"""Attention modules that compute in 8 bits: hung in around their forward, taken off without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fewstep.errors import FewstepError, unknown
from fewstep.quant.attention.plan import AttentionPlan
from fewstep.quant.attention.reference import quantized_attention

OWN = ("auto", "reference", "triton")
_TOO_FAR = 0.2
"""Relative error at which an implementation computes something else: 8 bits are off by a few percent."""


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """diffusers' attention modules by name: those that hand their products to a processor."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "processor") and hasattr(module, "set_processor")
    }


def check(model: nn.Module, plans: Mapping[str, AttentionPlan]) -> None:
    """Raises FewstepError for a name that no attention of the model has, or a backend that is not there."""
    there = attentions(model)
    for name, plan in plans.items():
        if name not in there:
            raise FewstepError(unknown("attention", name, there))
        if "forward" in vars(there[name]):
            raise FewstepError(
                f"{name} has a hook around it, a cache's or that of offloading; take it off, quantise, and put it on again"
            )
        problem = problem_of(plan, next(model.parameters()).device)
        if problem:
            raise FewstepError(f"attention backend {plan.backend!r} cannot compute {name}: {problem}")


def problem_of(plan: AttentionPlan, device: torch.device) -> str | None:
    """Why a plan's backend is not to be had on a device, None where it is."""
    if plan.backend == "triton":
        from fewstep.quant.attention.triton import missing

        return missing(plan, device)
    if plan.backend in OWN:
        return None
    from diffusers.models import attention_dispatch as dispatch

    names = [name.value for name in dispatch.AttentionBackendName]
    if plan.backend not in names:
        return unknown("attention backend", plan.backend, (*OWN, *names))
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(plan.backend))
        dispatch._maybe_download_kernel_for_backend(dispatch.AttentionBackendName(plan.backend))
    except (RuntimeError, ImportError, ValueError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return None


def install(model: nn.Module, plans: Mapping[str, AttentionPlan]) -> None:
    """Let the named attentions compute as planned."""
    there = attentions(model)
    for name, plan in plans.items():
        there[name].forward = Quantizing(there[name], plan)


def remove(model: nn.Module) -> int:
    """Take off what :func:`install` did, as far as it is there; how many attentions.

    Raises:
        FewstepError: where a hook was put around one since, which nothing is done then.
    """
    found = [(name, module) for name, module in model.named_modules() if _of(module) is not None]
    for name, module in found:
        if not isinstance(vars(module)["forward"], Quantizing):
            raise FewstepError(f"{name} has a hook around it, such as a cache's; take that off first (caching.remove_)")
    for _, module in found:
        del module.__dict__["forward"]
    return len(found)


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Attentions compute as they did before :func:`install` inside."""
    found = [one for module in model.modules() if (one := _of(module)) is not None]
    for one in found:
        one.paused = True
    try:
        yield
    finally:
        for one in found:
            one.paused = False


def _of(module: nn.Module) -> Quantizing | None:
    """What :func:`install` put on a module, also behind hooks that were put around it since."""
    forward = vars(module).get("forward")
    while forward is not None and not isinstance(forward, Quantizing):
        forward = getattr(forward, "__wrapped__", None)
    return forward


class Quantizing:
    """An attention module's forward in which scaled dot product attention is computed as planned.

    Processors differ in everything but that they end in torch's ``scaled_dot_product_attention``; so that call is what is
    replaced, wherever the processor or diffusers' dispatch makes it.
    """

    def __init__(self, module: nn.Module, plan: AttentionPlan) -> None:
        self.module, self.plan = module, plan
        self.compared = plan.backend in OWN
        self.paused = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.paused else _Instead(self.attend):
            return type(self.module).forward(self.module, *args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, scale: float | None) -> Tensor:
        """The planned attention of (B, H, L, D)."""
        plan = self.plan
        if plan.backend == "triton" or (plan.backend == "auto" and query.is_cuda):
            from fewstep.quant.attention.triton import missing, triton_attention

            if mask is None and missing(plan, query.device) is None:
                return triton_attention(query, key, value, plan, scale)
        if plan.backend in OWN:
            return quantized_attention(query, key, value, plan, mask, scale)
        if mask is not None:  # none of them takes one
            return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return self.dispatched(query, key, value, scale)

    def dispatched(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """By one of diffusers' backends, whose tensors are (B, L, H, D); compared with torch's own once."""
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        out: Tensor = dispatch_attention_fn(q, k, v, scale=scale, backend=AttentionBackendName(self.plan.backend))
        out = out.transpose(1, 2)
        if not self.compared:
            want = F.scaled_dot_product_attention(query, key, value, scale=scale).float()
            error = float((out.float() - want).norm() / want.norm())
            if not error <= _TOO_FAR or not math.isfinite(error):
                raise FewstepError(
                    f"attention backend {self.plan.backend!r} is off by {error:.0%} on the first call of a "
                    f"{type(self.module).__name__} with heads of {query.shape[-1]}; take another one"
                )
            self.compared = True
        return out


class _Instead(TorchFunctionMode):
    """Calls of scaled_dot_product_attention go to ``attend`` instead, those from within it excepted."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        bound = dict(zip(names, args, strict=False)) | given
        if bound.get("is_causal") or bound.get("enable_gqa") or bound.get("dropout_p"):
            return func(*args, **given)
        q, k, v = (bound[name] for name in names[:3])
        return self.attend(q, k, v, mask=bound.get("attn_mask"), scale=bound.get("scale"))
