"""Matrix products in other formats than the model's own: by backend, chosen by device, formats and shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

assert __name__.startswith("fewstep."), "import fewstep.quant instead"

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.quant.backends import Support
    from fewstep.quant.formats import Quantized


def backends() -> list[Support]:
    """What is usable here: of every backend, device and pair of formats whether it works, and if not, why."""
    from fewstep.quant.backends import table

    return table()


def matmul(a: Quantized, b: Quantized, backend: str = "auto") -> Tensor:
    """decode(a) decode(b)^T of two matrices of codes.

    Args:
        a: (M, K), activations.
        b: (N, K), a weight.
        backend: a name of :func:`backends`, or ``auto`` for the first that can.

    Returns:
        (M, N) float32.

    Raises:
        FewstepError: for other shapes, an unknown backend, or one that cannot multiply these formats, with the reason.

    Example:
        >>> a, b = Format.parse("int8:row").encode(x), Format.parse("int7:row").encode(w)
        >>> y = matmul(a, b)
    """
    from fewstep.errors import FewstepError
    from fewstep.quant.backends import ALL, named, problem_of

    (_, k), (n, other) = a.shape, b.shape
    if k != other:
        raise FewstepError(f"a has {k} columns and b {other}; both are (rows, K) of one K")

    def problem(name: str) -> str | None:
        found = problem_of(named(name), str(a.format), str(b.format), str(a.codes.device))
        return found or named(name).refuses_shape(n, k)

    if backend != "auto" and (reason := problem(backend)):
        raise FewstepError(f"backend {backend} cannot multiply {a.format} by {b.format}: {reason}")
    chosen = named(backend) if backend != "auto" else next(one for one in ALL if problem(one.name) is None)
    return chosen.product(a, chosen.pack(b))
