"""``fewstep doctor``."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def doctor() -> None:
    """Say what is installed, what it can compute on, and which extras are usable or why not."""
    from fewstep.eval.environment import dtype_support, environment, extras

    found = environment()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("fewstep", found["fewstep"])
    table.add_row("python", f"{found['python']} on {found['platform']}")
    for name, version in found["libraries"].items():
        table.add_row(name, version or "missing: pip install fewstep")
    table.add_row("threads", f"{found['threads']} of {found['cores']} cores")
    for device in found["devices"]:
        support = dtype_support(device.split()[0])
        works = ", ".join(name for name, good in support.items() if good)
        fails = ", ".join(name for name, good in support.items() if not good)
        table.add_row(f"device {device}", works + (f" (not {fails})" if fails else ""))
    for extra, state in extras().items():
        table.add_row(escape(f"extra [{extra}]"), escape(state))
    for what, state in backends():
        table.add_row(escape(what), escape(state))
    Console().print(table)


def backends() -> list[tuple[str, str]]:
    """Of every backend of quantised layers and device, which formats (activations x weights) it multiplies, or why none."""
    from fewstep.quant import kernels

    found: dict[tuple[str, str], list[str]] = {}
    for row in kernels.backends():
        pair = "" if row.activation == row.weight == "any" else f"{row.activation} x {row.weight}"
        state = (
            (pair or "everything")
            if row.usable
            else f"{pair} not: {row.problem}"
            if pair
            else f"not usable: {row.problem}"
        )
        found.setdefault((row.backend, row.device), []).append(state)
    return [(f"quant {backend} on {device}", "; ".join(states)) for (backend, device), states in found.items()]
