"""What methods share that decide while they run: a whole-stack site, limits on reuse, and the count of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fewstep.caching.actions import Action
from fewstep.caching.families import Family
from fewstep.caching.families.transformer import TransformerFamily
from fewstep.caching.families.unet import UNetFamily
from fewstep.caching.method import Decider, Entry, Method
from fewstep.caching.methods.voting import agreed, check_vote
from fewstep.caching.roles import first_tensor
from fewstep.errors import FewstepError


@dataclass(frozen=True, kw_only=True)
class OnlineMethod(Method):
    """Base of methods that look at each call before they decide. One decision holds for the whole batch, and for all ranks.

    Attributes:
        vote: how the samples of a batch agree, see :data:`~fewstep.caching.methods.voting.VOTES`.
        ranks: whether, where ``torch.distributed`` is initialised, one rank that computes makes all compute: needed where ranks
            share the network, to be turned off where each draws by itself.
        warmup: steps that are computed at the start, at least 1.
        cooldown: steps that are computed at the end (where the number of steps is known).
        max_run: longest run of reused steps; None for no limit.
        max_reuse: most reused steps of a trajectory; None for no limit.
        always: steps that are always computed.
    """

    online: ClassVar[bool] = True
    warmup: int = 1
    cooldown: int = 0
    max_run: int | None = None
    max_reuse: int | None = None
    always: tuple[int, ...] = ()
    vote: str = "batch"
    ranks: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "always", tuple(self.always))
        check_vote(self.vote)
        for name, least in (("warmup", 1), ("cooldown", 0)):
            if (value := getattr(self, name)) < least:
                raise FewstepError(f"{name} is {value}; give a number of steps, at least {least}")
        for name in ("max_run", "max_reuse"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise FewstepError(f"{name} is {value}; give a number of steps, or None for no limit")

    def watch(self, family: Family, steps: int | None) -> Watch:
        """What looks and decides along one trajectory of one stream."""
        raise NotImplementedError

    def decider(self, family: Family, steps: int | None) -> Decider:
        return self.watch(family, steps)

    def free(self, entry: Entry, run: int, reused: int) -> bool:
        """Whether the limits leave a choice at this step."""
        return (
            entry.computed is not None
            and entry.step >= self.warmup
            and (entry.total is None or entry.step < entry.total - self.cooldown)
            and (self.max_run is None or run < self.max_run)
            and (self.max_reuse is None or reused < self.max_reuse)
            and entry.step not in self.always
        )


class Watch:
    """Decides step by step for one site; subclasses say what they look at."""

    def __init__(self, method: OnlineMethod) -> None:
        self.limits = method
        self.run = 0
        self.reused = 0

    def observe(self, entry: Entry) -> None:
        """Follow the signal. It is called at every step, and must not read a number from a device."""

    def admits(self, entry: Entry) -> bool:
        """Whether the step may be reused; asked only where the limits leave a choice."""
        raise NotImplementedError

    def recompute(self, entry: Entry) -> None:
        """The step is computed."""

    def __call__(self, entry: Entry) -> Action:
        self.observe(entry)
        if self.limits.free(entry, self.run, self.reused) and self._agreed(entry):
            self.run, self.reused = self.run + 1, self.reused + 1
            return Action.REUSE
        self.run = 0
        self.recompute(entry)
        return Action.COMPUTE

    def _agreed(self, entry: Entry) -> bool:
        return agreed(self.admits(entry), first_tensor(entry.args, entry.kwargs).device, self.limits.ranks)

    def keeps(self, step: int, site: int) -> bool:
        return True


def whole_stack(family: Family, method: str) -> str:
    """The site of all blocks of a transformer, or what comes nearest in a UNet: all but its outermost layers.

    Raises:
        FewstepError: where the model has neither.
    """
    if isinstance(family, TransformerFamily):
        return family.site(f"blocks[0:{len(family.paths)}]").name
    if isinstance(family, UNetFamily):
        return family.site("branch.0").name
    raise FewstepError(
        f"{method} needs a transformer or a UNet, the model is {family.name}; Interval reuses its output"
    )


def transformer(family: Family, method: str, instead: str) -> TransformerFamily:
    """The family, if it is one of blocks.

    Raises:
        FewstepError: where it is none.
    """
    if not isinstance(family, TransformerFamily):
        raise FewstepError(f"{method} needs a list of transformer blocks, the model is {family.name}; {instead}")
    return family


def positive(value: Any, name: str) -> None:
    """Raises FewstepError for what is not above 0."""
    if not value > 0:
        raise FewstepError(f"{name} is {value}; give a number above 0")
