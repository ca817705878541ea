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
    from fewstep.pipelines.recipes.applying import Applied as Applied
    from fewstep.pipelines.recipes.applying import applied as applied
    from fewstep.pipelines.recipes.applying import apply_ as apply_
    from fewstep.pipelines.recipes.applying import remove_ as remove_
    from fewstep.pipelines.recipes.recipe import Recipe as Recipe
    from fewstep.pipelines.recipes.tuning import tune as tune
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
    "recipes.applying": ("Applied", "applied", "apply_", "remove_"),
    "recipes.recipe": ("Recipe",),
    "recipes.tuning": ("tune",),
    "staged": ("Stage", "bottleneck"),
    "stitch": ("StitchedDenoiser",),
    "zoo": ("Model", "load", "models"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Applied", "Leap", "Model", "ParallelImages", "Recipe", "Stage", "StitchedDenoiser", "applied", "apply_", "bottleneck",
    "edit", "generate_parallel", "generate_propagated", "guided_denoiser", "load", "models", "remove_", "tune",
]  # fmt: skip


def __getattr__(name: str) -> object:
    return _load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return list(__all__)
