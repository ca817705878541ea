"""Evaluation: metrics with their recipes, costs that are counted, sweeps that survive, one page to look at.

Names are loaded on first use, so that a command line that only prints help pays for neither torch nor diffusers.
"""

from typing import TYPE_CHECKING

from fewstep.lazy import load as _load

assert __name__.startswith("fewstep."), "import fewstep.eval instead"

if TYPE_CHECKING:
    from fewstep.eval.alignment import clip_score as clip_score
    from fewstep.eval.costs.calls import CallCounter as CallCounter
    from fewstep.eval.costs.clock import ClockComparison as ClockComparison
    from fewstep.eval.costs.clock import Timer as Timer
    from fewstep.eval.costs.clock import WallClock as WallClock
    from fewstep.eval.costs.clock import compare_clock as compare_clock
    from fewstep.eval.costs.clock import wall_clock as wall_clock
    from fewstep.eval.costs.mac_count import MacCounter as MacCounter
    from fewstep.eval.costs.mac_count import macs as macs
    from fewstep.eval.costs.memory import model_bytes as model_bytes
    from fewstep.eval.costs.memory import peak_memory as peak_memory
    from fewstep.eval.costs.total import Cost as Cost
    from fewstep.eval.costs.total import cost as cost
    from fewstep.eval.distribution.feature_metrics import Cmmd as Cmmd
    from fewstep.eval.distribution.feature_metrics import Fid as Fid
    from fewstep.eval.distribution.feature_metrics import FidInfinity as FidInfinity
    from fewstep.eval.distribution.feature_metrics import InceptionScore as InceptionScore
    from fewstep.eval.distribution.feature_metrics import Kid as Kid
    from fewstep.eval.distribution.feature_metrics import Prdc as Prdc
    from fewstep.eval.distribution.feature_metrics import Sfid as Sfid
    from fewstep.eval.distribution.feature_metrics import SlicedWasserstein as SlicedWasserstein
    from fewstep.eval.distribution.feature_set import FeatureSet as FeatureSet
    from fewstep.eval.distribution.features import FeatureNet as FeatureNet
    from fewstep.eval.distribution.features import feature_net as feature_net
    from fewstep.eval.distribution.frechet import frechet_distance as frechet_distance
    from fewstep.eval.distribution.measures import cmmd as cmmd
    from fewstep.eval.distribution.measures import fid as fid
    from fewstep.eval.distribution.measures import fid_infinity as fid_infinity
    from fewstep.eval.distribution.measures import image_features as image_features
    from fewstep.eval.distribution.measures import image_moments as image_moments
    from fewstep.eval.distribution.measures import inception_score as inception_score
    from fewstep.eval.distribution.measures import kid as kid
    from fewstep.eval.distribution.measures import prdc as prdc
    from fewstep.eval.distribution.measures import sfid as sfid
    from fewstep.eval.distribution.measures import sliced_wasserstein as sliced_wasserstein
    from fewstep.eval.distribution.moments import Moments as Moments
    from fewstep.eval.drawing.batch import draw as draw
    from fewstep.eval.metrics import Accuracy as Accuracy
    from fewstep.eval.metrics import ClipScore as ClipScore
    from fewstep.eval.metrics import Scores as Scores
    from fewstep.eval.metrics import measure_images as measure_images
    from fewstep.eval.pairs.latents import capture_latents as capture_latents
    from fewstep.eval.pairs.latents import latent_rmse as latent_rmse
    from fewstep.eval.pairs.perceptual import FeatureDistance as FeatureDistance
    from fewstep.eval.pairs.perceptual import Lpips as Lpips
    from fewstep.eval.pairs.reference import check_reference as check_reference
    from fewstep.eval.pairs.same_seed import Fidelity as Fidelity
    from fewstep.eval.pairs.same_seed import fidelity as fidelity
    from fewstep.eval.pairs.samples import Samples as Samples
    from fewstep.eval.reports.page import Report as Report
    from fewstep.eval.reports.page import report as report
    from fewstep.eval.reports.pareto import pareto_front as pareto_front
    from fewstep.eval.score import Score as Score
    from fewstep.eval.statistics.comparison import Comparison as Comparison
    from fewstep.eval.statistics.comparison import Estimate as Estimate
    from fewstep.eval.statistics.comparison import compare as compare
    from fewstep.eval.statistics.intervals import Interval as Interval
    from fewstep.eval.statistics.intervals import mean_interval as mean_interval
    from fewstep.eval.statistics.replicates import Blocks as Blocks
    from fewstep.eval.statistics.replicates import seed_blocks as seed_blocks
    from fewstep.eval.sweeps.differences import compare_sweeps as compare_sweeps
    from fewstep.eval.sweeps.results import Results as Results
    from fewstep.eval.sweeps.selection import best as best
    from fewstep.eval.sweeps.state import status as status
    from fewstep.eval.sweeps.sweep import Sweep as Sweep
    from fewstep.eval.sweeps.transforms import Transform as Transform

