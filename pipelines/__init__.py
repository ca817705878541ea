"""Pipelines: the embedded models, recipes, and schemes that run a whole trajectory.

Names are loaded on first use, so that ``import fewstep`` and listing the models cost neither torch nor diffusers.
"""

from typing import TYPE_CHECKING

from fewstep.lazy import load as _load

assert __name__.startswith("fewstep."), "import fewstep.pipelines instead"

if TYPE_CHECKING:
    from fewstep.pipelines.editing import edit as edit
    from fewstep.pipelines.leap import Leap as Leap
    from fewstep.pipelines.parallel import ParallelImages as ParallelImages
    from fewstep.pipelines.parallel import generate_parallel as generate_parallel
    from fewstep.pipelines.parallel import guided_denoiser as guided_denoiser
    from fewstep.pipelines.parallel_decode import generate_propagated as generate_propagated
    from fewstep.pipelines.staged import Stage as Stage
    from fewstep.pipelines.staged import bottleneck as bottleneck
    from fewstep.pipelines.stitch import StitchedDenoiser as StitchedDenoiser
    from fewstep.pipelines.zoo import Model as Model
    from fewstep.pipelines.zoo import load as load
    from fewstep.pipelines.zoo import models as models

_MODULES = {
    "editing": ("edit",),
    "leap": ("Leap",),
    "parallel": ("ParallelImages", "generate_parallel", "guided_denoiser"),
    "parallel_decode": ("generate_propagated",),
    "staged": ("Stage", "bottleneck"),
    "stitch": ("StitchedDenoiser",),
    "zoo": ("Model", "load", "models"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Leap", "Model", "ParallelImages", "Stage", "StitchedDenoiser", "bottleneck", "edit", "generate_parallel",
    "generate_propagated", "guided_denoiser", "load", "models",
]  # fmt: skip


def __getattr__(name: str) -> object:
    return _load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return list(__all__)
