"""One pass over images for several metrics: a net that many of them use runs once a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.eval.distribution.feature_cache import FeatureCache
from fewstep.eval.distribution.feature_set import FeatureSet
from fewstep.eval.distribution.features import FeatureNet, Output
from fewstep.eval.distribution.moments import Moments
from fewstep.eval.images import ROUNDING


@dataclass(frozen=True)
class Need:
    """What a metric wants to know of a set of images.

    Attributes:
        net: the feature net.
        output: which of its outputs.
        whole: all features; without it their moments are enough, and no more than one batch is held.
    """

    net: FeatureNet
    output: Output = "features"
    whole: bool = False


def features_recipe(net: FeatureNet, output: Output = "features") -> dict[str, str | int]:
    """What must agree between two sets of features before a distance between them means anything."""
    recipe: dict[str, str | int] = {"net": net.name, "net_sha256": net.sha256, "rounding": ROUNDING}
    if net.resize:
        recipe["resize"] = net.resize
    return recipe if output == "features" else recipe | {"output": output}


@dataclass
class Collected:
    """One output of one net over all images so far: moments, features, or both; and the images' prompts, where given."""

    net: FeatureNet
    output: Output
    wants_moments: bool = False
    wants_features: bool = False
    count: int = 0
    prompts: list[str] = field(default_factory=list)
    _moments: Moments | None = None
    _batches: list[Tensor] = field(default_factory=list)

    def update(self, values: Tensor, prompts: Sequence[str] = ()) -> None:
        """Add the outputs (n, d) of a batch."""
        self.count += len(values)
        self.prompts += prompts
        if self.wants_moments:
            if self._moments is None:
                self._moments = Moments(values.shape[1], self.recipe)
            self._moments.update(values)
        if self.wants_features:
            self._batches.append(values)

    @property
    def recipe(self) -> dict[str, str | int]:
        return features_recipe(self.net, self.output)

    @property
    def moments(self) -> Moments:
        """Raises FewstepError where there were no images."""
        if self._moments is None:
            raise FewstepError("there are no images")
        return self._moments

    @property
    def features(self) -> FeatureSet:
        """Raises FewstepError where there were no images, or where features are not finite."""
        if not self._batches:
            raise FewstepError("there are no images")
        if len(self._batches) > 1:
            self._batches = [torch.cat(self._batches)]
        return FeatureSet(self._batches[0], self.recipe)


class Pass:
    """Feeds batches of images through every net once and keeps what the needs ask for.

    Args:
        needs: of all metrics together.
        cache: where features of batches seen before are kept; none where left out.
    """

    def __init__(self, needs: Iterable[Need], cache: FeatureCache | None = None) -> None:
        self._cache = cache
        self._collected: dict[tuple[str, Output], Collected] = {}
        self._nets: dict[str, FeatureNet] = {}
        for need in needs:
            need.net.require(need.output)
            net = self._nets.setdefault(_identity(need.net), need.net)
            kept = self._collected.setdefault((_identity(net), need.output), Collected(net, need.output))
            kept.wants_features |= need.whole
            kept.wants_moments |= not need.whole

    def update(self, images: Tensor, prompts: Sequence[str] = ()) -> None:
        """Add uint8 images (n, C, H, W), and for metrics that ask for them their prompts."""
        for key, net in self._nets.items():
            wanted: list[Output] = [output for owner, output in self._collected if owner == key]
            outputs = net.outputs(images, wanted) if self._cache is None else self._cache.outputs(net, images, wanted)
            for output in wanted:
                self._collected[key, output].update(outputs[output], prompts)

    def collected(self, need: Need) -> Collected:
        """What was kept for ``need``, one of those that the pass was made for."""
        return self._collected[_identity(need.net), need.output]


def _identity(net: FeatureNet) -> str:
    return f"{net.sha256}|{net.resize}"
