"""T-Stitch: a trajectory whose first steps a small model takes, and a large one the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.caching.clock import Clock
from fewstep.errors import FewstepError


class StitchedDenoiser(nn.Module):
    """Several denoisers of one latent space, each for a share of the steps; takes a denoiser's place in a pipeline.

    Models of one latent space and noise process agree while there is much noise, so the small one's first steps are free.
    Nothing but the sample goes from one to the next. What is asked of the module (``config``, ``dtype``, ``add_embedding``)
    the last model answers, so all have to take the same arguments and predict the same thing.

    T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching, arXiv 2402.14167. Step i of n
    is taken by the first model whose share, added to those before it, is more than i / n.

    Args:
        parts: pairs of a model and its share of the steps; the shares add up to 1.
        num_inference_steps: number of steps, needed only where timesteps are no elements of a scheduler's list.

    Raises:
        FewstepError: for shares that are negative or do not add up to 1, or models that predict for other samples.

    Example:
        >>> pipe.unet = pipelines.StitchedDenoiser([(small_unet, 0.4), (pipe.unet, 0.6)])
    """

    def __init__(self, parts: Sequence[tuple[nn.Module, float]], *, num_inference_steps: int | None = None) -> None:
        super().__init__()
        if not parts or any(share < 0 for _, share in parts) or abs(sum(share for _, share in parts) - 1) > 1e-6:
            raise FewstepError(f"shares are {[share for _, share in parts]}; give shares of the steps that add up to 1")
        _check_alike([model for model, _ in parts])
        self.models = nn.ModuleList(model for model, _ in parts)
        self.shares = tuple(float(share) for _, share in parts)
        self.num_inference_steps = num_inference_steps
        self._clock = Clock()

    def forward(self, sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """The output of the model whose step it is."""
        tick = self._clock.tick("all", timestep, None, self.num_inference_steps)
        total = self.num_inference_steps or tick.total
        if total is None:
            raise FewstepError("the timesteps do not tell the number of steps; give num_inference_steps=")
        return self.models[self.active(tick.step, total)](sample, timestep, *args, **kwargs)

    def active(self, step: int, steps: int) -> int:
        """Index of the model that takes a step."""
        reached = 0.0
        for index, share in enumerate(self.shares):
            reached += share
            if step < reached * steps - 1e-9:
                return index
        return len(self.shares) - 1

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            models = self.__dict__.get("_modules", {}).get("models")
            if models is None:
                raise
            return getattr(models[-1], name)


def _check_alike(models: Sequence[nn.Module]) -> None:
    for key in ("in_channels", "out_channels", "prediction_type"):
        values = {getattr(getattr(model, "config", None), key, None) for model in models}
        if len(values) > 1:
            raise FewstepError(
                f"the models differ in {key}: {sorted(map(str, values))}; stitched ones share a latent space"
            )