_MODULES = {
    "alignment": ("clip_score",),
    "costs.calls": ("CallCounter",),
    "costs.clock": ("ClockComparison", "Timer", "WallClock", "compare_clock", "wall_clock"),
    "statistics.comparison": ("Comparison", "Estimate", "compare"),
    "costs.total": ("Cost", "cost"),
    "sweeps.differences": ("compare_sweeps",),
    "distribution.measures": (
        "cmmd",
        "fid",
        "fid_infinity",
        "image_features",
        "image_moments",
        "inception_score",
        "kid",
        "prdc",
        "sfid",
        "sliced_wasserstein",
    ),
    "drawing.batch": ("draw",),
    "distribution.feature_metrics": (
        "Cmmd",
        "Fid",
        "FidInfinity",
        "InceptionScore",
        "Kid",
        "Prdc",
        "Sfid",
        "SlicedWasserstein",
    ),
    "distribution.feature_set": ("FeatureSet",),
    "distribution.features": ("FeatureNet", "feature_net"),
    "distribution.frechet": ("frechet_distance",),
    "statistics.intervals": ("Interval", "mean_interval"),
    "pairs.latents": ("capture_latents", "latent_rmse"),
    "costs.mac_count": ("MacCounter", "macs"),
    "costs.memory": ("model_bytes", "peak_memory"),
    "metrics": ("Accuracy", "ClipScore", "Scores", "measure_images"),
    "distribution.moments": ("Moments",),
    "reports.page": ("Report", "report"),
    "reports.pareto": ("pareto_front",),
    "pairs.perceptual": ("FeatureDistance", "Lpips"),
    "statistics.replicates": ("Blocks", "seed_blocks"),
    "sweeps.results": ("Results",),
    "pairs.reference": ("check_reference",),
    "pairs.same_seed": ("Fidelity", "fidelity"),
    "pairs.samples": ("Samples",),
    "score": ("Score",),
    "sweeps.selection": ("best",),
    "sweeps.state": ("status",),
    "sweeps.sweep": ("Sweep",),
    "sweeps.transforms": ("Transform",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Accuracy",
    "Blocks",
    "CallCounter",
    "ClipScore",
    "ClockComparison",
    "Cmmd",
    "Comparison",
    "Cost",
    "Estimate",
    "FeatureDistance",
    "FeatureNet",
    "FeatureSet",
    "Fid",
    "FidInfinity",
    "Fidelity",
    "InceptionScore",
    "Interval",
    "Kid",
    "Lpips",
    "MacCounter",
    "Moments",
    "Prdc",
    "Report",
    "Results",
    "Samples",
    "Score",
    "Scores",
    "Sfid",
    "SlicedWasserstein",
    "Sweep",
    "Timer",
    "Transform",
    "WallClock",
    "best",
    "capture_latents",
    "check_reference",
    "clip_score",
    "cmmd",
    "compare",
    "compare_clock",
    "compare_sweeps",
    "cost",
    "draw",
    "feature_net",
    "fid",
    "fid_infinity",
    "fidelity",
    "frechet_distance",
    "image_features",
    "image_moments",
    "inception_score",
    "kid",
    "latent_rmse",
    "macs",
    "mean_interval",
    "measure_images",
    "model_bytes",
    "pareto_front",
    "peak_memory",
    "prdc",
    "report",
    "seed_blocks",
    "sfid",
    "sliced_wasserstein",
    "status",
    "wall_clock",
]


def __getattr__(name: str) -> object:
    return _load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return list(__all__)
