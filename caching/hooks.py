"""Hooks of a cache, on diffusers' hook registry, and what has to be added to it for copies and clean removal.

diffusers' registry leaves closures over the hooked module behind: a copied pipeline would run the original's layers, and a
pickled one cannot be made. :class:`Registry` puts a small picklable object in their place, also for hooks of others that
are registered later. A module that ``module.compile()`` compiled is hooked outside its compiled call, so that no decision is
traced and no graph breaks inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

NAME = "fewstep_cache"


class Chain:
    """A module's forward with a hook around it, like the registry's closure, but an object that can be copied."""

    def __init__(self, module: nn.Module, reference: Any, original: Callable[..., Any]) -> None:
        self.module, self.reference, self.__wrapped__ = module, reference, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.reference.pre_forward(self.module, *args, **kwargs)
        return self.reference.post_forward(self.module, self.reference.forward(*args, **kwargs))


class Registry(HookRegistry):
    """diffusers' registry, with forwards that survive ``copy.deepcopy`` and ``pickle``."""

    def register_hook(self, hook: ModelHook, name: str) -> None:
        original = self._module_ref.forward
        super().register_hook(hook, name)
        self._module_ref.forward = Chain(self._module_ref, hook.fn_ref, original)


def registry_of(module: nn.Module) -> HookRegistry:
    """The module's registry; ours where it had none."""
    found: HookRegistry = vars(module).get("_diffusers_hook") or Registry(module)
    vars(module)["_diffusers_hook"] = found
    return found


class Around(ModelHook):
    """Base of hooks that stand around a module's forward and decide whether it is called."""

    fn_ref: Any

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.run(module, self.fn_ref.original_forward, args, kwargs)

    def run(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module's call, by way of ``forward``, or what stands for it."""
        raise NotImplementedError


class CompiledCall:
    """Stands in the place of a module's compiled call and asks the hook first."""

    def __init__(self, module: nn.Module, hook: Any, compiled: Callable[..., Any]) -> None:
        self.module, self.hook, self.compiled = module, hook, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hook.run(self.module, self.compiled, args, kwargs)


def install(module: nn.Module, hook: Any, name: str = NAME) -> None:
    """Put a hook, which has ``run(module, forward, args, kwargs)``, around a module's forward."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:
        module._compiled_call_impl = CompiledCall(module, hook, compiled)
    else:
        registry_of(module).register_hook(hook, name)


def uninstall(module: nn.Module, name: str = NAME) -> None:
    """Take a hook away and leave the module as it was: no attribute stays that was not there."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if isinstance(compiled, CompiledCall):
        module._compiled_call_impl = compiled.compiled
        return
    registry = vars(module).get("_diffusers_hook")
    if registry is None:
        return
    registry.remove_hook(name, recurse=False)
    if not registry.hooks:
        if isinstance(registry, Registry):
            del module._diffusers_hook
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__func__", None) is type(module).forward:
            del module.forward  # the registry leaves the class's own method on the instance


def keep_outside(module: nn.Module) -> None:
    """Move a module's hooks out of its compiled call, where it was compiled after they were put on."""
    compiled = getattr(module, "_compiled_call_impl", None)
    registry = vars(module).get("_diffusers_hook")
    if compiled is None or isinstance(compiled, CompiledCall) or registry is None:
        return
    ours = [(name, hook) for name, hook in registry.hooks.items() if name.startswith(NAME)]
    for name, _ in ours:
        uninstall(module, name)
    for name, hook in ours:
        install(module, hook, name)


def installed(module: nn.Module, name: str = NAME) -> Any | None:
    """The hook of that name on a module, or None."""
    registry = vars(module).get("_diffusers_hook")
    return registry.get_hook(name) if registry is not None else None
