"""The cache of one network: hooks on it and on the modules of its sites, and what they decide in a call."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from fewstep.caching.actions import Action
from fewstep.caching.clock import Clock
from fewstep.caching.families import Site, family_of
from fewstep.caching.hooks import NAME, install, installed, keep_outside, uninstall
from fewstep.caching.layers import Call, Layer, Seen, Stream
from fewstep.caching.method import Entry, Method
from fewstep.caching.model_hooks import ProbeHook, RootHook, SiteHook
from fewstep.caching.plan import CachePlan
from fewstep.caching.predictors import Predictor
from fewstep.caching.roles import Fit, Moment, Role, Scene
from fewstep.caching.rows import Rows
from fewstep.caching.store import Cell
from fewstep.caching.streams import Streams, layout, on_meta
from fewstep.errors import FewstepError

PROBE = "fewstep_cache_probe"
AROUND = "fewstep_cache_around"


class ModelCache:
    """A network with its layers of caches; made by :func:`fewstep.caching.apply_`.

    Attributes:
        model: the network.
        family: what is known of it.
        layers: the methods and their sites.
        steps: number of steps, where the user said it.
        log: how often what was done, by (step, index of the site, action).
        forced: how many reuses had to be computed because nothing fitting was kept.
    """

    def __init__(
        self, model: nn.Module, methods: Sequence[Method | CachePlan], steps: int | None = None, pipe: Any = None
    ) -> None:
        if installed(model):
            raise FewstepError(f"{type(model).__name__} has a cache already; take it away first (caching.remove_)")
        self.model, self.steps, self.pipe = model, steps, pipe
        self.family = family_of(model)
        self.layers = [Layer(method, self.family) for method in methods]
        self.sites: list[Site] = [site for layer in self.layers for site in layer.sites]
        self._owner = [number for number, layer in enumerate(self.layers) for _ in layer.sites]
        self._first = [self._owner.index(number) for number in range(len(self.layers))]
        self._outputs = [(index, role) for index, role in self._roles() if not role.path]  # the whole network's output
        self._check_disjoint()
        self.enabled = True
        self.teacher: Fit | None = None  # in calibration: sees the true value of every reused site
        self.truth: Callable[[], AbstractContextManager[object]] = nullcontext  # inside it true values are computed
        self.lesson: Callable[[Callable[[], Any], Callable[[], Any]], Any] | None = (
            None  # in training: (cached, uncached)
        )
        self.observers: list[Callable[[Call, Any], None]] = []  # called with every call and its output
        self.log: Counter[tuple[int, int, int]] = Counter()
        self.forced = 0
        self.peak_bytes = 0
        self._inputs: dict[Any, dict[str, Any]] = {}
        self._calls: Counter[tuple[Any, tuple[int, ...]]] = Counter()
        self._start()
        self._install()

    # -- life ---------------------------------------------------------------------------------------------------------
    def _start(self) -> None:
        self.call: Call | None = None
        self._clock, self._streams = Clock(), Streams()
        self._by_name: dict[str, Stream] = {}
        self._shared: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget everything kept; the next call starts a trajectory. The log stays."""
        self._start()

    def rebatch(self, change: Callable[[Any], Any], sample: Any) -> None:
        """Change the batch of what is kept, to fit a next call that is made with ``sample``."""
        for stream in self._by_name.values():
            stream.cells = [cell.mapped(change) for cell in stream.cells]
            stream.layout, stream.cut = layout([sample]), {}

    def streams(self) -> list[Stream]:
        """What is kept now, for each stream of the trajectory."""
        return list(self._by_name.values())

    def clear_log(self) -> None:
        """Forget what was done so far."""
        self.log.clear()
        self._inputs, self._calls = {}, Counter()
        self.forced = self.peak_bytes = 0

    def seen(self) -> Seen:
        """The calls up to now."""
        return Seen(self.model, tuple(site.name for site in self.sites), dict(self._inputs), Counter(self._calls))

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelCache:
        """A cache of the copied network that keeps nothing yet and belongs to the copied pipeline, if one is copied."""
        new = object.__new__(type(self))
        memo[id(self)] = new
        state = {k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()}
        vars(new).update(state, pipe=memo.get(id(self.pipe)))
        new._copied = True
        new._start()
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in vars(self).items()
            if k not in ("pipe", "call", "_clock", "_streams", "_by_name", "_shared")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, pipe=None, _copied=True)
        self._start()

    def _check_disjoint(self) -> None:
        owner: dict[tuple[str, bool], Site] = {}
        for site in self.sites:
            for role in site.roles:
                if (other := owner.setdefault((role.path, role.wraps), site)) is not site:
                    raise FewstepError(
                        f"sites {other.name!r} and {site.name!r} share {role.path or 'the model'!r}; give disjoint ones"
                    )

    def _install(self) -> None:
        self._hooks: list[tuple[nn.Module, ModelHook, str]] = []
        self._copied = False
        try:
            modules = dict(self.model.named_modules())
            for layer in self.layers:
                for name, place in layer.probes.items():
                    path, _, end = place.rpartition(":")
                    self._hook(modules[path], ProbeHook(self, name, end), f"{PROBE}_{name}")
            for index, role in self._roles():
                if role.path:
                    self._hook(modules[role.path], SiteHook(self, index, role), AROUND if role.wraps else NAME)
            install(self.model, RootHook(self))
        except BaseException:
            for module, _, name in reversed(self._hooks):
                uninstall(module, name)
            raise
        self._hooked = list(dict.fromkeys(module for module, _, _ in self._hooks))

    def _hook(self, module: nn.Module, hook: ModelHook, name: str) -> None:
        install(module, hook, name)
        self._hooks.append((module, hook, name))

    def _hook_again(self) -> None:
        """A copied module has lost its compiled call, and with it what stood around that."""
        for module, hook, name in self._hooks:
            if installed(module, name) is None:
                install(module, hook, name)
        self._copied = False

    def remove(self) -> None:
        """Take all hooks away; the network is as it was. Nothing is done where another cache has taken this one's place."""
        if getattr(installed(self.model), "cache", None) is not self:
            return
        modules = dict(self.model.named_modules())
        for _, role in reversed(self._roles()):
            if role.path:
                uninstall(modules[role.path], AROUND if role.wraps else NAME)
        for layer in self.layers:
            for name, place in layer.probes.items():
                uninstall(modules[place.rpartition(":")[0]], f"{PROBE}_{name}")
        uninstall(self.model)
        self._invalidate()

    def _roles(self) -> list[tuple[int, Role]]:
        """All roles with the index of their site; those that go around others last."""
        roles = [(index, role) for index, site in enumerate(self.sites) for role in site.roles]
        return sorted(roles, key=lambda pair: pair[1].wraps)

    def _invalidate(self) -> None:
        registry = vars(self.model).get("_diffusers_hook")
        if registry is not None and hasattr(registry, "invalidate_child_registries_cache"):
            registry.invalidate_child_registries_cache()

    # -- calls --------------------------------------------------------------------------------------------------------
    def forward(self, forward: Callable[..., Any], context: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call of the network: the position is found, then its modules run and ask what to do."""
        if not self.enabled or self.call is not None:
            return forward(*args, **kwargs)
        if self._copied:
            self._hook_again()
        for module in self._hooked:
            if module._compiled_call_impl is not None:
                keep_outside(module)
        try:
            self.call = self._begin(context, self.family.arguments(args, kwargs))
            run = functools.partial(self._run, forward, args, kwargs)
            out = self.lesson(run, functools.partial(self._bare, forward, args, kwargs)) if self.lesson else run()
            for observer in self.observers:
                observer(self.call, out)
            return out
        except BaseException:
            self.reset()  # half of a call's features must not be reused
            raise
        finally:
            self._count()
            self.call = None

    def _bare(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The network's output as if it had no cache, in the middle of a call."""
        call, self.call = self.call, None
        try:
            return forward(*args, **kwargs)
        finally:
            self.call = call

    def _run(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        for index, role in self._outputs:
            forward = self._around(index, role, forward)
        return forward(*args, **kwargs)

    def _around(self, index: int, role: Role, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.at_site(index, role, self.model, forward, args, kwargs)

    def _begin(self, context: Any, arguments: Mapping[str, Any]) -> Call:
        name = context if isinstance(context, str) else getattr(context, "name", None)
        conditioning = self.family.conditioning(arguments)
        name = name or self._streams.name(conditioning)
        index = getattr(context, "step_index", None)
        scheduler = getattr(self.pipe, "scheduler", None)
        total = self.steps
        if scheduler is not None:
            times = getattr(scheduler, "timesteps", None)
            total = total or (len(times) if times is not None else None)
            index = _step_index(scheduler) if index is None else index
        tick = self._clock.tick(name, arguments.get("timestep"), index, total)
        if tick.fresh:
            self._by_name, self._shared = {}, {}
            for layer in self.layers:
                if isinstance(layer.method, CachePlan) and scheduler is not None:
                    layer.method.check_scheduler(scheduler)
        total = self.steps or tick.total
        kind = layout([self.family.sample(arguments)])
        if kind not in self._inputs:
            self._inputs[kind] = on_meta(dict(arguments))
        stream = self._by_name.get(name)
        if stream is None and (ended := self._ended(conditioning)):
            stream = self._by_name[name] = ended[0].half(ended[1], kind)
        elif stream is None:
            deciders = [layer.decider(self.family, total, self._times(total)) for layer in self.layers]
            predictors = [layer.predictor(decider) for layer, decider in zip(self.layers, deciders, strict=True)]
            stream = self._by_name[name] = Stream(deciders, predictors, self._cells(predictors), kind)
        elif stream.layout != kind:  # another batch or size: nothing that is kept fits
            stream.cells, stream.layout, stream.cut = self._cells(stream.predictors), kind, {}
        return Call(stream, name, tick.step, total, Scene(name, self.family.sample(arguments), None, self._shared))

    def _ended(self, conditioning: tuple[Tensor, ...]) -> tuple[Stream, Rows] | None:
        """A guided stream that calls no more, and the half of its batch that goes on with this conditioning."""
        part = self._streams.part(conditioning)
        if part is None or part[0] not in self._by_name or self._clock.called(part[0]):
            return None
        return self._by_name[part[0]], part[1]

    def _times(self, total: int | None) -> tuple[float, ...] | None:
        """The scheduler's timesteps on the host, where they are the trajectory's and a method asks for them."""
        if not any(layer.timed for layer in self.layers):
            return None
        times = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        return tuple(map(float, times.tolist())) if isinstance(times, Tensor) and len(times) == total else None

    def _cells(self, predictors: Sequence[Predictor]) -> list[Cell]:
        return [
            Cell.empty(site.name, predictors[owner].depth) for site, owner in zip(self.sites, self._owner, strict=True)
        ]

    def at_site(
        self, index: int, role: Role, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A module of site ``index`` was reached."""
        call = self.call
        if call is None:  # called by itself, outside the network
            return forward(*args, **kwargs)
        owner = self._owner[index]
        action = call.actions.get(index)
        cell = call.stream.cell(index, None if role.wraps else call.scene.rows)
        keep = call.stream.deciders[owner].keeps(call.step, index - self._first[owner])
        if action is None:
            action = self._decide(call, index, cell, keep, module, args, kwargs)
        keep = keep or index in call.forced
        at = Moment(cell, call.step, keep, call.stream.predictors[owner], call.scene)
        if action is Action.COMPUTE:
            return role.compute(at, forward, args, kwargs)
        if action is Action.REUSE and self.teacher is not None:
            with self.truth():
                return role.teach(at, forward, args, kwargs, self.teacher)
        if action is Action.REUSE:
            return role.reuse(at, forward, args, kwargs)
        return (role.skip if action is Action.SKIP else role.sparse)(at, forward, args, kwargs)

    def _decide(self, call: Call, index: int, cell: Cell, keep: bool, module: Any, args: Any, kwargs: Any) -> Action:
        owner = self._owner[index]
        local = index - self._first[owner]
        kept = cell.history[0] if cell.history else None
        entry = Entry(call.step, call.total, local, module, args, kwargs, call.probes, cell.computed, kept)
        action = call.stream.deciders[owner](entry)
        if action in self.sites[index].roles[0].reads and cell.computed is None:
            action, self.forced = Action.COMPUTE, self.forced + 1
            call.forced.add(index)  # kept, so that the next reuse is none of these
        if action is Action.COMPUTE and (keep or index in call.forced):
            cell.computed = call.step
        call.actions[index] = action
        return action

    def _count(self) -> None:
        if self.call is None:
            return
        for index, action in self.call.actions.items():
            self.log[self.call.step, index, int(action)] += 1
        row = tuple(int(self.call.actions.get(index, Action.COMPUTE)) for index in range(len(self.sites)))
        self._calls[self.call.stream.layout, row] += 1
        self.peak_bytes = max(self.peak_bytes, sum(stream.nbytes for stream in self._by_name.values()))


def _step_index(scheduler: Any) -> int | None:
    """Where a scheduler is, as a whole number that it keeps on the host; None where it keeps none."""
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None) if hasattr(scheduler, "begin_index") else None
        index = 0 if index is None and hasattr(scheduler, "step_index") else index
    return index if isinstance(index, int) else None
