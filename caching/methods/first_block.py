"""FirstBlockCache and DBCache: the first blocks' residual says whether the others have to run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fewstep.caching.families import Family
from fewstep.caching.method import Entry
from fewstep.caching.methods.online import OnlineMethod, Watch, positive, transformer
from fewstep.caching.methods.voting import decisive, on_host, relative_change
from fewstep.caching.predictors import Hold, Predictor
from fewstep.caching.roles import first_tensor
from fewstep.errors import FewstepError

PROBE = "front"


@dataclass(frozen=True)
class FirstBlockCache(OnlineMethod):
    """Blocks behind the front ones are reused while the front's residual r = F_front(x) - x has hardly changed.

        |r - r_c|_1 / |r_c|_1 < threshold,    r_c: of the last computed step

    One block in front is ParaAttention's first-block cache (2024); more, and blocks at the back that always run, are
    cache-dit's DBCache. The residual of the hidden states decides, those of all streams are reused. It reads one number from
    the device a step, outside any compiled block.

    Attributes:
        threshold: 0.05 to 0.12 in use; larger reuses more.
        front_blocks: blocks that always run, and whose residual is watched (cache-dit's Fn, 8 there).
        back_blocks: blocks at the end that always run (Bn).
        predict: what stands for the residual of the blocks between.
    """

    knob: ClassVar[str | None] = "threshold"
    threshold: float = 0.08
    front_blocks: int = 1
    back_blocks: int = 0
    predict: Predictor = Hold()  # noqa: RUF009  (a frozen value)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.threshold, "threshold")
        if self.front_blocks < 1 or self.back_blocks < 0:
            raise FewstepError(
                f"front_blocks is {self.front_blocks} and back_blocks {self.back_blocks}; at least 1 and 0 are needed"
            )

    @property
    def predictor(self) -> Predictor:
        return self.predict

    def sites(self, family: Family) -> list[str]:
        blocks = transformer(family, type(self).__name__, "TeaCache and DeepCache serve UNets")
        count = len(blocks.paths)
        if self.front_blocks + self.back_blocks >= count:
            raise FewstepError(
                f"{self.front_blocks} front and {self.back_blocks} back blocks leave nothing to reuse of the {count} of "
                f"{family.name}"
            )
        return [family.site(f"blocks[{self.front_blocks}:{count - self.back_blocks}]").name]

    def probes(self, family: Family) -> dict[str, str]:
        return {PROBE: f"{transformer(family, type(self).__name__, '').paths[0]}:input"}

    def watch(self, family: Family, steps: int | None) -> Watch:
        return _FrontResidual(self)


@dataclass(frozen=True)
class DBCache(FirstBlockCache):
    """:class:`FirstBlockCache` with the defaults of cache-dit's DBCache: eight blocks in front, eight steps of warm-up."""

    front_blocks: int = 8
    warmup: int = field(default=8, kw_only=True)


class _FrontResidual(Watch):
    """Compares the front's residual with that of the last computed step."""

    def __init__(self, method: FirstBlockCache) -> None:
        super().__init__(method)
        self.threshold = method.threshold
        self.residual: Any = None
        self.computed: Tensor | None = None

    def observe(self, entry: Entry) -> None:
        self.residual = first_tensor(entry.args, entry.kwargs) - entry.probes[PROBE]

    def admits(self, entry: Entry) -> bool:
        if self.computed is None or self.computed.shape != self.residual.shape:  # the batch was halved
            return False
        vote = self.limits.vote
        return decisive(on_host(relative_change(self.residual, self.computed, vote)), vote) < self.threshold

    def recompute(self, entry: Entry) -> None:
        self.computed = self.residual
