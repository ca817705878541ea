"""Which way is better, by metric name."""

from __future__ import annotations

from fewstep.errors import FewstepError

LOWER = frozenset(
    (
        # of a set against another
        *("fid", "fid_inf", "sfid", "fd", "fd_inf", "fd_dinov2", "kid", "mmd", "cmmd", "sliced_wasserstein"),
        # of an image against another
        *("latent_rmse", "mse", "lpips", "feature_distance"),
        # costs
        *("calls", "nfe_per_image", "effective_nfe_per_image", "macs_per_image", "seconds_per_image"),
    )
)
HIGHER = frozenset(
    (
        *("inception_score", "precision", "recall", "density", "coverage"),
        *("psnr", "ssim"),
        *("clip_score", "clip_iqa", "image_reward", "accuracy"),
    )
)


WORST = "_worst"
"""Behind a metric's name: its value at the worst image."""


def lower_is_better(metric: str) -> bool:
    """Whether less of ``metric`` is better.

    Args:
        metric: its name; of ``fid:dinov2`` and of a recipe ``fid[fashion, ...]`` the name is what stands in front, and
            ``psnr_worst`` goes the way of ``psnr``.

    Raises:
        FewstepError: for a metric that is not known.
    """
    name = metric.partition("[")[0].partition(":")[0].removesuffix(WORST)
    if name in LOWER:
        return True
    if name in HIGHER:
        return False
    raise FewstepError(f"it is not known whether less {name!r} is better; say so with lower_is_better=True or False")
