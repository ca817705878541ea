"""The verbs: carry a recipe out on a pipeline, and take all of it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fewstep.errors import FewstepError
from fewstep.pipelines.recipes.recipe import Recipe
from fewstep.samplers import SolverPlan

if TYPE_CHECKING:
    from fewstep.caching.controller import Controller
    from fewstep.quant import QuantReport

RECORD = "_fewstep_recipe"


@dataclass
class Applied:
    """What a recipe did to a pipeline.

    Attributes:
        recipe: the recipe.
        cache: the controller of its cache, which reports what was reused; None without one.
        quant: what quantising found; None where nothing is quantised.
    """

    recipe: Recipe
    cache: Controller | None = None
    quant: QuantReport | None = None
    before: Any = field(default=None, repr=False)
    """The pipeline's scheduler before; None where the recipe has none."""
    network: nn.Module | None = field(default=None, repr=False)
    """What was quantised."""


def apply_(pipe: Any, recipe: Recipe | str | Path, *, other_model: bool = False) -> Applied:
    """Change a pipeline's scheduler, denoiser and cache as a recipe says: all of it, or on an error nothing.

    Call it as ``pipe(prompt, **recipe.call)`` then; :func:`remove_` takes everything back.

    Args:
        recipe: the recipe, or the path of its JSON file.
        other_model: take a sampler that was learned with other weights, or with these in another precision, and be warned.

    Raises:
        FewstepError: what is no pipeline, one that has a recipe, a cache or quantised layers already, or a part that is for
            another model, noise schedule or number of steps.
    """
    recipe = recipe if isinstance(recipe, Recipe) else _loaded(recipe)
    if getattr(pipe, "scheduler", None) is None:
        raise FewstepError(f"a {type(pipe).__name__} has no scheduler; recipes are for diffusers pipelines")
    if RECORD in vars(pipe):
        raise FewstepError("the pipeline has a recipe already; pipelines.remove_(pipe) first")
    done = Applied(recipe)
    try:
        if recipe.sampler is not None:
            done.before = pipe.scheduler
            _sample(pipe, recipe.sampler, other_model)
        if recipe.quant is not None:
            from fewstep import quant

            network = denoiser(pipe)
            done.quant, done.network = quant.quantize_(network, recipe.quant), network
        if recipe.cache is not None:
            from fewstep import caching

            done.cache = caching.apply_(pipe, recipe.cache, num_inference_steps=recipe.cache.steps)
    except BaseException:
        _take_back(pipe, done)
        raise
    vars(pipe)[RECORD] = done
    return done


def remove_(pipe: Any) -> None:
    """Take a recipe back: scheduler, weights and outputs are bit for bit what they were before.

    A part that was taken back by hand already is left out.

    Raises:
        FewstepError: where there is none.
    """
    done: Applied | None = vars(pipe).pop(RECORD, None)
    if done is None:
        raise FewstepError(f"{type(pipe).__name__} has no recipe to remove")
    _take_back(pipe, done)


@contextmanager
def applied(pipe: Any, recipe: Recipe | str | Path, *, other_model: bool = False) -> Iterator[Applied]:
    """:func:`apply_` for a block.

    Example:
        >>> with pipelines.applied(pipe, "recipe.json") as done:
        ...     images = pipe("a dress", **done.recipe.call).images
    """
    done = apply_(pipe, recipe, other_model=other_model)
    try:
        yield done
    finally:
        if vars(pipe).get(RECORD) is done:
            remove_(pipe)


def _take_back(pipe: Any, done: Applied) -> None:
    from fewstep import quant

    for cache in done.cache.caches if done.cache is not None else ():
        cache.remove()
    if done.network is not None and done.quant is not None and quant.plan_of(done.network) is done.quant.plan:
        quant.dequantize_(done.network)
    if done.before is not None:
        pipe.scheduler = done.before


def _loaded(path: Any) -> Recipe:
    if not isinstance(path, str | Path):
        raise FewstepError(f"recipe is of type {type(path).__name__}; give a Recipe, or the path of its JSON file")
    return Recipe.load(path)


def _sample(pipe: Any, sampler: SolverPlan | str, other_model: bool) -> None:
    from fewstep.eval.drawing.scheduling import scheduler_for
    from fewstep.samplers.learn import use_

    if isinstance(sampler, SolverPlan):
        use_(pipe, sampler, other_model=other_model)
    else:
        pipe.scheduler = scheduler_for(sampler, pipe.scheduler.config)


def denoiser(pipe: Any) -> nn.Module:
    """The one network that a recipe's cache and formats are for.

    Raises:
        FewstepError: none, or several.
    """
    from fewstep.eval.costs.calls import denoisers

    found = denoisers(pipe)
    if len(found) != 1:
        raise FewstepError(f"{type(pipe).__name__} has {len(found)} denoisers; a recipe is for pipelines with one")
    return found[0]
