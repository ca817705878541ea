"""The verbs: put a cache on a pipeline, look at it, take it away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from fewstep.caching.hooks import installed
from fewstep.caching.method import Method, check_count
from fewstep.caching.model_cache import ModelCache
from fewstep.caching.plan import CachePlan
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from fewstep.caching.report import CacheReport

Caches = Method | CachePlan | Sequence[Method | CachePlan]


class Controller:
    """What :func:`apply_` returns: the caches of a pipeline's networks, usually one.

    Attributes:
        caches: one for each network.
    """

    def __init__(self, caches: Sequence[ModelCache]) -> None:
        self.caches = tuple(caches)

    def reset(self) -> None:
        """Forget what is kept. Needed only between trajectories that the calls cannot tell apart."""
        for cache in self.caches:
            cache.reset()

    def report(self) -> CacheReport:
        """What was done since the cache was applied, by step and site."""
        from fewstep.caching.report import CacheReport

        return CacheReport.of(self.caches)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The network computes everything inside the block; what is kept is dropped."""
        before = [cache.enabled for cache in self.caches]
        for cache in self.caches:
            cache.enabled = False
        try:
            yield
        finally:
            for cache, enabled in zip(self.caches, before, strict=True):
                cache.enabled = enabled
                cache.reset()


def apply_(pipe: Any, method: Caches, *, num_inference_steps: int | None = None) -> Controller:
    """Put a cache on a pipeline's networks, in place; nothing of their weights changes.

    Args:
        pipe: a diffusers pipeline, or a network.
        method: a method such as ``DeepCache(interval=3)``, a :class:`CachePlan`, or several on disjoint sites.
        num_inference_steps: number of steps, needed only for a network that is called with numbers as timesteps by a
            method that plans ahead.

    Returns:
        the controller, which reports.

    Raises:
        FewstepError: for a network that has a cache already, has not the method's sites, or is compiled as a whole; the
            pipeline is then unchanged.
    """
    from fewstep.eval.costs.calls import denoisers

    methods = [method] if isinstance(method, Method | CachePlan) else list(method)
    if not methods or not all(isinstance(m, Method | CachePlan) for m in methods):
        raise FewstepError(f"method is {method!r}; give a caching method, a CachePlan, or a list of them")
    if num_inference_steps is not None:
        check_count(num_inference_steps, "num_inference_steps")
    owner = None if isinstance(pipe, nn.Module) else pipe
    caches: list[ModelCache] = []
    try:
        for model in denoisers(pipe):
            caches.append(ModelCache(model, methods, num_inference_steps, owner))
    except BaseException:
        for cache in caches:
            cache.remove()
        raise
    return Controller(caches)


def remove_(pipe: Any) -> None:
    """Take the cache of a pipeline or network away; its outputs are bit for bit what they were before.

    Raises:
        FewstepError: where there is none.
    """
    found = _caches(pipe)
    if not found:
        raise FewstepError(f"{type(pipe).__name__} has no cache to remove")
    for cache in found:
        cache.remove()


def controller_of(pipe: Any) -> Controller | None:
    """The controller of a pipeline or network that has a cache, else None."""
    found = _caches(pipe)
    return Controller(found) if found else None


def _caches(pipe: Any) -> list[ModelCache]:
    from fewstep.eval.costs.calls import denoisers

    hooks = [installed(model) for model in denoisers(pipe)]
    return [hook.cache for hook in hooks if hook is not None]


@contextmanager
def applied(pipe: Any, method: Caches, *, num_inference_steps: int | None = None) -> Iterator[Controller]:
    """:func:`apply_` for a block.

    Example:
        >>> with caching.applied(pipe, caching.DeepCache(interval=3)) as controller:
        ...     images = pipe(prompts, num_inference_steps=50).images
        >>> print(controller.report())
    """
    controller = apply_(pipe, method, num_inference_steps=num_inference_steps)
    try:
        yield controller
    finally:
        for cache in controller.caches:
            cache.remove()


class Cached(nn.Module):
    """A plain callable as a network, so that its output can be reused.

    Attributes:
        controller: of its cache.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.controller: Controller | None = None

    def forward(self, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """The function's output."""
        return self.function(sample, timestep, *args, **kwargs)


def wrap(function: Callable[..., Any], method: Caches, *, num_inference_steps: int | None = None) -> Cached:
    """A callable ``f(sample, timestep, ...)`` with a cache on its output.

    Example:
        >>> model = caching.wrap(denoise, caching.Interval(2, sites=("output",)), num_inference_steps=20)
        >>> x0 = samplers.sample(model, noise, plan)
    """
    model = Cached(function)
    model.controller = apply_(model, method, num_inference_steps=num_inference_steps)
    return model
