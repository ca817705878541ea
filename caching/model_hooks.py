"""The hooks of a network's cache: around the network, around its sites, and where decisions look."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor, nn

from fewstep.caching.hooks import Around
from fewstep.caching.roles import Role, first_tensor

if TYPE_CHECKING:
    from fewstep.caching.model_cache import ModelCache


class RootHook(Around):
    """Around the network: opens and closes a call. Pipelines' cache contexts reach it through ``context``."""

    _is_stateful = True

    def __init__(self, cache: ModelCache) -> None:
        super().__init__()
        self.cache = cache
        self.context = StateManager(BaseState())

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The call, through the cache."""
        context = getattr(self.context, "_context", None) or getattr(self.context, "_current_context", None)
        return self.cache.forward(forward, context, args, kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.cache.reset()
        return module


class SiteHook(Around):
    """Around a module of a site."""

    def __init__(self, cache: ModelCache, index: int, role: Role) -> None:
        super().__init__()
        self.cache, self.index, self.role = cache, index, role

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module's call, or what stands for it."""
        return self.cache.at_site(self.index, self.role, module, forward, args, kwargs)


class ProbeHook(Around):
    """Records what goes into a module, or comes out of it, for online decisions."""

    def __init__(self, cache: ModelCache, name: str, end: str) -> None:
        super().__init__()
        self.cache, self.name, self.end = cache, name, end

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module's call, its input or output remembered."""
        call = self.cache.call
        if call is not None and self.end == "input":
            call.probes[self.name] = first_tensor(args, kwargs)
        out = forward(*args, **kwargs)
        if call is not None and self.end == "output":
            call.probes[self.name] = out if isinstance(out, Tensor) else first_tensor(out, {})
        return out
