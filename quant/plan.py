"""QuantPlan: which layer runs in which number format. Decided before anything is quantised, and aware of its cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fewstep.artifact import read_json, write_json
from fewstep.errors import ArtifactError, FewstepError, PlanError, unknown
from fewstep.quant.attention.plan import AttentionPlan, by_name
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.build import check
from fewstep.quant.sites import Site, architecture, sites

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT_BITS = 16
"""What an unquantised weight is counted as."""


@dataclass(frozen=True)
class QuantPlan:
    """A table of layers and formats for one architecture; made by a config's ``plan(model)`` or by ``allocate_bits``.

    Attributes:
        layers: of each layer that is quantised, how.
        shapes: of the weight of every layer that could be, (N, K) or (N, C, h, w).
        kept: why the others are left as they are.
        model: class of the model.
        fingerprint: of its architecture; another model is refused.
        method: who made the plan.
        provenance: its settings and findings, as JSON.
        other: how many parameters the model has besides those weights.
        attention: of attention modules by name, how they compute; the others are left as they are.
    """

    layers: Mapping[str, LayerPlan]
    shapes: Mapping[str, tuple[int, ...]]
    model: str
    fingerprint: str
    kept: Mapping[str, str] = field(default_factory=dict)
    method: str = "custom"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    other: int = 0
    attention: Mapping[str, AttentionPlan] = field(default_factory=dict)

    # -- cost ---------------------------------------------------------------------------------------------------------
    def matrix(self, name: str) -> tuple[int, int]:
        """(N, K) of a layer's weight matrix."""
        n, *rest = self.shapes[name]
        k = 1
        for size in rest:
            k *= size
        return n, k

    def numel(self, name: str) -> int:
        n, k = self.matrix(name)
        return n * k

    def layer_bytes(self, name: str) -> int:
        """Bytes of one layer's weight as planned; 16 bits a number where it is kept."""
        if name in self.layers:
            return self.layers[name].nbytes(*self.matrix(name))
        return self.numel(name) * FLOAT_BITS // 8

    def layer_bits(self, name: str) -> float:
        """Bits a weight with its share of scales, branch and factors."""
        return 8 * self.layer_bytes(name) / self.numel(name)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model as planned, everything that is kept counted with 16 bits."""
        return sum(map(self.layer_bytes, self.shapes)) + self.other * FLOAT_BITS // 8

    @property
    def float_bytes(self) -> int:
        """Bytes of the model with 16 bits a parameter."""
        return (sum(map(self.numel, self.shapes)) + self.other) * FLOAT_BITS // 8

    @property
    def bits(self) -> float:
        """Mean bits a weight over the quantised layers."""
        total = sum(map(self.numel, self.layers))
        return 8 * sum(map(self.layer_bytes, self.layers)) / total if total else float(FLOAT_BITS)

    def __repr__(self) -> str:
        return str(self)  # a notebook shows it; the layers are an attribute

    def __str__(self) -> str:
        head = (
            f"{self.method} for {self.model}: {len(self.layers)} of {len(self.shapes)} layers, {self.bits:.2f} bits a weight, "
            f"{self.nbytes / 1e6:.2f} MB of {self.float_bytes / 1e6:.2f} MB in 16 bits ({self.nbytes / self.float_bytes:.3f})"
        )
        width = max(map(len, self.shapes), default=0)
        rows = []
        for name, shape in self.shapes.items():
            what = str(self.layers[name]) if name in self.layers else f"kept: {self.kept.get(name, 'not in the plan')}"
            rows.append(f"  {name:{width}}  {'x'.join(map(str, shape)):>16}  {self.layer_bits(name):6.2f}  {what}")
        rows += [f"  {name}: {plan}" for name, plan in self.attention.items()]
        return "\n".join([head, *rows])

    def summary(self) -> dict[str, int]:
        """How many layers run in which formats."""
        return dict(Counter(str(plan) for plan in self.layers.values()).most_common())

    def plot(self) -> Figure:
        """Bits a weight of every layer, in the order of the model; kept layers hollow."""
        from matplotlib.figure import Figure as NewFigure

        figure = NewFigure(figsize=(max(6.0, 0.09 * len(self.shapes)), 3.2), layout="constrained")
        axes = figure.subplots()
        bits = [self.layer_bits(name) for name in self.shapes]
        colours = ["C0" if name in self.layers else "none" for name in self.shapes]
        axes.bar(range(len(bits)), bits, color=colours, edgecolor="C0", linewidth=0.6)
        axes.set(xlabel="layer", ylabel="bits a weight", title=f"{self.method}: {self.bits:.2f} bits, {self.model}")
        return figure

    # -- checks -------------------------------------------------------------------------------------------------------
    def validate(self, model: nn.Module) -> QuantPlan:
        """Check the plan against a model that is not quantised yet.

        Raises:
            PlanError: for a model of another architecture, a layer that it lacks, or one that cannot take its formats.
        """
        there = {site.name: site for site in sites(model)}
        if self.fingerprint != architecture(model):
            raise PlanError(
                f"the plan is for a {self.model} with fingerprint {self.fingerprint}; "
                f"this {type(model).__name__} has {architecture(model)}"
            )
        for name, plan in self.layers.items():
            if name not in there:
                raise PlanError(self._absent(model, name, there))
            try:
                check(name, there[name].module, plan)
            except FewstepError as error:
                raise PlanError(str(error)) from None
        if self.attention:
            from fewstep.quant.attention.install import check as check_attention

            check_attention(model, self.attention)
        return self

    @staticmethod
    def _absent(model: nn.Module, name: str, there: Mapping[str, Site]) -> str:
        try:
            found = model.get_submodule(name)
        except AttributeError:
            return unknown("layer", name, there)
        return f"{name} is a {type(found).__name__}; linear layers and 2-d convolutions can be quantised"

    # -- changes ------------------------------------------------------------------------------------------------------
    def with_layers(self, changes: Mapping[str, LayerPlan | None], method: str | None = None) -> QuantPlan:
        """The plan with other formats for some layers; None keeps a layer as it is."""
        if missing := sorted(set(changes) - set(self.shapes)):
            raise PlanError(unknown("layer", missing[0], self.shapes))
        layers = {name: plan for name in self.shapes if (plan := changes.get(name, self.layers.get(name))) is not None}
        layers = {name: plan for name, plan in layers.items() if name not in changes or changes[name] is not None}
        kept = {**self.kept, **{name: "by the plan" for name, plan in changes.items() if plan is None}}
        kept = {name: why for name, why in kept.items() if name not in layers}
        return replace(self, layers=layers, kept=kept, method=method or self.method)

    def with_attention(self, model: nn.Module, wanted: AttentionPlan | Mapping[str, AttentionPlan]) -> QuantPlan:
        """The plan with attentions of ``model`` in 8 bits: all of them, or by name or pattern (``*``).

        Raises:
            PlanError: for a name or pattern that no attention has.
        """
        from fewstep.quant.attention.install import attentions

        return replace(self, attention={**self.attention, **by_name(wanted, attentions(model))})

    def diff(self, other: QuantPlan) -> dict[str, tuple[str, str]]:
        """Layers that the two plans treat differently: as this one and as the other says."""

        def said(plan: QuantPlan, name: str) -> str:
            return str(plan.layers[name]) if name in plan.layers else "kept"

        names = dict.fromkeys((*self.shapes, *other.shapes))
        return {n: (said(self, n), said(other, n)) for n in names if said(self, n) != said(other, n)}

    # -- files --------------------------------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "provenance": dict(self.provenance),
            "other": self.other,
            "layers": {name: plan.to_json() for name, plan in self.layers.items()},
            "kept": dict(self.kept),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attention": {name: plan.to_json() for name, plan in self.attention.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> QuantPlan:
        """Read :meth:`to_json`; PlanError where something is missing or malformed."""
        if not isinstance(body, Mapping):
            raise PlanError(f"a plan of formats is a table, got a {type(body).__name__}")
        body = {"attention": {}, **body}  # plans that were written before they had any
        if set(body) != {*KEYS, "attention"}:
            raise PlanError(
                f"a plan has the keys {', '.join(KEYS)}; differing: {', '.join(sorted(set(body) ^ {*KEYS, 'attention'}))}"
            )
        try:
            layers = {str(name): LayerPlan.from_json(plan) for name, plan in body["layers"].items()}
            shapes = {str(name): tuple(int(size) for size in shape) for name, shape in body["shapes"].items()}
            attention = {str(name): AttentionPlan.from_json(plan) for name, plan in body["attention"].items()}
        except (TypeError, AttributeError) as error:
            raise PlanError(f"a plan's layers and shapes are tables by layer: {error}") from None
        if missing := sorted(set(layers) - set(shapes)):
            raise PlanError(f"the plan has no shape of {missing[0]}")
        return cls(**{**body, "layers": layers, "shapes": shapes, "attention": attention})

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; whole or not at all."""
        write_json(_json_path(path), "QuantPlan", self.to_json())

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> QuantPlan:
        """Read a plan; with ``model`` also refuse one that was made for another architecture.

        Raises:
            ArtifactError: unreadable, of another kind or version, unknown keys.
            PlanError: malformed, or for another model.
        """
        plan = cls.from_json(read_json(_json_path(path), "QuantPlan", required=KEYS, optional=("attention",)))
        return plan if model is None else plan.validate(model)


