"""The metrics of a sweep: each starts a stream, all streams share one pass over a cell's images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.eval import fingerprint
from fewstep.eval.alignment import AccuracyStream, Clip, ClipLike, ClipStream, load_clip
from fewstep.eval.distribution import FidStream, reference_moments
from fewstep.eval.features import FeatureNet, feature_net
from fewstep.eval.images import Images
from fewstep.eval.moments import Moments
from fewstep.eval.score import Score


class Stream(Protocol):
    """Takes uint8 images (n, C, H, W) with their prompts, batch by batch, and then gives a score."""

    def update(self, images: Tensor, prompts: Sequence[str]) -> None: ...

    def score(self) -> Score: ...


class Metric(Protocol):
    """A column of a sweep.

    Attributes:
        name: the column.
        identity: what its values depend on beside the images; a changed one has cached scores made again.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def start(self) -> Stream: ...


class Fid:
    """FID against a reference; arguments as in :func:`~fewstep.eval.distribution.fid`."""

    name = "fid"

    def __init__(
        self,
        reference: str | Moments | Images = "fashion-test",
        features: str | nn.Module | FeatureNet = "fashion",
        batch_size: int = 250,
    ) -> None:
        self._net = feature_net(features)
        self._reference = reference_moments(reference, self._net, batch_size)
        self.identity = f"{self._net.sha256}|{self._reference.fingerprint}"

    def start(self) -> Stream:
        return FidStream(self._reference, self._net)


class ClipScore:
    """CLIP score; the argument as in :func:`~fewstep.eval.alignment.clip_score`."""

    name = "clip_score"

    def __init__(self, model: ClipLike = "fashion") -> None:
        self._clip: Clip = load_clip(model)
        self.identity = self._clip.sha256

    def start(self) -> Stream:
        return ClipStream(self._clip)


class Accuracy:
    """Share of images in which a classifier sees the prompted class, percent.

    Args:
        classifier: has ``logits(images)``; the fashion classifier where left out.
        classes: names in the order of the logits.
    """

    name = "accuracy"

    def __init__(self, classifier: Any = None, classes: Sequence[str] = ()) -> None:
        self._title = "fashion"
        if classifier is None:
            from fewstep.pipelines import zoo

            classifier, classes = zoo.features(), zoo.CLASSES
        elif not classes:
            raise FewstepError("a classifier needs classes, the names in the order of its logits")
        else:
            self._title = type(classifier).__name__
        self._classifier, self._classes = classifier, tuple(classes)
        self.identity = f"{fingerprint.of_module(classifier)}|{'|'.join(self._classes)}"

    def start(self) -> Stream:
        return AccuracyStream(self._classifier, self._classes, self._title)


METRICS: dict[str, Callable[[], Metric]] = {"fid": Fid, "clip_score": ClipScore, "accuracy": Accuracy}


def make_metrics(metrics: Iterable[str | Metric]) -> tuple[Metric, ...]:
    """Metrics by name or as they are.

    Raises:
        FewstepError: for an unknown name, or two metrics of one name.
    """
    made: list[Metric] = []
    for metric in metrics:
        if isinstance(metric, str):
            if metric not in METRICS:
                raise FewstepError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
            metric = METRICS[metric]()
        made.append(metric)
    names = [metric.name for metric in made]
    for name in names:
        if names.count(name) > 1:
            raise FewstepError(f"metric {name!r} is given twice; give each once")
    return tuple(made)


@dataclass(frozen=True)
class Scores:
    """The scores of one cell by metric, and what was worth a warning while they were made."""

    scores: dict[str, Score]
    warnings: tuple[str, ...]


def measure(metrics: Iterable[Metric], batches: Iterable[tuple[Tensor, Sequence[str]]]) -> Scores:
    """All metrics in one pass over (images, prompts) batches."""
    streams = {metric.name: metric.start() for metric in metrics}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for images, prompts in batches:
            for stream in streams.values():
                stream.update(images, prompts)
        scores = {name: stream.score() for name, stream in streams.items()}
    said = tuple(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    return Scores(scores, said)
