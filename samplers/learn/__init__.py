"""Learned and searched samplers: a plan fitted to one model from a few of its own trajectories, without touching its weights.

    problem = learn.Teacher(pipe, prompts, guidance=7.5).problem()      # conditioning captured once, trajectories on disk
    plan = learn.tune(problem, nfe=6)                                    # or auto(pipe, prompts, nfe=6) for both
    plan.save("plan.json"); learn.use_(pipe, plan)

Names are loaded when they are used; :mod:`fewstep.samplers` does not need this package.
"""

from typing import TYPE_CHECKING

from fewstep.lazy import load as _load

if TYPE_CHECKING:
    from fewstep.samplers.learn.figure import plot as plot
    from fewstep.samplers.learn.fitting.descent import Descent as Descent
    from fewstep.samplers.learn.fitting.levenberg import levenberg as levenberg
    from fewstep.samplers.learn.fitting.parameters import Parameters as Parameters
    from fewstep.samplers.learn.fitting.rows import least_squares as least_squares
    from fewstep.samplers.learn.fitting.runner import error as error
    from fewstep.samplers.learn.fitting.runner import run as run
    from fewstep.samplers.learn.methods.amed import amed as amed
    from fewstep.samplers.learn.methods.cascade import Cascade as Cascade
    from fewstep.samplers.learn.methods.dc import dc_curve as dc_curve
    from fewstep.samplers.learn.methods.dc import dc_search as dc_search
    from fewstep.samplers.learn.methods.dynamic import ays as ays
    from fewstep.samplers.learn.methods.dynamic import boss as boss
    from fewstep.samplers.learn.methods.dynamic import gits as gits
    from fewstep.samplers.learn.methods.evolution import Evolution as Evolution
    from fewstep.samplers.learn.methods.evolution import autodiffusion as autodiffusion
    from fewstep.samplers.learn.methods.evolution import s3 as s3
    from fewstep.samplers.learn.methods.gradient import bespoke as bespoke
    from fewstep.samplers.learn.methods.gradient import bns as bns
    from fewstep.samplers.learn.methods.gradient import ld3 as ld3
    from fewstep.samplers.learn.methods.gradient import neural_solver as neural_solver
    from fewstep.samplers.learn.methods.gradient import s4s as s4s
    from fewstep.samplers.learn.methods.gradient import time_tuner as time_tuner
    from fewstep.samplers.learn.methods.statistics import ems as ems
    from fewstep.samplers.learn.methods.untuned import shortlist as shortlist
    from fewstep.samplers.learn.methods.untuned import untuned as untuned
    from fewstep.samplers.learn.plans import OutsideCalibration as OutsideCalibration
    from fewstep.samplers.learn.plans import load as load
    from fewstep.samplers.learn.plans import shipped as shipped
    from fewstep.samplers.learn.plans import use_ as use_
    from fewstep.samplers.learn.teaching.problem import Problem as Problem
    from fewstep.samplers.learn.teaching.teacher import Teacher as Teacher
    from fewstep.samplers.learn.teaching.teacher import solve as solve
    from fewstep.samplers.learn.tuning import Progress as Progress
    from fewstep.samplers.learn.tuning import auto as auto
    from fewstep.samplers.learn.tuning import tune as tune

_MODULES = {
    "tuning": ("Progress", "auto", "tune"),
    "figure": ("plot",),
    "plans": ("OutsideCalibration", "load", "shipped", "use_"),
    "teaching.problem": ("Problem",),
    "teaching.teacher": ("Teacher", "solve"),
    "fitting.descent": ("Descent",),
    "fitting.levenberg": ("levenberg",),
    "fitting.parameters": ("Parameters",),
    "fitting.rows": ("least_squares",),
    "fitting.runner": ("error", "run"),
    "methods.amed": ("amed",),
    "methods.cascade": ("Cascade",),
    "methods.dc": ("dc_curve", "dc_search"),
    "methods.dynamic": ("ays", "boss", "gits"),
    "methods.evolution": ("Evolution", "autodiffusion", "s3"),
    "methods.gradient": ("bespoke", "bns", "ld3", "neural_solver", "s4s", "time_tuner"),
    "methods.statistics": ("ems",),
    "methods.untuned": ("shortlist", "untuned"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    return _load(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted(_HOME)
