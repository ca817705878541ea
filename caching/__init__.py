"""Caching: features reused from step to step, by one plan that says where and when.

Names are loaded on first use.
"""

from typing import TYPE_CHECKING

from fewstep.lazy import load as _load

assert __name__.startswith("fewstep."), "import fewstep.caching instead"

if TYPE_CHECKING:
    from fewstep.caching.actions import Action as Action
    from fewstep.caching.calibration.budget import Budget as Budget
    from fewstep.caching.calibration.calibrate import calibrate as calibrate
    from fewstep.caching.controller import Controller as Controller
    from fewstep.caching.controller import applied as applied
    from fewstep.caching.controller import apply_ as apply_
    from fewstep.caching.controller import controller_of as controller_of
    from fewstep.caching.controller import remove_ as remove_
    from fewstep.caching.controller import wrap as wrap
    from fewstep.caching.cost import PlanCost as PlanCost
    from fewstep.caching.families import family_of as family_of
    from fewstep.caching.method import Method as Method
    from fewstep.caching.methods.broadcast import FasterCache as FasterCache
    from fewstep.caching.methods.broadcast import PyramidBroadcast as PyramidBroadcast
    from fewstep.caching.methods.deep_cache import DeepCache as DeepCache
    from fewstep.caching.methods.dp_cache import DPCache as DPCache
    from fewstep.caching.methods.early_exit import EarlyExit as EarlyExit
    from fewstep.caching.methods.easycache import EasyCache as EasyCache
    from fewstep.caching.methods.encoder_propagation import EncoderPropagation as EncoderPropagation
    from fewstep.caching.methods.erta import ERTACache as ERTACache
    from fewstep.caching.methods.exit_training import train_early_exit_ as train_early_exit_
    from fewstep.caching.methods.fast_attention import search_attention as search_attention
    from fewstep.caching.methods.first_block import DBCache as DBCache
    from fewstep.caching.methods.first_block import FirstBlockCache as FirstBlockCache
    from fewstep.caching.methods.interval import FORA as FORA
    from fewstep.caching.methods.interval import DeltaDiT as DeltaDiT
    from fewstep.caching.methods.interval import Interval as Interval
    from fewstep.caching.methods.magcache import MagCache as MagCache
    from fewstep.caching.methods.merging import FrameMerging as FrameMerging
    from fewstep.caching.methods.merging import TokenMerging as TokenMerging
    from fewstep.caching.methods.rehash import StepRehash as StepRehash
    from fewstep.caching.methods.removal import Removal as Removal
    from fewstep.caching.methods.removal import removable as removable
    from fewstep.caching.methods.removal import removal_scores as removal_scores
    from fewstep.caching.methods.router import Router as Router
    from fewstep.caching.methods.taylorseer import HiCache as HiCache
    from fewstep.caching.methods.taylorseer import TaylorSeer as TaylorSeer
    from fewstep.caching.methods.teacache import PolynomialFit as PolynomialFit
    from fewstep.caching.methods.teacache import TeaCache as TeaCache
    from fewstep.caching.methods.teacache import fit_polynomial as fit_polynomial
    from fewstep.caching.methods.uncond import CFGCache as CFGCache
    from fewstep.caching.methods.uncond import FasterCacheCFG as FasterCacheCFG
    from fewstep.caching.methods.uncond import GuidanceWindow as GuidanceWindow
    from fewstep.caching.methods.uncond import UncondReuse as UncondReuse
    from fewstep.caching.methods.windows import ReAttention as ReAttention
    from fewstep.caching.noise import prior_noise as prior_noise
    from fewstep.caching.plan import CachePlan as CachePlan
    from fewstep.caching.predictors import Affine as Affine
    from fewstep.caching.predictors import Extrapolate as Extrapolate
    from fewstep.caching.predictors import Hermite as Hermite
    from fewstep.caching.predictors import Hold as Hold
    from fewstep.caching.predictors import Momentum as Momentum
    from fewstep.caching.predictors import Scale as Scale
    from fewstep.caching.predictors import Taylor as Taylor
    from fewstep.caching.profiling import profile as profile
    from fewstep.caching.report import CacheReport as CacheReport
    from fewstep.caching.spectral import FasterCacheDelta as FasterCacheDelta
    from fewstep.caching.spectral import FrequencyDelta as FrequencyDelta

_MODULES = {
    "actions": ("Action",),
    "calibration.budget": ("Budget",),
    "calibration.calibrate": ("calibrate",),
    "controller": ("Controller", "applied", "apply_", "controller_of", "remove_", "wrap"),
    "cost": ("PlanCost",),
    "families": ("family_of",),
    "method": ("Method",),
    "methods.broadcast": ("FasterCache", "PyramidBroadcast"),
    "methods.deep_cache": ("DeepCache",),
    "methods.dp_cache": ("DPCache",),
    "methods.early_exit": ("EarlyExit",),
    "methods.encoder_propagation": ("EncoderPropagation",),
    "methods.erta": ("ERTACache",),
    "methods.fast_attention": ("search_attention",),
    "methods.exit_training": ("train_early_exit_",),
    "methods.easycache": ("EasyCache",),
    "methods.first_block": ("DBCache", "FirstBlockCache"),
    "methods.interval": ("FORA", "DeltaDiT", "Interval"),
    "methods.magcache": ("MagCache",),
    "methods.merging": ("FrameMerging", "TokenMerging"),
    "methods.rehash": ("StepRehash",),
    "methods.removal": ("Removal", "removable", "removal_scores"),
    "methods.router": ("Router",),
    "methods.taylorseer": ("HiCache", "TaylorSeer"),
    "methods.teacache": ("PolynomialFit", "TeaCache", "fit_polynomial"),
    "methods.uncond": ("CFGCache", "FasterCacheCFG", "GuidanceWindow", "UncondReuse"),
    "methods.windows": ("ReAttention",),
    "noise": ("prior_noise",),
    "plan": ("CachePlan",),
    "predictors": ("Affine", "Extrapolate", "Hermite", "Hold", "Momentum", "Scale", "Taylor"),
    "profiling": ("profile",),
    "report": ("CacheReport",),
    "spectral": ("FasterCacheDelta", "FrequencyDelta"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    return _load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted(_HOME)
