"""What the quantised linear layer and the quantised convolution share: their arrays, and how inputs become codes.

    y = decode(Q_x(( x + shift ) / smooth)) decode(Q_w)^T + (x down^T) up^T + bias

``down`` is stored divided by ``smooth``, so that the branch reads x itself; ``bias`` with the shift's share taken off.
Source: SVDQuant, 2411.05007, eq. 5-9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.quant.formats import Quantized
from fewstep.quant.layer_plan import LayerPlan
from fewstep.quant.layers.moment import Moment
from fewstep.quant.views import weight_tensor

WEIGHT = ("codes", "scale", "zero", "tensor_scale")
INPUT = ("input_scale", "input_zero")
FLOATS = ("bias", "smooth", "down", "up", "first")
"""What follows ``module.to(dtype)``; codes and scales do not."""
ARRAYS = (*WEIGHT, *INPUT, *FLOATS)


def _remembering(memory: dict[Any, Any], key: Any, make: Callable[[], Any]) -> None:
    memory[key] = make()


# A compiler's graph is broken here once; from then on what was made is a constant in it.
_fill: Any = torch.compiler.disable(_remembering)  # type: ignore[no-untyped-call]


class QuantLayer(nn.Module):
    """Base of :class:`QuantLinear` and :class:`QuantConv2d`; its arrays are parameters that take no gradient.

    Attributes:
        plan: the layer's formats.
        shape: of the weight that it replaces.
        backend: the name of the backend to compute with, or ``auto``.
        added: directions that LoRA adapters added to the branch.
        moment: which of the plan's times the network is called at.
    """

    plan: LayerPlan
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter | None
    tensor_scale: nn.Parameter | None
    input_scale: nn.Parameter | None
    input_zero: nn.Parameter | None
    smooth: nn.Parameter | None
    down: nn.Parameter | None
    up: nn.Parameter | None
    first: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, plan: LayerPlan, shape: tuple[int, ...], arrays: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)  # not the float layer's, which would make a weight
        self.plan, self.shape, self.dtype = plan, shape, dtype
        self.backend = "auto"
        self.added = 0
        self.memory: dict[Any, Any] = {}
        self.moment: Moment | None = None
        for name in ARRAYS:
            value = arrays.get(name)
            self.register_parameter(name, None if value is None else nn.Parameter(value, requires_grad=False))

    # -- weight -------------------------------------------------------------------------------------------------------
    @property
    def pointwise(self) -> bool:
        """Whether it is a product of rows with the weight matrix; a convolution may not be."""
        return True

    @property
    def columns(self) -> int:
        """K of the weight matrix."""
        return math.prod(self.shape[1:])

    def quantized_weight(self) -> Quantized:
        """The weight's codes, unpacked, (N, K)."""
        arrays = {name: getattr(self, name) for name in WEIGHT}
        return Quantized.from_packed(self.plan.weight, self.columns, **arrays)

    @property
    def decoded(self) -> Tensor:
        """float32 matrix (N, K) of the codes; kept on the CPU, where there is no faster way for most formats."""
        kept: Tensor = self.remember("decoded", lambda: self.quantized_weight().decode().contiguous())
        if kept.device.type != "cpu":
            self.memory.pop("decoded", None)
        return kept

    @property  # type: ignore[override, unused-ignore]
    def weight(self) -> Tensor:
        """The weight that this layer multiplies x with: smoothing undone, low-rank branch added; in the layer's dtype."""
        matrix = self.decoded
        if self.smooth is not None:
            matrix = matrix / self.smooth_columns(self.smooth).float()
        if self.down is not None:
            assert self.up is not None
            matrix = matrix + self.up.float() @ self.down.float()
        return weight_tensor(matrix, self.shape).to(self.dtype)

    def smooth_columns(self, factors: Tensor) -> Tensor:
        """A factor a channel as a factor a column of the weight matrix."""
        return factors.repeat(self.columns // factors.shape[0])

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """What a backend made of the weight, made once; forgotten when the weight moves or is loaded."""
        if key not in self.memory:
            _fill(self.memory, key, make)
        return self.memory[key]

    # -- input --------------------------------------------------------------------------------------------------------
    def stored_input(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and zero point of this call's inputs, where they are stored."""
        if not self.plan.times or self.input_scale is None:
            return self.input_scale, self.input_zero
        moment = self.moment or Moment(self.plan.times)
        return moment.pick(self.input_scale), None if self.input_zero is None else moment.pick(self.input_zero)

    def encode_input(self, matrix: Tensor) -> Quantized:
        """Codes of prepared inputs."""
        assert self.plan.activation is not None
        return self.plan.activation.encode(matrix, *self.stored_input())

    def round_input(self, matrix: Tensor) -> Tensor:
        """``encode_input(matrix).decode()``."""
        if self.plan.activation is None:
            return matrix
        return self.plan.activation.round(matrix, *self.stored_input())

    # -- torch --------------------------------------------------------------------------------------------------------
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.memory.clear()
        fixed = {name: value.data for name in (*WEIGHT, *INPUT) if (value := getattr(self, name)) is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in fixed.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:  # float16 has too few exponents for scales
                after.data = before.to(after.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.memory.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "memory": {}}  # packed weights of oneDNN neither pickle nor copy

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.plan}"
