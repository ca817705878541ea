"""LD-Pruner: how much each operator of a network matters, and the network without those that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.caching.actions import Action
from fewstep.caching.controller import applied
from fewstep.caching.families import Family, family_of
from fewstep.caching.forms import form_name
from fewstep.caching.method import Method
from fewstep.caching.plan import Actions
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Removal(Method):
    """Sites left out at every step: a pruned network as a plan, so that it can be costed, stacked and taken back.

    Attributes:
        at: names of sites, such as :func:`removable` lists.
    """

    at: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.at, str) or not self.at:
            raise FewstepError(f"at is {self.at!r}; give a tuple of names of sites")
        object.__setattr__(self, "at", tuple(self.at))

    @classmethod
    def of_least(cls, scores: Mapping[str, float], count: int) -> Removal:
        """Without the ``count`` sites of the lowest :func:`removal_scores`, none of which is inside another of them.

        Raises:
            FewstepError: where there are not so many.
        """
        chosen: list[str] = []
        for name in sorted(scores, key=lambda n: scores[n]):
            if len(chosen) < count and not any(_overlap(name, other) for other in chosen):
                chosen.append(name)
        if not 0 < count <= len(chosen):
            raise FewstepError(
                f"count is {count}; of the {len(scores)} sites scored 1 to {len(chosen)} can go together"
            )
        return cls(tuple(chosen))

    def sites(self, family: Family) -> list[str]:
        return [family.site(name).name for name in self.at]

    def table(self, steps: int, sites: Sequence[str]) -> Actions:
        return np.full((steps, len(sites)), np.int8(Action.SKIP))


def removable(model: Any) -> list[str]:
    """Sites of a network that can be left out: branches behind a residual, resnets that keep their shape, single blocks.

    Blocks hold branches, so remove a block or its branches, not both.
    """
    family = family_of(model)
    kinds = ("attention", "cross_attention", "feed_forward", "fused")
    found = [f"blocks[{i}:{i + 1}]" for i in range(len(getattr(family, "paths", ())))]
    if found:
        return found + [name for kind in kinds for name in family.branches(kind)]
    for name, module in family.model.named_modules():
        if _keeps_shape(module) or name.rsplit(".", 2)[-2:-1] == ["attentions"]:
            found.append(form_name("without", name))
    return found + [name for kind in kinds[:3] for name in family.branches(kind)]


def _keeps_shape(module: Any) -> bool:
    resnet = type(module).__name__ == "ResnetBlock2D"
    return resnet and module.in_channels == module.out_channels and not (module.up or module.down)


def removal_scores(pipe: Any, run: Callable[[], Tensor], at: Sequence[str] | None = None) -> dict[str, float]:
    """How far the latents move when a site is left out, for each site; the smallest first.

        score = ||mu - mu'||_2 + ||s - s'||_2

    with mu and s the channels' means and standard deviations over all samples and positions, of the latents with the
    network as it is and without the site. LD-Pruner: Efficient Pruning of Latent Diffusion Models using Task-Agnostic
    Insights, arXiv 2404.11936, sec. 3.2.

    Args:
        pipe: a pipeline with one denoiser, or that network.
        run: makes latents (N, C, ...) with the pipe, always of the same seeds. N of 100 is the paper's.
        at: names of sites; :func:`removable` where left out.
    """
    from fewstep.eval.costs.calls import denoisers

    networks = denoisers(pipe)
    if len(networks) != 1:
        raise FewstepError(f"{type(pipe).__name__} has {len(networks)} denoisers; score one of them at a time")
    before = _statistics(run())
    scores = {}
    for name in removable(networks[0]) if at is None else at:
        with applied(networks[0], Removal((name,)), num_inference_steps=LONGEST):
            after = _statistics(run())
        scores[name] = sum(float((a - b).norm()) for a, b in zip(before, after, strict=True))
    return dict(sorted(scores.items(), key=lambda item: item[1]))


LONGEST = 1000
"""Rows of the plans that score: any run is shorter."""


def _overlap(a: str, b: str) -> bool:
    """Whether one site is inside the other, as far as names tell."""
    x, y = (_path(name) for name in (a, b))
    return x == y or x.startswith(y + ".") or y.startswith(x + ".")


def _path(name: str) -> str:
    if name.startswith("blocks["):
        return "transformer_blocks." + name[7:].split(":")[0]
    return name.split(":", 1)[-1]


def _statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(latents, Tensor) or latents.ndim < 3:
        raise FewstepError("run has to return latents, a tensor (N, C, ...)")
    channels = latents.detach().double().cpu().transpose(0, 1).flatten(1)
    return channels.mean(1), torch.std(channels, 1, correction=0)
