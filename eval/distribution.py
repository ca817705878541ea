"""Is the set of images still good: metrics of two distributions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.eval.features import FeatureNet, feature_net
from fewstep.eval.frechet import frechet_distance
from fewstep.eval.images import ROUNDING, Images, batches
from fewstep.eval.moments import Moments
from fewstep.eval.score import Score, recipe


def _fashion_test() -> Moments:
    from fewstep.pipelines import zoo

    return zoo.reference_moments()


REFERENCES: dict[str, Callable[[], Moments]] = {"fashion-test": _fashion_test}


def image_moments(images: Images, features: str | nn.Module | FeatureNet = "fashion", batch_size: int = 250) -> Moments:
    """The moments of the features of ``images``, streamed: no more than one batch of features is held.

    Raises:
        FewstepError: for images or a net that :func:`~fewstep.eval.images.batches` or
            :func:`~fewstep.eval.features.feature_net` refuse, and for no images.
    """
    net = feature_net(features)
    moments: Moments | None = None
    for batch in batches(images, batch_size):
        moments = _add(moments, net, batch)
    if moments is None:
        raise FewstepError("there are no images")
    return moments


def moments_recipe(net: FeatureNet) -> dict[str, str | int]:
    """What must agree between two sets of moments before a distance between them means anything."""
    return {"net": net.name, "net_sha256": net.sha256, "rounding": ROUNDING}


def _add(moments: Moments | None, net: FeatureNet, batch: Tensor) -> Moments:
    features = net(batch)
    if moments is None:
        moments = Moments(features.shape[1], moments_recipe(net))
    moments.update(features)
    return moments


def reference_moments(reference: str | Moments | Images, net: FeatureNet, batch_size: int = 250) -> Moments:
    """The reference's moments under ``net``: loaded by name, as given, or computed from images.

    Raises:
        FewstepError: for an unknown name, or moments that another net or another rounding made.
    """
    if isinstance(reference, str):
        if reference not in REFERENCES:
            raise FewstepError(f"unknown reference {reference!r}; known: {sorted(REFERENCES)}, or images or Moments")
        moments = REFERENCES[reference]()
    elif isinstance(reference, Moments):
        moments = reference
    else:
        return image_moments(reference, net, batch_size)
    wanted = moments_recipe(net)
    for key in ("net_sha256", "rounding"):  # a net may go by two names, its weights not
        if moments.recipe.get(key, wanted[key]) != wanted[key]:
            raise FewstepError(
                f"the reference was made with {_said(moments.recipe)}, the images would be with {_said(wanted)}"
            )
    return moments


def _said(recipe: Mapping[str, str | int]) -> str:
    return f"{recipe.get('net')} ({str(recipe.get('net_sha256'))[:8]}, {recipe.get('rounding')})"


class FidStream:
    """FID of images that come batch by batch.

    Args:
        reference: moments of the reference set under ``net``.
        net: the feature net.
    """

    def __init__(self, reference: Moments, net: FeatureNet) -> None:
        self._reference = reference
        self._net = net
        self._moments: Moments | None = None

    def update(self, images: Tensor, prompts: object = None) -> None:
        """Add uint8 images (n, C, H, W); prompts play no part in this metric."""
        self._moments = _add(self._moments, self._net, images)

    def score(self) -> Score:
        """The FID so far.

        Raises:
            FewstepError: for fewer than 2 images, or features of another dimension than the reference's.
        """
        count = self._moments.count if self._moments is not None else 0
        if self._moments is None or count < 2:
            raise FewstepError(f"FID needs at least 2 images; there are {count}")
        if count < self._moments.dim:
            warnings.warn(
                f"FID of {count} images with {self._moments.dim} features: the covariance is rank deficient and the "
                "value is far above that of many images; compare it only with values of the same N",
                stacklevel=3,
            )
        value = frechet_distance(self._moments, self._reference)
        made = recipe("fid", self._net.name, ROUNDING, f"N={count}", f"ref=sha256:{self._reference.fingerprint[:8]}")
        return Score(value, made, count)


def fid(
    images: Images,
    reference: str | Moments | Images = "fashion-test",
    features: str | nn.Module | FeatureNet = "fashion",
    batch_size: int = 250,
) -> Score:
    """Fréchet distance between the features of ``images`` and those of a reference set ("FID").

    The moments of the features are streamed in float64; see :func:`~fewstep.eval.frechet.frechet_distance`.
    With the Inception net of the literature this is the Fréchet Inception Distance; with any other net the number has
    the same meaning but another scale, hence the net's name in the recipe. The bias is about c / N, with c depending on
    the model: values of different N are not comparable.

    Args:
        images: uint8 or float [0, 1] images in any form that :func:`~fewstep.eval.images.batches` takes; streamed.
        reference: ``"fashion-test"`` (the 10,000 test images of Fashion-MNIST), :class:`Moments`, or images.
        features: ``"fashion"`` or a module from float32 images in [0, 1] (n, C, H, W) to features (n, d).
        batch_size: images in one pass of the net.

    Returns:
        The value (squared distance, >= 0) and its recipe, such as
        ``fid[fashion, u8=round, N=500, ref=sha256:abcd1234]``.

    Raises:
        FewstepError: for bad images, NaN, N < 2, an unknown net or reference, or a reference made by another net.

    Warns:
        UserWarning: where N is below the dimension of the features.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        arXiv:1706.08500, eq. 6.
    """
    net = feature_net(features)
    stream = FidStream(reference_moments(reference, net, batch_size), net)
    for batch in batches(images, batch_size):
        stream.update(batch)
    return stream.score()
