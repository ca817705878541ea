"""Schedulers from specs, with every refusal as one clear error."""

from __future__ import annotations

from typing import Any

from fewstep.errors import FewstepError


def scheduler_for(spec: str, config: Any) -> Any:
    """The scheduler of ``spec`` for the model whose own scheduler has ``config``.

    Raises:
        FewstepError: for an unknown name or option, or a value that the scheduler's class refuses, whatever it raises.
    """
    from fewstep.samplers import make_scheduler

    try:
        return make_scheduler(spec, config)
    except FewstepError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise FewstepError(
            f"scheduler {spec!r} cannot be made: {reason[0] if reason else type(error).__name__}"
        ) from error
