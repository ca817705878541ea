"""Options that all multistep schedulers share, under diffusers' names."""

from __future__ import annotations

from typing import Any

LOWERING: dict[str, Any] = {"lower_order_final": True, "euler_at_final": False}


def lowering(config: Any) -> dict[str, Any]:
    """The solver's arguments for the order and its end, from a scheduler's config."""
    return {
        "order": config.solver_order, "lower_order_final": config.lower_order_final, "euler_at_final": config.euler_at_final,
    }  # fmt: skip


def uncorrected_of(config: Any) -> tuple[int, ...] | None:
    """The solver's ``disable_corrector``: a list of intervals, or None for the early ones of short grids."""
    return None if config.disable_corrector is None else tuple(config.disable_corrector)