KEYS = ("model", "fingerprint", "method", "provenance", "other", "layers", "kept", "shapes")


def make_plan(
    model: nn.Module,
    decide: Callable[[Site], LayerPlan | str],
    method: str,
    provenance: Mapping[str, Any] | None = None,
    *,
    may_be_empty: bool = False,
) -> QuantPlan:
    """The plan in which every layer is what ``decide`` says of it: a layer's plan, or why it is kept.

    Raises:
        PlanError: where nothing would be quantised, unless it may be so.
    """
    found = sites(model)
    decided = {site.name: decide(site) for site in found}
    layers = {name: plan for name, plan in decided.items() if isinstance(plan, LayerPlan)}
    if not layers and not may_be_empty:
        raise PlanError(
            f"{type(model).__name__} has no layer that {method} would quantise; it has {len(found)} float layers"
        )
    weights = {id(site.module.weight) for site in found}
    other = sum(p.numel() for n, p in model.named_parameters() if id(p) not in weights and "lora_" not in n)
    return QuantPlan(
        layers=layers,
        shapes={site.name: site.shape for site in found},
        kept={name: why for name, why in decided.items() if isinstance(why, str)},
        model=type(model).__name__,
        fingerprint=architecture(model),
        method=method,
        provenance=dict(provenance or {}),
        other=other,
    )


def _json_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix != ".json":
        raise ArtifactError(f"a plan's path must end in .json, got {str(path)!r}")
    return path
