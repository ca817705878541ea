"""What a diffusers scheduler config says, in our words: which noise schedule, and which grid.

diffusers spells the same fact in several ways (``use_flow_sigmas`` or a ``FlowMatch...`` class, four exclusive
``use_*_sigmas`` booleans beside ``timestep_spacing``); this is the one place that knows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fewstep.errors import FewstepError, unknown
from fewstep.samplers.betas import betas
from fewstep.samplers.reverting import reverting_from_config
from fewstep.samplers.schedule import EDM, PREDICTIONS, ContinuousVP, DiscreteVP, Flow, NoiseSchedule

_NO_FAMILY = (
    "CosineDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler",
    "ConsistencyDecoderScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "VQDiffusionScheduler",
)
"""Schedulers whose process or time embedding is none of ours; guessing one would silently give wrong pictures."""

_INVERTED = "invert_sigmas (a flow whose noise falls with time, as Mochi's) is not supported"


PROCESS_OPTIONS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
    "rescale_betas_zero_snr": False, "snr_shift_scale": None, "prediction_type": "epsilon", "variance_type": None,
    "use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential",
    "shift_terminal": None, "sigma_min": None, "sigma_max": None, "sigma_data": None, "timestep_type": "discrete",
}  # fmt: skip
"""Config keys that describe the model and not the sampler, with diffusers' most common defaults."""


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` describes a flow-matching model, in any of diffusers' spellings."""
    return bool(
        "FlowMatch" in str(config.get("_class_name", ""))
        or config.get("prediction_type") == "flow_prediction"
        or config.get("use_flow_sigmas")
        # the config of a scheduler that was never saved does not name its class; only flow matching has a shift without betas
        or ("shift" in config and "beta_schedule" not in config)
    )


def is_edm(config: Mapping[str, Any]) -> bool:
    """Whether ``config`` describes a model with EDM's preconditioning."""
    return config.get("sigma_data") is not None


def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with the facts that diffusers spells by class name or by another key written under our keys.

    A scheduler of another class is then made from the result without losing them, and diffusers' own schedulers
    still understand it. ``config`` is not changed.
    """
    out = dict(config)
    used_defaults = set(out.get("_use_default_values", []))
    if out.get("invert_sigmas"):
        raise FewstepError(_INVERTED)
    if is_flow(out):
        out["prediction_type"] = "flow_prediction"
        out["use_flow_sigmas"] = True
        if "shift" in out and ("flow_shift" not in out or "flow_shift" in used_defaults):
            out["flow_shift"] = out["shift"]
    elif str(out.get("_class_name", "")).startswith("EDM"):
        out.setdefault("sigma_data", 0.5)
    if "_use_default_values" in out:
        # from_config replaces a default of the other class by that of its own; the model was trained with the former
        out["_use_default_values"] = sorted(used_defaults - PROCESS_OPTIONS.keys())
    return out


def schedule_from_config(config: Mapping[str, Any], mu: float | None = None) -> NoiseSchedule:
    """The noise schedule that ``config`` (of any diffusers scheduler) describes.

    ``mu`` is the resolution-dependent shift that pipelines of flow models compute; it needs ``use_dynamic_shifting``.

    Raises:
        FewstepError: an unknown beta schedule, prediction type or time shift, a process that belongs to no family, or
            dynamic shifting without ``mu``.
    """
    name = str(config.get("_class_name", ""))
    if name in _NO_FAMILY and "grid" not in config:  # a config of ours has that key, and one of our classes such a name
        raise FewstepError(f"{name} describes a process that is neither vp, ve nor flow; give a config of one that is")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise FewstepError(unknown("prediction_type", prediction, PREDICTIONS))
    steps = int(config.get("num_train_timesteps") or 1000)

    if config.get("process"):
        return reverting_from_config(config, prediction)
    if config.get("invert_sigmas"):
        raise FewstepError(_INVERTED)
    if is_flow(config):
        shift = config.get("flow_shift", config.get("shift"))
        return Flow(
            steps,
            _flow_shift(config, 1.0 if shift is None else float(shift), mu),
            config.get("shift_terminal"),
            dynamic=bool(config.get("use_dynamic_shifting")),
        )
    if is_edm(config):
        return EDM(
            float(config.get("sigma_min") or 0.002),
            float(config.get("sigma_max") or 80.0),
            "edm" if prediction == "epsilon" else "edm_v" if prediction == "v_prediction" else prediction,
            float(config["sigma_data"]),
        )
    if config.get("timestep_type") == "continuous":
        return ContinuousVP(
            float(config.get("sigma_min") or 0.002), float(config.get("sigma_max") or 700.0), prediction
        )

    trained = config.get("trained_betas")
    if trained is None and "beta_schedule" not in config:
        raise FewstepError(
            f"the config of {name or 'this scheduler'} names no noise schedule: it has neither beta_schedule, "
            "trained_betas, sigma_data nor a flow shift"
        )
    table = (
        trained
        if trained is not None
        else betas(
            config.get("beta_schedule", "linear"),
            steps,
            float(config.get("beta_start", 1e-4)),
            float(config.get("beta_end", 0.02)),
        )
    )
    snr_shift = config.get("snr_shift_scale")
    return DiscreteVP.from_betas(
        table, prediction, bool(config.get("rescale_betas_zero_snr")), 1.0 if snr_shift is None else float(snr_shift)
    )


def _flow_shift(config: Mapping[str, Any], shift: float, mu: float | None) -> float:
    """The factor s of the shift; ``mu`` (exp(mu), or mu itself for the linear kind) replaces the static one."""
    if not config.get("use_dynamic_shifting"):
        return shift  # diffusers' pipelines pass mu to statically shifted models too, and mean nothing by it
    if mu is None:
        raise FewstepError(
            "this model's shift depends on the resolution: set_timesteps needs mu (its pipeline computes it)"
        )
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise FewstepError(unknown("time_shift_type", kind, ("exponential", "linear")))
    return math.exp(mu) if kind == "exponential" else float(mu)


def grid_name(config: Mapping[str, Any]) -> str:
    """The grid that ``config`` asks for: our ``grid`` key, else diffusers' ``use_*_sigmas``, else ``timestep_spacing``.

    Flow models without a ``grid`` take ``trailing``, which is what their pipelines ask of diffusers' own schedulers; EDM
    models, which have no training timesteps, take ``karras``.
    """
    if config.get("grid"):
        return str(config["grid"])
    for key, name in (
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "exponential"),
        ("use_beta_sigmas", "beta"),
        ("use_lu_lambdas", "lu"),
    ):
        if config.get(key):
            return name
    if is_flow(config):
        return "trailing"
    if is_edm(config) or config.get("timestep_type") == "continuous":
        return "exponential" if config.get("sigma_schedule") == "exponential" else "karras"
    return str(config.get("timestep_spacing") or "linspace")
