"""Rounding to the nearest: the plain configs, from formats alone. No calibration."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError, unknown
from fewstep.quant.calibration.calls import Call
from fewstep.quant.calibration.inputs import LayerInputs
from fewstep.quant.formats import Format
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import layer_arrays
from fewstep.quant.methods.base import FLAT, SKIPPED, Method, fit, storage_of
from fewstep.quant.methods.shortcuts import joints
from fewstep.quant.methods.times import input_scales, stored, with_times
from fewstep.quant.plan import QuantPlan
from fewstep.quant.sites import Site

ROLES = (
    "edge", "embedding", "modulation", "attention", "cross", "feedforward", "shortcut", "convolution", "projection",
)  # fmt: skip


@dataclass(frozen=True)
class Nearest(Method):
    """Weights and activations rounded to the nearest code, scales from the largest magnitudes.

    Attributes:
        weight: format of the weights, see :meth:`Format.parse`.
        activation: format of the inputs, None for weights alone.
        conv_activation: of convolutions' inputs where it differs.
        keep: roles and layer names (with ``*``) that stay as they are. First and last layers and embeddings by default.
        split_shortcuts: whether layers that read a UNet's skip connection beside the features from below have scales of
            their own for each.
    """

    weight: str
    activation: str | None = None
    conv_activation: str | None = None
    keep: tuple[str, ...] = SKIPPED
    split_shortcuts: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for entry in (self.weight, self.activation, self.conv_activation):
            if entry is not None and entry != "auto":
                Format.parse(entry)
        if isinstance(self.keep, str):
            raise FewstepError(f"keep is {self.keep!r}; give a tuple of roles and names")
        for entry in self.keep:
            if (
                entry not in ROLES
                and "." not in entry
                and "*" not in entry
                and entry.isidentifier()
                and "_" not in entry
            ):
                raise FewstepError(unknown("role", entry, ROLES))

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        plan = super().plan(model, calls)
        if not self.split_shortcuts:
            return plan
        if getattr(self, "static", False):
            raise FewstepError(
                "split layers make their scales at every call; give static=False or split_shortcuts=False"
            )
        changes: dict[str, LayerPlan | None] = {}
        for name, channel in joints(model).items():
            layer = plan.layers.get(name)
            if layer is not None and all(
                channel % f.group == 0 for f in (layer.weight, layer.activation) if f and f.group
            ):
                # A branch and factors are found for whole layers; without them a part is a layer like any other.
                changes[name] = replace(layer, splits=(channel,), rank=0, smooth=False)
        return plan.with_layers(changes)

    def kept(self, site: Site) -> str | None:
        """Why a layer is kept, None where it is not."""
        if site.role in self.keep:
            return f"{site.role} layer"
        match = next((e for e in self.keep if e not in ROLES and fnmatch.fnmatchcase(site.name, e)), None)
        return f"named by keep={match!r}" if match else None

    def formats(self, site: Site) -> tuple[str, str | None]:
        """Weight and activation format that are wanted for a layer."""
        if site.role in FLAT:
            return str(storage_of(Format.parse(self.weight))), None
        return self.weight, (self.conv_activation or self.activation) if site.is_conv else self.activation

    def decide(self, site: Site) -> LayerPlan | str:
        reason = self.kept(site)
        if reason:
            return reason
        weight, activation = self.formats(site)
        fitted = fit(weight, site.shape[1])
        inputs = None if activation is None else fit(activation, site.shape[1])
        if fitted is None or (activation is not None and inputs is None):
            return f"{site.shape[1]} inputs do not divide into the groups of {weight if fitted is None else activation}"
        return LayerPlan(fitted, inputs)


@dataclass(frozen=True)
class Ranged(Nearest):
    """Configs whose input scales can be stored.

    Attributes:
        static: one scale (and zero point) a layer from the largest range of the calibration calls, instead of one a token or
            sample made at every call. Costs less there and more error; inputs beyond the range saturate.
        times: how many times have a scale of their own, at most as many as the calls are told; with ``static``. 0 for one
            scale at all times.
        error: bound on the output error ||y_q - y|| / ||y|| over the calibration calls: the layers that add most to it for
            the multiplications they make stay in floating point. None quantises all.
    """

    static: bool = field(default=False, kw_only=True)
    times: int = field(default=0, kw_only=True)
    error: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.times < 0 or (self.times and not self.static):
            raise FewstepError(
                f"times is {self.times}; give 0, or with static=True how many times have their own scales"
            )

    def plan(self, model: nn.Module, calls: Sequence[Call] = ()) -> QuantPlan:
        plan = with_times(super().plan(model, calls), calls, self.times)
        if self.error is None:
            return plan
        if self.static:
            raise FewstepError("error= measures scales made at every call; give static=False")
        from fewstep.quant.allocation.within import within_error

        return within_error(model, plan, calls, self.error)

    def decide(self, site: Site) -> LayerPlan | str:
        plan = super().decide(site)
        if isinstance(plan, str) or plan.activation is None or not self.static:
            return plan
        return stored(plan)

    def reads(self, site: Site) -> bool:
        return self.static and site.role not in FLAT

    def arrays(self, site: Site, plan: LayerPlan, inputs: LayerInputs | None) -> dict[str, Tensor]:
        if not plan.static:
            return super().arrays(site, plan, inputs)
        return layer_arrays(site.module, plan, extra=input_scales(site, plan, inputs))


@dataclass(frozen=True)
class Int8(Ranged):
    """8-bit integers: weights with a scale a row, inputs with one a token; of convolutions one a sample, with a zero point,
    of those of 1 x 1 one a pixel.

    ``auto`` is int8, on CPUs whose int8 instructions saturate int7, which they multiply exactly.
    """

    weight: str = "auto"
    activation: str | None = "int8:row"
    conv_activation: str | None = "zint8:row"

    def formats(self, site: Site) -> tuple[str, str | None]:
        weight, activation = Nearest.formats(self, site) if self.weight != "auto" else self._automatic(site)
        return weight, activation

    def _automatic(self, site: Site) -> tuple[str, str | None]:
        from fewstep.quant.backends.onednn import OneDNN, adds_exactly

        slow = not torch.cuda.is_available() and not OneDNN().missing(torch.device("cpu")) and not adds_exactly()
        weight = "int7:row" if slow else "int8:row"
        if site.role in FLAT:
            return weight, None
        return weight, (self.conv_activation or self.activation) if site.is_conv else self.activation


@dataclass(frozen=True)
class Int4(Nearest):
    """4-bit integers for weights and inputs in groups of 64 channels: the naive W4A4 that better methods start from."""

    weight: str = "int4:g64"
    activation: str | None = "int4:g64"


@dataclass(frozen=True)
class W4A8(Ranged):
    """4-bit weights in groups of 64, 8-bit inputs with one scale a token."""

    weight: str = "int4:g64"
    activation: str | None = "int8:row"
    conv_activation: str | None = "zint8:row"


@dataclass(frozen=True)
class FP8(Ranged):
    """E4M3 for both, one scale a row. Source: FP8 Formats for Deep Learning, 2209.05433."""

    weight: str = "e4m3:row"
    activation: str | None = "e4m3:row"


@dataclass(frozen=True)
class FP4(Nearest):
    """E2M1 in blocks: NVFP4 (16 numbers, E4M3 scales) or MXFP4 (32 numbers, powers of two)."""

    weight: str = "nvfp4"
    activation: str | None = "nvfp4"

    @classmethod
    def of(cls, kind: Literal["nvfp4", "mxfp4"]) -> FP4:
        return cls(kind, kind)


@dataclass(frozen=True)
class FP6(Nearest):
    """Weights in 6 bits as E3M2 with one scale a row, inputs as they are; ``FP6.of("mxfp6")`` for both in blocks of 32.

    Saves memory: nothing multiplies 6-bit floats with a scale a row. Source: ZeroQuant(4+2), 2312.08583.
    """

    weight: str = "e3m2:row"

    @classmethod
    def of(cls, kind: Literal["mxfp6"]) -> FP6:
        return cls(kind, kind)


@dataclass(frozen=True)
class Binary(Nearest):
    """Weights as sums of ``bases`` signs with a scale a group; inputs in 8 bits.

    Rounding a trained network to signs ruins it; :class:`BinaryDM` trains them. Source: 2404.05662.
    """

    weight: str = "bin1:g64"
    activation: str | None = "int8:row"
    bases: int | None = None

    def __post_init__(self) -> None:
        if self.bases is not None:
            object.__setattr__(self, "weight", f"bin{self.bases}:g64")
        super().__post_init__()
