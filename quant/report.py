"""What quantising a network did: layers, bits, bytes, time, and how far weights and outputs moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewstep.quant.plan import QuantPlan


@dataclass(frozen=True)
class QuantReport:
    """Returned by :func:`~fewstep.quant.quantize_`.

    Attributes:
        plan: what was done.
        weight_sqnr: signal to quantisation noise of each layer's weight, in dB.
        output_error: relative error of the network's output on the calibration calls, ||y_q - y|| / ||y||; None without.
        seconds: wall clock of calibrating and quantising.
        float_bytes: bytes of the parameters before, in the dtypes that they had.
        bytes: bytes of the parameters after.
        findings: what the method found beside the arrays.
    """

    plan: QuantPlan
    weight_sqnr: Mapping[str, float]
    output_error: float | None
    seconds: float
    float_bytes: int
    bytes: int
    findings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Mean bits a weight over the quantised layers."""
        return self.plan.bits

    def worst(self, count: int = 5) -> dict[str, float]:
        """The layers whose weights lost most."""
        return dict(sorted(self.weight_sqnr.items(), key=lambda entry: entry[1])[:count])

    def __str__(self) -> str:
        lines = [
            f"{self.plan.method}: {len(self.plan.layers)} of {len(self.plan.shapes)} layers, {self.bits:.2f} bits a weight, "
            f"{self.float_bytes / 1e6:.2f} -> {self.bytes / 1e6:.2f} MB, {self.seconds:.1f} s"
        ]
        if self.output_error is not None:
            lines.append(f"  output error {self.output_error:.2%} on the calibration calls")
        lines += [f"  {count:>4} x {formats}" for formats, count in self.plan.summary().items()]
        lines += [f"  kept {name}: {why}" for name, why in self.plan.kept.items()]
        lines += [f"  {name}: {value}" for name, value in self.findings.items()]
        return "\n".join(lines)

    __repr__ = __str__
