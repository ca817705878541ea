"""Fine-tuning for early exit: the head learns to read the features of the blocks before the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fewstep.caching.actions import Action
from fewstep.caching.controller import applied
from fewstep.caching.families import Family, family_of
from fewstep.caching.method import Decider, Entry, Method
from fewstep.caching.methods.early_exit import EarlyExit
from fewstep.caching.methods.online import positive
from fewstep.caching.plan import CachePlan
from fewstep.caching.profiling import pipeline_runs
from fewstep.errors import FewstepError

FROZEN = ("timestep_embedder", "time_embed", "time_proj", "adaln_single.emb")
"""Parts of parameters' names: what embeds the time stays as it is, as in the paper."""


def train_early_exit_(
    pipe: Any,
    method: EarlyExit,
    prompts: Sequence[str] | None = None,
    *,
    num_inference_steps: int,
    iterations: int = 1000,
    learning_rate: float = 1e-5,
    guidance_scale: float | None = None,
    samples: int = 64,
    seed: int = 20_000,
    batch: int = 8,
    call: Mapping[str, Any] | None = None,
) -> list[float]:
    """Fine-tune a pipeline's network, in place, so that its early exits predict what the whole network did.

        minimise over the weights  mean |F_exit(t)(x_t, t, c) - F_full(x_t, t, c)|^2

    on the samples x_t of uncached trajectories, steps drawn evenly; steps whose exit is behind the last block hold the whole
    network where it was. The paper trains on data with the usual loss instead; this needs none. AdamW without decay.
    A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models, arXiv 2408.05927.

    Args:
        pipe: a diffusers pipeline with one network. Its weights change.
        method: which blocks run when; ``refresh`` must be None.
        prompts: drawn in turn.
        num_inference_steps: steps of the trajectories.
        iterations: updates, each on one call of the network (``batch`` samples, twice as many with guidance).
        learning_rate: of AdamW.
        guidance_scale, seed, call: as of :func:`fewstep.caching.profile`.
        samples: trajectories, whose calls are all held in memory.
        batch: samples at once.

    Returns:
        the loss of every iteration, relative to the mean square of the full network's output.

    Raises:
        FewstepError: for a pipeline with several networks, or one that has a cache.
    """
    from fewstep.eval.costs.calls import denoisers

    if method.refresh is not None:
        raise FewstepError(
            "early exits with a refresh reuse residuals and are not trained; give EarlyExit without refresh"
        )
    positive(learning_rate, "learning_rate")
    models = denoisers(pipe)
    if len(models) != 1:
        raise FewstepError(f"{type(pipe).__name__} has {len(models)} networks; train the exits of each by itself")
    (model,) = models
    runs = pipeline_runs(pipe, prompts, samples, num_inference_steps, guidance_scale, seed, batch, call)
    with _Calls(model) as calls:
        for begin in range(0, samples, batch):
            calls.start()
            runs.batch_latents(begin)
    times = getattr(pipe.scheduler, "timesteps", None)
    known = tuple(map(float, times.tolist())) if isinstance(times, Tensor) and len(times) == calls.steps else None
    at_step = _AtStep(method.at_times(known).compile(family_of(model), calls.steps), [0])
    trained = [p for name, p in model.named_parameters() if not any(part in name for part in FROZEN)]
    before = [p.requires_grad for p in model.parameters()]
    generator = np.random.default_rng(seed)
    losses = []
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        with applied(model, at_step), torch.enable_grad():
            for _ in range(iterations):
                seen = calls.seen[int(generator.integers(len(calls.seen)))]
                at_step.now[0] = seen.step
                difference = _output(model(*seen.args, **seen.kwargs)).float() - seen.output.float()
                loss = difference.square().mean() / seen.output.float().square().mean()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                losses.append(float(loss.detach()))
    finally:
        for parameter, needed in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(needed)
            parameter.grad = None
    return losses


@dataclass(frozen=True)
class _AtStep(Method):
    """Follows a plan at a step that is said from outside: training takes the steps in any order."""

    online: ClassVar[bool] = True
    plan: CachePlan
    now: list[int]

    def sites(self, family: Family) -> list[str]:
        return list(self.plan.sites)

    def decider(self, family: Family, steps: int | None) -> Decider:
        return _Told(self)


class _Told:
    def __init__(self, method: _AtStep) -> None:
        self.method = method

    def __call__(self, entry: Entry) -> Action:
        return Action(int(self.method.plan.actions[self.method.now[0], entry.site]))

    def keeps(self, step: int, site: int) -> bool:
        return False


@dataclass(frozen=True)
class _Seen:
    step: int
    args: Any
    kwargs: Any
    output: Tensor


class _Calls:
    """Records the calls of a network, and which of a trajectory each is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: list[_Seen] = []
        self.step = 0

    @property
    def steps(self) -> int:
        return 1 + max((seen.step for seen in self.seen), default=-1)

    def start(self) -> None:
        """A trajectory begins."""
        self.step = 0

    def __enter__(self) -> _Calls:
        self._handle = self.model.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *raised: object) -> None:
        self._handle.remove()

    def _record(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        def kept(value: Any) -> Any:
            return value.detach().clone() if isinstance(value, Tensor) else value

        self.seen.append(_Seen(self.step, tree_map(kept, args), tree_map(kept, kwargs), kept(_output(out))))
        self.step += 1


def _output(out: Any) -> Tensor:
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first
