"""fewstep: makes diffusion sampling faster and proves what it cost in quality.

The rooms are imported on first use, so that ``import fewstep`` costs neither torch nor diffusers.
"""

from typing import TYPE_CHECKING

from fewstep._version import __version__ as __version__

if TYPE_CHECKING:
    from fewstep import caching as caching
    from fewstep import eval as eval
    from fewstep import pipelines as pipelines
    from fewstep import quant as quant
    from fewstep import samplers as samplers

__all__ = ["__version__", "caching", "eval", "pipelines", "quant", "samplers"]

_ROOMS = ("samplers", "caching", "quant", "pipelines", "eval")


def __getattr__(name: str) -> object:
    import importlib

    if name in _ROOMS:
        return importlib.import_module(f"fewstep.{name}")
    if name.endswith("Scheduler") or name == "SchedulerMixin":
        # a saved pipeline names its scheduler as fewstep.NAME, and diffusers looks its base class up in the same place
        schedulers = importlib.import_module("fewstep.samplers.schedulers")
        if hasattr(schedulers, name):
            found: object = getattr(schedulers, name)
            return found
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
