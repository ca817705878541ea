"""Other packages' caches behind one context manager each, to run them on the same pipelines and seeds.

    pip install --no-deps DeepCache==0.1.1 cache-dit==1.5.3

Each yields a function that forgets what is kept, to be called before every run. Diffusers' caches work on models that are no
``CacheMixin`` (DiT, PixArt, SD3) only where somebody sets the cache context that no pipeline of theirs opens; that is done
here. They cannot be taken away cleanly from every model, so they are put on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

Peer = Callable[[Any, int], AbstractContextManager[Callable[[], None]]]
"""``peer(pipe, steps)``, open while the pipeline draws."""


def deep_cache(interval: int, branch: int = 0) -> Peer:
    """DeepCache's own helper, whose layer arithmetic expects the UNet of Stable Diffusion 1 or one built like it."""

    @contextmanager
    def peer(pipe: Any, steps: int) -> Iterator[Callable[[], None]]:
        helper = import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        forwards = {module: vars(module).get("forward") for module in pipe.unet.modules()}
        helper.enable()
        try:
            yield lambda: setattr(helper, "start_timestep", None)
        finally:
            for module, forward in forwards.items():  # it leaves some of its wrappers behind
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward

    return peer


def diffusers(function: str, config: str, **options: Any) -> Peer:
    """One of diffusers' caches, ``diffusers.hooks.<function>(model, <config>(**options))``.

    ``current_timestep_callback=True`` stands for a function that knows the timestep of the call.
    """

    @contextmanager
    def peer(pipe: Any, steps: int) -> Iterator[Callable[[], None]]:
        from diffusers import hooks
        from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

        with copied(pipe) as model:
            now = {"timestep": 1000.0}

            def look(module: nn.Module, args: Any, kwargs: Any) -> None:
                now["timestep"] = float(torch.as_tensor(kwargs["timestep"]).reshape(-1)[0])

            model.register_forward_pre_hook(look, with_kwargs=True)
            given: dict[str, Any] = {"num_inference_steps": steps} if config == "MagCacheConfig" else {}
            if options.get("current_timestep_callback"):
                given["current_timestep_callback"] = lambda: now["timestep"]
            getattr(hooks, function)(model, _config(config)(**options | given))
            registry = HookRegistry.check_if_exists_or_initialize(model)

            def reset() -> None:
                registry.reset_stateful_hooks(recurse=True)
                _set_cache_context(model, CacheContext("both"))

            yield reset

    return peer


def cache_dit(threshold: float, front: int = 1, back: int = 0, warmup: int = 1, taylor: int | None = None) -> Peer:
    """cache-dit's DBCache, with its TaylorSeer where an order is given."""

    @contextmanager
    def peer(pipe: Any, steps: int) -> Iterator[Callable[[], None]]:
        package = import_module("cache_dit")
        with copied(pipe):
            config = package.DBCacheConfig(
                Fn_compute_blocks=front,
                Bn_compute_blocks=back,
                residual_diff_threshold=threshold,
                max_warmup_steps=warmup,
                num_inference_steps=steps,
            )
            seer = None if taylor is None else package.TaylorSeerCalibratorConfig(taylorseer_order=taylor)
            where = pipe if hasattr(pipe, "components") else pipe.transformer
            kind, call = type(pipe), type(pipe).__dict__.get("__call__")
            package.enable_cache(where, cache_config=config, calibrator_config=seer)
            try:
                yield lambda: None  # its patched pipeline starts anew with every call
            finally:
                package.disable_cache(where)
                if call is not None:  # it patches the class, for all pipelines of it
                    kind.__call__ = call

    return peer


@contextmanager
def copied(pipe: Any) -> Iterator[nn.Module]:
    """The pipeline with a copy of its transformer in the original's place; both share the weights."""
    original = pipe.transformer
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
    pipe.transformer = copy.deepcopy(original, shared)
    try:
        yield pipe.transformer
    finally:
        pipe.transformer = original


def _config(name: str) -> Any:
    homes = ("first_block_cache", "taylorseer_cache", "mag_cache", "faster_cache", "pyramid_attention_broadcast")
    modules = [import_module(f"diffusers.hooks.{home}") for home in homes]
    return next(getattr(module, name) for module in modules if hasattr(module, name))
