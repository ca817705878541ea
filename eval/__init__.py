"""Evaluation: metrics with their recipes, costs that are counted, sweeps that survive, one page to look at.

Names are loaded on first use, so that a command line that only prints help pays for neither torch nor diffusers.
"""

from typing import TYPE_CHECKING

assert __name__.startswith("fewstep."), "import fewstep.eval instead"

if TYPE_CHECKING:
    from fewstep.eval.alignment import clip_score as clip_score
    from fewstep.eval.costs import CallCounter as CallCounter
    from fewstep.eval.costs import Cost as Cost
    from fewstep.eval.costs import Timer as Timer
    from fewstep.eval.costs import WallClock as WallClock
    from fewstep.eval.costs import cost as cost
    from fewstep.eval.costs import wall_clock as wall_clock
    from fewstep.eval.distribution import fid as fid
    from fewstep.eval.distribution import image_moments as image_moments
    from fewstep.eval.drawing import draw as draw
    from fewstep.eval.features import FeatureNet as FeatureNet
    from fewstep.eval.features import feature_net as feature_net
    from fewstep.eval.frechet import frechet_distance as frechet_distance
    from fewstep.eval.metrics import Accuracy as Accuracy
    from fewstep.eval.metrics import ClipScore as ClipScore
    from fewstep.eval.metrics import Fid as Fid
    from fewstep.eval.moments import Moments as Moments
    from fewstep.eval.page import report as report
    from fewstep.eval.results import Results as Results
    from fewstep.eval.score import Score as Score
    from fewstep.eval.sweep import Sweep as Sweep

_MODULES = {
    "alignment": ("clip_score",),
    "costs": ("CallCounter", "Cost", "Timer", "WallClock", "cost", "wall_clock"),
    "distribution": ("fid", "image_moments"),
    "drawing": ("draw",),
    "features": ("FeatureNet", "feature_net"),
    "frechet": ("frechet_distance",),
    "metrics": ("Accuracy", "ClipScore", "Fid"),
    "moments": ("Moments",),
    "page": ("report",),
    "results": ("Results",),
    "score": ("Score",),
    "sweep": ("Sweep",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Accuracy",
    "CallCounter",
    "ClipScore",
    "Cost",
    "FeatureNet",
    "Fid",
    "Moments",
    "Results",
    "Score",
    "Sweep",
    "Timer",
    "WallClock",
    "clip_score",
    "cost",
    "draw",
    "feature_net",
    "fid",
    "frechet_distance",
    "image_moments",
    "report",
    "wall_clock",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"fewstep.eval.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fewstep.eval' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
