"""Is a reference converged enough for what is measured against it?"""

from __future__ import annotations

from fewstep.errors import FewstepError
from fewstep.eval.pairs.samples import Samples
from fewstep.eval.statistics.directions import lower_is_better

ENOUGH = 10.0


def check_reference(error: Samples, effect: Samples, enough: float = ENOUGH) -> float:
    """How many times the effect that was measured exceeds the error of the reference it was measured against.

        mean effect / mean error

    A reference solved in N steps is off by about its distance to that solved in 2N. Distances smaller than some times
    this say as much about the reference as about what is compared with it.

    Args:
        error: distances of the reference in N steps to the reference in 2N, by seed (``latent_rmse``, ``lpips``).
        effect: distances of the images in question to the reference in N steps, by the same metric and seeds.
        enough: the least ratio that is accepted.

    Returns:
        The ratio; infinite for a reference without error.

    Raises:
        FewstepError: where the ratio is less than ``enough``; for two metrics, other seeds, or a metric that is no distance.

    Example:
        >>> against = dict(seeds=seeds, latents=(at_100, at_200))
        >>> error = eval.fidelity(images_at_100, images_at_200, **against)["latent_rmse"]
        >>> eval.check_reference(error, measured["latent_rmse"])
    """
    if error.metric != effect.metric or not lower_is_better(error.metric):
        raise FewstepError(
            f"{error.metric} and {effect.metric} are given; give one distance, such as latent_rmse, twice"
        )
    if error.ids != effect.ids:
        raise FewstepError("error and effect are of other seeds; measure both on the same")
    ratio = effect.mean / error.mean if error.mean else float("inf")
    if not ratio >= enough:
        raise FewstepError(
            f"the {effect.metric} of {effect.mean:.3g} is only {ratio:.3g} times the reference's own error of "
            f"{error.mean:.3g}; it takes {enough:g} times: solve the reference in more steps"
        )
    return ratio
