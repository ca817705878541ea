"""Sources of random numbers as diffusers' pipelines take them: one generator for all samples, or one a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from fewstep.errors import FewstepError

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def one_each(generators: Sequence[torch.Generator], batch: int) -> Sequence[torch.Generator]:
    """``generators``, which are as many as the batch has samples; raises :class:`FewstepError` otherwise."""
    if len(generators) != batch:
        raise FewstepError(f"{len(generators)} generators were given for a batch of {batch}; one a sample is needed")
    return generators
