"""The verbs: carry a recipe out on a pipeline, and take all of it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    undo: list[Callable[[], object]] = field(default_factory=list, repr=False)
    """How to take it back, in the order in which it was done."""


def apply_(pipe: Any, recipe: Recipe | str | Path) -> Applied:
    """Change a pipeline's scheduler, denoiser and cache as a recipe says: all of it, or on an error nothing.

    Call it as ``pipe(prompt, **recipe.call)`` then; :func:`remove_` takes everything back.

    Args:
        recipe: the recipe, or the path of its JSON file.

    Raises:
        FewstepError: the pipeline has a recipe, a cache or quantised layers already, or a part is for another model, noise
            schedule or number of steps.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if RECORD in vars(pipe):
        raise FewstepError("the pipeline has a recipe already; pipelines.remove_(pipe) first")
    done = Applied(recipe)
    try:
        if recipe.sampler is not None:
            _sample(pipe, recipe.sampler, done)
        if recipe.quant is not None:
            _quantize(pipe, recipe, done)
        if recipe.cache is not None:
            _cache(pipe, recipe, done)
    except BaseException:
        _take_back(done)
        raise
    vars(pipe)[RECORD] = done
    return done


def remove_(pipe: Any) -> None:
    """Take a recipe back: scheduler, weights and outputs are bit for bit what they were before.

    Raises:
        FewstepError: where there is none.
    """
    done: Applied | None = vars(pipe).pop(RECORD, None)
    if done is None:
        raise FewstepError(f"{type(pipe).__name__} has no recipe to remove")
    _take_back(done)


@contextmanager
def applied(pipe: Any, recipe: Recipe | str | Path) -> Iterator[Applied]:
    """:func:`apply_` for a block.

    Example:
        >>> with pipelines.applied(pipe, "recipe.json") as done:
        ...     images = pipe("a dress", **done.recipe.call).images
    """
    done = apply_(pipe, recipe)
    try:
        yield done
    finally:
        remove_(pipe)


def _take_back(done: Applied) -> None:
    while done.undo:
        done.undo.pop()()


def _sample(pipe: Any, sampler: SolverPlan | str, done: Applied) -> None:
    from fewstep.eval.drawing.scheduling import scheduler_for
    from fewstep.samplers.learn import use_

    before = pipe.scheduler
    done.undo.append(lambda: setattr(pipe, "scheduler", before))
    if isinstance(sampler, SolverPlan):
        use_(pipe, sampler)
    else:
        pipe.scheduler = scheduler_for(sampler, before.config)


def _quantize(pipe: Any, recipe: Recipe, done: Applied) -> None:
    from fewstep import quant

    assert recipe.quant is not None
    network = denoiser(pipe)
    done.quant = quant.quantize_(network, recipe.quant)
    done.undo.append(lambda: quant.dequantize_(network))


def _cache(pipe: Any, recipe: Recipe, done: Applied) -> None:
    from fewstep import caching

    assert recipe.cache is not None
    done.cache = caching.apply_(pipe, recipe.cache, num_inference_steps=recipe.steps)
    done.undo.append(lambda: caching.remove_(pipe))


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
