"""DiTFastAttn: for every step and layer the cheapest form of self-attention that hardly changes the block's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fewstep.caching.actions import Action
from fewstep.caching.controller import applied
from fewstep.caching.families import Family
from fewstep.caching.forms import form_name
from fewstep.caching.hooks import Around, install, uninstall
from fewstep.caching.method import Decider, Entry, Method
from fewstep.caching.methods.windows import self_attentions, video_options
from fewstep.caching.model_cache import ModelCache
from fewstep.caching.plan import CachePlan
from fewstep.errors import FewstepError

SEARCH = "fewstep_cache_search"
Form = tuple[Action, Action]
"""What the windowed attention does, and what the halves of guidance do."""

AST = Action.REUSE
WINDOW = Action.SPARSE
FULL = Action.COMPUTE
SHARED = Action.SKIP
BOTH = Action.COMPUTE


def search_attention(
    pipe: Any, run: Callable[[], Any], *, threshold: float = 0.05, window: int = 128, share: bool = True
) -> CachePlan:
    """A plan over the self-attentions of a transformer, found by trying forms from the cheapest to the dearest.

    The forms: the last output again (AST), window attention with residual sharing (WA-RS), attention of the conditional
    half for both (ASC), WA-RS with ASC, and full. At each step after the first and for each layer in turn that form is
    taken, and goes on, whose block output a has, against the full form's b,

        mean(min(|a - b| / max(|a|, |b|), 10)) < threshold (l + 1) / L,     l = 0 .. L - 1

    DiTFastAttn: Attention Compression for Diffusion Transformer Models, arXiv 2406.08552, sec. 3.4 and algorithm 1.
    The plan's sites are the windowed attentions, then (with ``share``) the halves of each; it is for this number of steps.

    Args:
        pipe: a pipeline, or its transformer, with self-attentions named attn1 (DiT, PixArt).
        run: runs the pipeline once, on a batch of calibration prompts; what it returns is not looked at.
        threshold: 0 finds the plan that computes everything.
        window: keys to either side of a query.
        share: whether ASC is tried; needs guidance in one call.

    Raises:
        FewstepError: where the model has no such attention, or ``share`` is asked for calls without guidance.
    """
    from fewstep.eval.costs.calls import denoisers

    networks = denoisers(pipe)
    if len(networks) != 1:
        raise FewstepError(f"{type(pipe).__name__} has {len(networks)} denoisers; search one of them at a time")
    if threshold < 0:
        raise FewstepError(f"threshold is {threshold}; give 0 or more")
    method = _Search(window, share)
    with applied(pipe, method) as controller:
        cache = controller.caches[0]
        layers = [path for path in self_attentions(cache.family, "DiTFastAttn")]
        search = Search(cache, method, threshold, len(layers))
        modules = dict(cache.model.named_modules())
        blocks = [modules[path.rpartition(".")[0]] for path in layers]
        try:
            for number, block in enumerate(blocks):
                install(block, _BlockHook(search, number), SEARCH)
            run()
        finally:
            for block in blocks:
                uninstall(block, SEARCH)
        return search.plan()


@dataclass(frozen=True)
class _Search(Method):
    """The sites of the search, with actions that it sets from outside."""

    window: int
    share: bool
    chosen: dict[int, Action] = field(default_factory=dict)
    online: ClassVar[bool] = True

    def sites(self, family: Family) -> list[str]:
        paths = self_attentions(family, "DiTFastAttn")
        names = [form_name("window", path, window=self.window, **video_options(family)) for path in paths]
        return names + ([f"uncond:{path}" for path in paths] if self.share else [])

    def decider(self, family: Family, steps: int | None) -> Decider:
        return _Given(self.chosen)


@dataclass(frozen=True)
class _Given:
    chosen: Mapping[int, Action]

    def __call__(self, entry: Entry) -> Action:
        return self.chosen.get(entry.site, Action.COMPUTE)

    def keeps(self, step: int, site: int) -> bool:
        return True


class Search:
    """One trajectory in which every layer's form is chosen as it is reached."""

    def __init__(self, cache: ModelCache, method: _Search, threshold: float, layers: int) -> None:
        self.cache, self.method, self.threshold, self.layers = cache, method, threshold, layers
        self.rows: dict[int, np.ndarray[Any, Any]] = {}
        self.halved = [False] * layers  # whether what a layer kept is of the conditional half alone
        self.checked = not method.share

    def block(self, layer: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A block is reached: try, choose, go on."""
        call = self.cache.call
        if call is None:
            return forward(*args, **kwargs)
        self._check_guided(call.scene.sample)
        row = self.rows.setdefault(call.step, np.zeros(len(self.cache.sites), dtype=np.int8))
        before = self._memory(layer)
        full = self._try(layer, (FULL, BOTH), forward, args, kwargs)
        chosen, out, state = (FULL, BOTH), full, self._memory(layer)
        limit = self.threshold * (layer + 1) / self.layers
        for form in self._forms(layer) if call.step else ():
            self._restore(layer, before)
            other = self._try(layer, form, forward, args, kwargs)
            if relative_change(other, full) < limit:
                chosen, out, state = form, other, self._memory(layer)
                break
        self._restore(layer, state)
        self.halved[layer] = chosen[1] is SHARED
        for index, action in zip(self._indices(layer), chosen, strict=False):
            row[index] = action
            call.actions[index] = action
        return out

    def plan(self) -> CachePlan:
        """What was chosen."""
        if not self.rows:
            raise FewstepError("run did not call the network")
        return CachePlan(
            tuple(site.name for site in self.cache.sites),
            np.stack([self.rows[step] for step in range(len(self.rows))]),
            model={"class": self.cache.family.name},
            method=f"DiTFastAttn(threshold={self.threshold}, window={self.method.window})",
        )

    def _forms(self, layer: int) -> list[Form]:
        """From the cheapest; what was computed for one half can go on for that half alone."""
        halved = self.halved[layer]
        forms = [(AST, SHARED if halved else BOTH), (WINDOW, SHARED), (WINDOW, BOTH), (FULL, SHARED)]
        if not self.method.share:
            return [form for form in forms if form[1] is BOTH]
        return [form for form in forms if not (halved and form == (WINDOW, BOTH))]

    def _try(self, layer: int, form: Form, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = self.cache.call
        assert call is not None
        for index, action in zip(self._indices(layer), form, strict=False):
            self.method.chosen[index] = action
            call.actions.pop(index, None)
        return forward(*args, **kwargs)

    def _indices(self, layer: int) -> tuple[int, ...]:
        return (layer, self.layers + layer) if self.method.share else (layer,)

    def _memory(self, layer: int) -> tuple[Any, Any]:
        call = self.cache.call
        assert call is not None
        cut = call.stream.cut.get(layer)
        return call.stream.cells[layer].mapped(_same), cut.mapped(_same) if cut is not None else None

    def _restore(self, layer: int, memory: tuple[Any, Any]) -> None:
        call = self.cache.call
        assert call is not None
        whole, cut = memory
        call.stream.cells[layer] = whole.mapped(_same)
        call.stream.cut.pop(layer, None)
        if cut is not None:
            call.stream.cut[layer] = cut.mapped(_same)

    def _check_guided(self, sample: Any) -> None:
        if self.checked:
            return
        half = sample.shape[0] // 2
        if sample.shape[0] % 2 or not torch.equal(sample[:half], sample[half:]):
            raise FewstepError(
                "the network is called without guidance in one call, every sample twice; give share=False"
            )
        self.checked = True


def relative_change(a: Any, b: Any) -> float:
    """mean(min(|a - b| / max(|a|, |b|), 10)) of the first tensors of two outputs; equal zeros do not differ."""
    x, y = (next(leaf for leaf in tree_leaves(v) if isinstance(leaf, Tensor)).float() for v in (a, b))
    ratio = (x - y).abs() / torch.maximum(x.abs(), y.abs())
    return float(ratio.nan_to_num(0.0).clamp(max=10).mean())


def _same(value: Any) -> Any:
    return value


class _BlockHook(Around):
    def __init__(self, search: Search, layer: int) -> None:
        super().__init__()
        self.search, self.layer = search, layer

    def run(self, module: Any, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self.search.block(self.layer, forward, args, kwargs)
