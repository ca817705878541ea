"""Windowed attention with statistics of the last full one: what it misses is rescaled, or added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fewstep.caching.forms.bands import PLAIN, Tokens, banded, full_logsumexp
from fewstep.caching.roles import Fit, Forward, Moment, Role
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Windowed(Role):
    """Self-attention that, sparse, sees a window of keys and takes the rest from the last full attention.

    At a computed step, with O the full output and O_W = softmax over the window,

        rho = exp(lse_W - lse) = sum_{j in W} e^{s_ij} / sum_j e^{s_ij},    R = O - rho O_W

    and at a sparse one O = rho O_W + R. With ``rescale`` 0 rho is left at 1: R = O - O_W, window attention with residual
    sharing. Reused, the last full or sparse output is returned as it is.

    Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape, arXiv 2505.22918, sec. 3 (rho), and
    DiTFastAttn: Attention Compression for Diffusion Transformer Models, arXiv 2406.08552, sec. 3.2 (residual). Both take R
    after the output projection; that is linear, so before it R says the same.

    Attributes:
        window: keys seen to either side of a query, by index.
        rescale: whether rho is used (1) or not (0).
        drift: added to rho at every sparse step after the first, which grows as attention gets more local; rho is held
            at most 1 (the authors' code does not).
        outputs: whether the module's output is kept too (1), to be reused.
        axis: of the frames in a video's sample (2 of (B, C, F, H, W), 1 of (B, F, C, H, W)); 0 for other samples. The window
            is then one of positions in a frame, the same in every frame, and tokens of text before the video's stay seen.
        patch: positions of the sample to a token along a side, and
        frames: frames to a token; for videos.
        flex: whether the band is computed by FlexAttention (1), a fused kernel on CUDA, or by plain operations (0).
    """

    window: int = 128
    rescale: int = 0
    drift: float = 0.0
    outputs: int = 1
    axis: int = 0
    patch: int = 1
    frames: int = 1
    flex: int = 0

    def __post_init__(self) -> None:
        if self.window < 0:
            raise FewstepError(f"window is {self.window}; give how many keys to either side, 0 or more")

    def compute(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not at.keep:
            return forward(*args, **kwargs)
        out = self._attend(self._full(at), forward, args, kwargs)
        self._keep(at, out)
        return out

    def reuse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not self.outputs:
            raise FewstepError(f"site {at.cell.site!r} keeps no outputs to reuse; give outputs=1")
        return at.predictor.predict(at.cell.part("output"), at.step)

    def teach(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], fit: Fit) -> Any:
        return fit(at.cell.part("output"), at.step, forward(*args, **kwargs))

    def sparse(self, at: Moment, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        out = self._attend(self._sparse(at), forward, args, kwargs)
        if at.keep:
            self._keep(at, out)
        return out

    def _keep(self, at: Moment, out: Any) -> None:
        if self.outputs:
            at.cell.part("output").keep(at.step, out)

    def _full(self, at: Moment) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            whole = scaled_dot_product_attention(q, k, v, scale=scale)
            near, near_lse = self._near(at, q, k, v, scale)
            rho = None
            if self.rescale:
                rho = (near_lse - full_logsumexp(q, k, scale)).exp().clamp(max=1)[..., None]
                near = (rho * near).to(v.dtype)
            at.cell.keep(at.step, [rho, whole - near])
            return whole

        return attend

    def _sparse(self, at: Moment) -> Attend:
        kept = at.cell.history[0]
        kept.check(at.cell.site)
        rho, rest = kept.leaves

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            near, _ = self._near(at, q, k, v, scale)
            if rho is not None:
                drifted = (rho + self.drift * (at.step - kept.step - 1)).clamp(max=1)
                near = (drifted * near).to(v.dtype)
            return torch.add(near, rest)

        return attend

    def _near(self, at: Moment, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(at, q.shape[2])
        if not self.flex or q.is_meta:  # shapes alone: the plain form has the band's cost
            return banded(q, k, v, self.window, scale, tokens)
        from fewstep.caching.forms.flex import flexed

        return flexed(q, k, v, self.window, scale, tokens)

    def _tokens(self, at: Moment, count: int) -> Tokens:
        if not self.axis:
            return PLAIN
        sample = at.scene.sample.shape
        frames = -(-sample[self.axis] // self.frames)
        text = count - frames * (sample[-2] // self.patch) * (sample[-1] // self.patch)
        if text < 0:
            raise FewstepError(f"{self.path} sees {count} tokens, fewer than a sample of shape {tuple(sample)} has")
        return Tokens(text, frames)

    def _attend(self, attend: Attend, forward: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with Attention(attend) as attention:
            out = forward(*args, **kwargs)
        if attention.calls != 1:
            raise FewstepError(
                f"{self.path} made {attention.calls} calls of scaled_dot_product_attention over its own tokens, without a "
                "mask; a window needs one. A processor or backend that computes attention by itself hides it"
            )
        return out


Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
"""``attend(q, k, v, scale)`` of (B, heads, N, D)."""


class Attention(TorchFunctionMode):
    """Puts a function in the place of self-attention while it is open, whatever module or processor calls it.

    Attributes:
        calls: how many it replaced. Attention to other tokens or under a mask is left alone.
    """

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.calls = attend, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {
            **dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)),
            **kwargs,
        }
        q, k, v = (given[name] for name in ("query", "key", "value"))
        if given.get("attn_mask") is not None or given.get("is_causal") or q.shape != k.shape:
            return func(*args, **kwargs)
        self.calls += 1
        with torch._C.DisableTorchFunction():
            return self.attend(q, k, v, given.get("scale"))
