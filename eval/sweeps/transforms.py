"""What is done to a pipeline around a cell and undone after it: the cache and the quant axis of a sweep."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fewstep.errors import FewstepError, unknown
from fewstep.eval import fingerprint
from fewstep.eval.costs.calls import denoisers
from fewstep.eval.sweeps.identity import jsonable, model_identity
from fewstep.eval.sweeps.specs import call_spec

NONE = "none"


class TransformError(FewstepError):
    """A transform that could not be applied."""


class LeftBehind(FewstepError):
    """A transform that could not be removed, or that left something behind: the pipeline is not what it was."""


@dataclass(frozen=True)
class Transform:
    """A named change of a pipeline that can be undone, as an axis value of a sweep.

    Attributes:
        name: as it stands in the results.
        around: of a pipeline a context manager: changed inside, as before outside.
        identity: everything that the images depend on beside the name (settings, a version), as JSON. It is hashed
            into the cell's key; without it, another change under the same name would be taken for this one.

    Example:
        >>> halved = Transform.pair("half", lambda pipe: pipe.unet.half(), lambda pipe: pipe.unet.float())
        >>> Sweep(pipe, ["DDIM"], [10], prompts=prompts, quants=["none", halved])
    """

    name: str
    around: Callable[[Any], AbstractContextManager[Any]]
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise FewstepError(f"a transform's name is {self.name!r}; give a text")
        if not callable(self.around):
            raise FewstepError(f"transform {self.name!r} has no function that makes a context manager of a pipeline")
        fingerprint.canonical_json(dict(self.identity))  # refuses what could not be hashed

    @classmethod
    def pair(
        cls,
        name: str,
        apply: Callable[[Any], object],
        remove: Callable[[Any], object],
        identity: Mapping[str, Any] | None = None,
    ) -> Transform:
        """From two functions of the pipeline; ``remove`` is called even where drawing failed."""

        @contextmanager
        def around(pipe: Any) -> Iterator[None]:
            apply(pipe)
            try:
                yield
            finally:
                remove(pipe)

        return cls(name, around, identity or {})

    @contextmanager
    def applied(self, axis: str, pipe: Any) -> Iterator[Any]:
        """The pipeline changed, with what the change gives to look at it.

        Failures to change it and to undo that are told from failures in between.

        Raises:
            TransformError: where it cannot be applied.
            LeftBehind: where it cannot be removed.
        """
        try:
            manager = self.around(pipe)
            given = manager.__enter__()
        except Exception as error:
            raise TransformError(f"{axis} {self.name!r} could not be applied: {_reason(error)}") from error
        try:
            yield given
        finally:
            try:
                manager.__exit__(None, None, None)
            except Exception as error:
                raise LeftBehind(f"{axis} {self.name!r} could not be removed: {_reason(error)}") from error


NOTHING = Transform(NONE, nullcontext)


def make_transform(axis: str, value: Any) -> Transform:
    """A value of the ``cache`` or ``quant`` axis.

    Args:
        axis: which.
        value: a transform as it is; a spec such as ``"DeepCache(interval=3)"``; or a method or a plan of the axis's room.

    Raises:
        FewstepError: for a name that the room does not have, or options that it refuses.
    """
    if isinstance(value, Transform):
        return value
    room = _ROOMS[axis]
    if not isinstance(value, str):
        if isinstance(value, room.kinds()):
            return room.transform(_spelled(value), value)
        raise FewstepError(f"{axis} is {value!r}; give a name with options, {NONE!r}, or a Transform")
    if value.strip() == NONE:
        return NOTHING
    name, options = call_spec(value, axis)
    methods = room.methods()
    if name not in methods:
        raise FewstepError(unknown(axis, name, (NONE, *methods)))
    try:
        method = methods[name](**options)
    except (TypeError, ValueError) as error:
        raise FewstepError(f"{axis} {value!r} cannot be made: {_reason(error)}") from error
    spelled = f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})" if options else name
    return room.transform(spelled, method)


@contextmanager
def unchanged(pipe: Any, what: str) -> Iterator[None]:
    """Check that a pipeline is after the block what it was before; ``what`` changed it in between.

    Raises:
        LeftBehind: where it is not.
    """
    before = structure(pipe)
    try:
        yield
    finally:
        if structure(pipe) != before:
            raise LeftBehind(f"{what} left the pipeline changed after it was removed")


def _spelled(method: Any) -> str:
    """A method as it would be written, options that are the default left out; a plan by its method and digest."""
    if hasattr(method, "digest"):
        return f"plan {method.digest[:8]} by {method.method}"
    options = {
        f.name: value for f in dataclasses.fields(method) if f.init and (value := getattr(method, f.name)) != f.default
    }
    inside = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{type(method).__name__}({inside})" if inside else type(method).__name__


def structure(pipe: Any) -> str:
    """Hash of what a transform might leave changed: weights, configuration, modules, hooks and patched methods."""
    modules = {
        name: [
            (path, type(module).__name__, len(module._forward_hooks), len(module._forward_pre_hooks), *_patched(module))
            for path, module in component.named_modules()
        ]
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module)
    }
    return fingerprint.of_json([model_identity(pipe), modules])


def _patched(module: nn.Module) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isroutine(value)]


@dataclass(frozen=True)
class _Room:
    """Where the methods of an axis live, and how the room puts one around a pipeline.

    Attributes:
        name: of its module.
        methods_from: module and name of its methods' base class.
        plan_from: of its plans' class.
    """

    name: str
    methods_from: tuple[str, str]
    plan_from: tuple[str, str]
    around: Callable[[ModuleType, Any, Any], AbstractContextManager[Any]]

    def module(self) -> ModuleType:
        return importlib.import_module(self.name)

    def methods(self) -> dict[str, Callable[..., Any]]:
        """Its public methods by name."""
        module = self.module()
        base, _ = self.kinds()
        found = {name: getattr(module, name) for name in dir(module) if not name.startswith("_")}
        return {
            name: kind
            for name, kind in found.items()
            if inspect.isclass(kind) and issubclass(kind, base) and kind is not base
        }

    def kinds(self) -> tuple[type[Any], type[Any]]:
        """The base of its methods, and its plans."""
        method, plan = (getattr(importlib.import_module(at), name) for at, name in (self.methods_from, self.plan_from))
        return method, plan

    def transform(self, name: str, method: Any) -> Transform:
        """A method or a plan as a transform."""
        settings = {"digest": method.digest} if hasattr(method, "digest") else jsonable(dataclasses.asdict(method))
        identity = {"settings": settings, "code": self.code()}
        return Transform(name, lambda pipe: self.around(self.module(), pipe, method), identity)

    def code(self) -> str:
        """Hash of its sources: a repaired method must not inherit the images of the broken one."""
        return fingerprint.of_sources(Path(str(self.module().__file__)).parent)


def _cached(caching: Any, pipe: Any, method: Any) -> AbstractContextManager[Any]:
    manager: AbstractContextManager[Any] = caching.applied(pipe, method)
    return manager


@contextmanager
def _quantized(quant: Any, pipe: Any, config: Any) -> Iterator[None]:
    changed: list[nn.Module] = []
    try:
        for network in denoisers(pipe):
            changed.append(network)
            quant.quantize_(network, config)
        yield
    finally:
        for network in changed:
            quant.dequantize_(network)


_ROOMS: dict[str, _Room] = {
    "cache": _Room(
        "fewstep.caching", ("fewstep.caching.method", "Method"), ("fewstep.caching.plan", "CachePlan"), _cached
    ),
    "quant": _Room(
        "fewstep.quant", ("fewstep.quant.methods.base", "Method"), ("fewstep.quant.plan", "QuantPlan"), _quantized
    ),
}


def distinct_names(axis: str, transforms: Sequence[Transform]) -> None:
    """Raises FewstepError where two values of an axis have one name: their cells could not be told apart."""
    names = [transform.name for transform in transforms]
    for name in names:
        if names.count(name) > 1:
            raise FewstepError(f"{axis}s has {name!r} twice; give each once")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
