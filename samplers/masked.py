"""Masked diffusion of discrete data (text, codebook indices): the first-hitting sampler.

The process masks every token independently; m, the share that is masked, grows from 0 to 1. Backwards, a token that is
masked at m0 is revealed at a level that is uniform on (0, m0), independently of all else. So all levels can be drawn before
the first network call: the tokens are revealed in the order of their levels, largest first, one network call each, whatever
the number of time steps of an ordinary sampler, and the law is exactly that of infinitely many. The draws of what is
revealed are the only others: a token's worth of random numbers a call, not a sequence's a step.

Source: Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling,
2409.02908, sections 4 and 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.samplers.generators import Generators, one_each


def linear_time(masked: Tensor) -> Tensor:
    """t of the linear schedule, where the share m = t is masked."""
    return masked


def cosine_time(masked: Tensor) -> Tensor:
    """t of the cosine schedule, where the share m = cos(pi (1 - t) / 2) is masked."""
    return 1 - (2 / math.pi) * torch.arccos(masked)


@dataclass
class Unmasking:
    """What one run of :class:`FirstHitting` has seen so far: the only mutable thing."""

    tokens: Tensor
    """(batch, length) int64."""
    order: Tensor
    """(batch, length): the positions in the order in which they are revealed; those that were given come last."""
    levels: Tensor
    """(batch, length) float64: the share that is masked when each of ``order`` is revealed, decreasing."""
    counts: Tensor
    """(batch,): how many of ``order`` are to be revealed."""
    generator: Generators
    revealed: int = 0
    """How many each sample has revealed, or all it had."""
    before: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    """(level, probabilities) of the last call, for extrapolation."""

    @property
    def over(self) -> bool:
        """Whether every token is revealed."""
        return self.revealed >= self.order.shape[1] or self.revealed >= int(self.counts.max())


@dataclass(frozen=True)
class FirstHitting:
    """The first-hitting sampler, exact for ``tokens_per_call = 1``.

    Immutable, so that threads share one; a run is an :class:`Unmasking`. Either :meth:`sample`, or a loop of one's own:
    ``run = sampler.start(tokens)``, then ``sampler.step(run, network(run.tokens, sampler.time_of(run)))`` until ``run.over``.

    Raises:
        FewstepError: fewer than one token a call, or a negative mask token.
    """

    mask_token: int
    tokens_per_call: int = 1
    """Parallel decoding: so many tokens are drawn from one call's probabilities, as if independent given the rest."""
    extrapolate: bool = False
    """Second order in parallel decoding: a token that is revealed at level m gets p_1 + (m - m_1) (p_1 - p_2)/(m_1 - m_2),
    with p_1, p_2 the probabilities of the last two calls at levels m_1 < m_2, cut off at 0 and normalised. The paper
    proposes interpolation of past outputs; cutting off is what keeps this a distribution."""
    time: Callable[[Tensor], Tensor] = linear_time
    """What the network is told where the share m is masked; one that needs no time may ignore it."""

    def __post_init__(self) -> None:
        if self.tokens_per_call < 1 or self.mask_token < 0:
            raise FewstepError(
                "first-hitting sampling needs a mask token of at least 0 and at least one token a call, got "
                f"mask_token={self.mask_token}, tokens_per_call={self.tokens_per_call}"
            )

    def calls(self, masked: int) -> int:
        """Network calls of a run whose longest sample has so many masked tokens."""
        return math.ceil(masked / self.tokens_per_call)

    def start(self, tokens: Tensor, *, masked: float = 1.0, generator: Generators = None) -> Unmasking:
        """Draw when each token is revealed.

        Args:
            tokens: (batch, length) integers; ``mask_token`` where there is something to fill in, which may differ from
                sample to sample.
            masked: the level that the run starts from, in (0, 1].
            generator: one for all or one a sample.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise FewstepError(
                f"tokens are integers of shape (batch, length), got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if not 0 < masked <= 1:
            raise FewstepError(f"the masked share that a run starts from lies above 0 and up to 1, got {masked}")
        hidden = tokens == self.mask_token
        levels = torch.where(hidden, masked * _uniform(tokens.shape, tokens.device, generator), -1.0)
        levels, order = levels.sort(dim=1, descending=True)
        return Unmasking(tokens.long().clone(), order, levels, hidden.sum(1), generator)

    def time_of(self, run: Unmasking) -> Tensor:
        """(batch,) float64: what the network is told at the next call."""
        return self.time(self._level(run))

    def step(self, run: Unmasking, logits: Tensor) -> Tensor:
        """Reveal the next tokens.

        Args:
            logits: (batch, length, vocabulary), the network's at ``run.tokens``; that of the mask token is not used.

        Returns:
            The new ``run.tokens``. Probabilities and draws are float64: in float32 the smallest uniform numbers are missing,
            which lowers the effective temperature (section 5 of the paper).

        Raises:
            FewstepError: a run that is over, or logits of another shape.
        """
        if run.over:
            raise FewstepError("this run is over: every token is revealed; start a new one")
        if logits.ndim != 3 or logits.shape[:2] != run.tokens.shape:
            raise FewstepError(
                f"logits are of shape (batch, length, vocabulary) = ({', '.join(map(str, run.tokens.shape))}, ...), "
                f"got {tuple(logits.shape)}"
            )
        ranks = slice(run.revealed, run.revealed + self.tokens_per_call)
        at, levels = run.order[:, ranks], run.levels[:, ranks]
        every = logits if self.extrapolate else _rows(logits, at)
        p = self._probabilities(every)
        if self.extrapolate:
            now, whole = self._level(run), p
            p = _rows(whole, at)
            if run.before is not None:
                level, older = run.before
                p = _extrapolated(p, _rows(older, at), now, level, levels)
            run.before = (now, whole)
        drawn = _categorical(p, run.generator)
        due = levels >= 0  # samples with fewer masked tokens are done earlier
        run.tokens = run.tokens.scatter(1, at, torch.where(due, drawn, run.tokens.gather(1, at)))
        run.revealed += self.tokens_per_call
        return run.tokens

    def sample(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        tokens: Tensor,
        *,
        masked: float = 1.0,
        generator: Generators = None,
    ) -> Tensor:
        """Fill in the masked tokens: :meth:`start`, then ``model(tokens, time) -> logits`` and :meth:`step` until done.

        ``calls(n)`` network calls for n masked tokens in the sample that has most. Arguments as in :meth:`start`.
        """
        run = self.start(tokens, masked=masked, generator=generator)
        while not run.over:
            self.step(run, model(run.tokens, self.time_of(run)))
        return run.tokens

    def _level(self, run: Unmasking) -> Tensor:
        """The level at which the next token is revealed; that of the last one for samples that are done."""
        last = (run.counts - 1).clamp(min=0)
        return run.levels.gather(1, last.clamp(max=run.revealed)[:, None])[:, 0].clamp(min=0)

    def _probabilities(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        if self.mask_token < logits.shape[-1]:
            logits = logits.index_fill(-1, torch.tensor(self.mask_token, device=logits.device), -math.inf)
        return torch.softmax(logits, -1)


def _rows(values: Tensor, at: Tensor) -> Tensor:
    """(batch, k, vocabulary) of (batch, length, vocabulary) at positions (batch, k)."""
    return values.gather(1, at[..., None].expand(-1, -1, values.shape[-1]))


def _extrapolated(p: Tensor, older: Tensor, now: Tensor, before: Tensor, levels: Tensor) -> Tensor:
    gap = (now - before)[:, None]
    weight = torch.where(gap != 0, (levels - now[:, None]) / gap, torch.zeros_like(levels))[..., None]
    p = (p + weight * (p - older)).clamp(min=0)
    return p / p.sum(-1, keepdim=True)


def _categorical(p: Tensor, generator: Generators) -> Tensor:
    """A draw from each of the distributions (batch, k, vocabulary): the winner of a race of exponential clocks."""
    return (p / -torch.log(_uniform(p.shape, p.device, generator))).argmax(-1)


def _uniform(shape: Sequence[int], device: torch.device, generator: Generators) -> Tensor:
    """float64 uniform on (0, 1]; sample i from generator i when a list is given."""
    if generator is not None and not isinstance(generator, torch.Generator):
        return torch.cat([_uniform((1, *shape[1:]), device, g) for g in one_each(generator, shape[0])])
    home = device if generator is None else generator.device
    return (1 - torch.rand(*shape, generator=generator, device=home, dtype=torch.float64)).to(device)
