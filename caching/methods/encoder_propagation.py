"""Faster Diffusion: the UNet's encoder runs at key steps only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

from fewstep.caching.families import Family
from fewstep.caching.families.unet import ENCODER, UNetFamily
from fewstep.caching.method import Method, check_interval, steps_table
from fewstep.caching.plan import Actions
from fewstep.errors import FewstepError, unknown

_FIFTY = {0, 1, 2, 3, 5, 10, 15, 25, 35}
KEY_STEPS: dict[str, Callable[[int, int], bool]] = {
    "50ls": lambda i, steps: any(round(key * steps / 50) == i for key in _FIFTY),
    "75ls": lambda i, steps: i > 65 * steps / 75 or i < 10 * steps / 75 or i % 5 == 0,
    "100ls": lambda i, steps: i > 85 * steps / 100 or i < 10 * steps / 100 or i % 5 == 0,
    "s2": lambda i, steps: i < 20 * steps / 50 or i > 40 * steps / 50 or i % 2 == 0,
    "triangular": lambda i, steps: any(k * (k + 1) // 2 == i for k in range(i + 1)),
}
"""The authors' key steps by name, for the step counts that they are named after; others are scaled."""


@dataclass(frozen=True)
class EncoderPropagation(Method):
    """The encoder's skips and the middle are kept from key step to key step; the decoder runs at every step.

    Between key steps the sample does not enter the network, only the time does.
    Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference, arXiv 2312.09608.

    Attributes:
        keys: a named schedule (``50ls``, ``75ls``, ``100ls``, ``s2``, ``triangular``), a number m for every m-th step, or
            the key steps themselves (0 is added).
    """

    knob = "keys"
    keys: str | int | tuple[int, ...] = "50ls"

    def __post_init__(self) -> None:
        if isinstance(self.keys, str):
            if self.keys not in KEY_STEPS:
                raise FewstepError(unknown("key schedule", self.keys, KEY_STEPS))
        elif isinstance(self.keys, int):
            check_interval(self.keys, "keys")
        else:
            object.__setattr__(self, "keys", tuple(self.keys))
            if not all(isinstance(key, Integral) and key >= 0 for key in self.keys):
                raise FewstepError(f"keys are {self.keys}; give steps, whole numbers from 0")

    def sites(self, family: Family) -> list[str]:
        if not isinstance(family, UNetFamily):
            raise FewstepError(
                f"EncoderPropagation needs a UNet with an encoder, the model is {family.name}; DeltaDiT is its like there"
            )
        return [ENCODER]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        return steps_table([self.is_key(i, steps) for i in range(steps)], 1)

    def is_key(self, step: int, steps: int) -> bool:
        """Whether the encoder runs at a step."""
        if isinstance(self.keys, str):
            return step == 0 or KEY_STEPS[self.keys](step, steps)
        if isinstance(self.keys, int):
            return step % self.keys == 0
        return step == 0 or step in self.keys
