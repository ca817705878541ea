"""The metrics of a sweep: each starts a stream, all streams share one pass over a cell's images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from fewstep.errors import FewstepError, unknown
from fewstep.eval import fingerprint
from fewstep.eval.alignment import (
    AccuracyStream,
    Clip,
    ClipLike,
    ClipStream,
    accuracy,
    clip_definition,
    hits,
    load_clip,
)
from fewstep.eval.distribution.collect import Collected, Need, Pass
from fewstep.eval.distribution.feature_cache import FeatureCache
from fewstep.eval.distribution.feature_metrics import (
    Cmmd,
    Fid,
    FidInfinity,
    InceptionScore,
    Kid,
    Prdc,
    Sfid,
    SlicedWasserstein,
)
from fewstep.eval.distribution.features import feature_net
from fewstep.eval.distribution.reference import ReferenceLike, resolved
from fewstep.eval.images import Images, batches
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


class ClipScore:
    """CLIP score; arguments as in :func:`~fewstep.eval.alignment.clip_score`.

    Args:
        model: as there.
        definition: as there.
        name: the column; give one where both definitions are measured.
    """

    def __init__(
        self, model: ClipLike = "fashion", definition: str = "torchmetrics", *, name: str = "clip_score"
    ) -> None:
        said = clip_definition(definition).recipe
        self._definition = definition
        self._clip: Clip = load_clip(model)
        self.name = name
        self.identity = f"{self._clip.sha256}|{said}"

    def start(self) -> Stream:
        return ClipStream(self._clip, self._definition)


class Accuracy:
    """Share of images in which a classifier sees the prompted class, percent.

    The fashion classifier is the feature net of that name: where another metric uses it too, it runs once.

    Args:
        classifier: has ``logits(images)``; the fashion classifier where left out.
        classes: names in the order of the logits.
    """

    name = "accuracy"

    def __init__(self, classifier: Any = None, classes: Sequence[str] = ()) -> None:
        self.need: Need | None = None
        if classifier is None:
            from fewstep.pipelines import zoo

            net = feature_net("fashion")
            classifier, classes, self._title = net.module, zoo.CLASSES, net.name
            self.need = Need(net, "logits", whole=True)
        elif not classes:
            raise FewstepError("a classifier needs classes, the names in the order of its logits")
        else:
            self._title = type(classifier).__name__
        self._classifier, self._classes = classifier, tuple(classes)
        self.identity = f"{fingerprint.of_module(classifier)}|{'|'.join(self._classes)}"

    def score(self, collected: Collected) -> Score:
        """The score of what was collected for :attr:`need`."""
        return accuracy(hits(collected.features.values, collected.prompts, self._classes), self._title, self._classes)

    def start(self) -> Stream:
        return AccuracyStream(self._classifier, self._classes, self._title)


Referred: TypeAlias = type[Fid] | type[FidInfinity] | type[Kid] | type[Cmmd] | type[SlicedWasserstein] | type[Prdc]

REFERRED: dict[str, Referred] = {
    "fid": Fid,
    "fid_inf": FidInfinity,
    "sfid": Sfid,
    "kid": Kid,
    "cmmd": Cmmd,
    "sliced_wasserstein": SlicedWasserstein,
    "prdc": Prdc,
}
"""Metrics that compare features with those of a reference; all take (reference, features, batch_size, name=)."""

METRICS: dict[str, Callable[[], Metric]] = {"clip_score": ClipScore, "accuracy": Accuracy}
"""The others, that need more than a feature net."""

ALIASES = {"fd_dinov2": "fid:dinov2"}
"""Metrics that are known by a name of their own."""


def metric_names() -> tuple[str, ...]:
    """What :func:`make_metrics` knows by name."""
    return (*REFERRED, "inception_score", *METRICS, *ALIASES)


def make_metrics(metrics: Iterable[str | Metric | Prdc]) -> tuple[Metric, ...]:
    """Metrics by name or as they are.

    A name may say the feature net behind a colon, which then stands in the column's name too: ``"fid:imagenet-lite"``,
    ``"kid:dinov2"``. ``"prdc"`` makes four columns: precision, recall, density and coverage.

    Raises:
        FewstepError: for an unknown name, or two metrics of one name.
    """
    made: list[Metric] = []
    for metric in metrics:
        made += _by_name(metric) if isinstance(metric, str) else metric if isinstance(metric, Prdc) else [metric]
    return _distinct(made)


def _by_name(spec: str, reference: ReferenceLike | None = None, batch_size: int = 250) -> Iterable[Metric]:
    title, _, net = ALIASES.get(spec, spec).partition(":")
    if title in REFERRED:
        arguments: dict[str, Any] = {"name": spec, "batch_size": batch_size}
        if net:
            arguments["features"] = net
        if reference is not None:
            arguments["reference"] = reference
        found = REFERRED[title](**arguments)
        return found if isinstance(found, Prdc) else [found]
    if title == "inception_score":
        return [InceptionScore(net, name=spec) if net else InceptionScore()]
    if title in METRICS and not net:
        return [METRICS[title]()]
    raise FewstepError(unknown("metric", spec, metric_names()))


def _distinct(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise FewstepError(f"metric {name!r} is given twice; give each once")
    return tuple(metrics)


@dataclass(frozen=True)
class Scores:
    """The scores of one cell by metric, and what was worth a warning while they were made."""

    scores: dict[str, Score]
    warnings: tuple[str, ...]


def measure(
    metrics: Iterable[Metric],
    batches: Iterable[tuple[Tensor, Sequence[str]]],
    cache: str | Path | None = None,
) -> Scores:
    """All metrics in one pass over (images, prompts) batches; a feature net that several use runs once a batch.

    Args:
        metrics: as :func:`make_metrics` gives them.
        batches: uint8 images (n, C, H, W) and their n prompts.
        cache: folder for features, see :mod:`fewstep.eval.distribution.feature_cache`; none is kept where left out.
    """
    metrics = tuple(metrics)
    of_features: list[Any] = [metric for metric in metrics if getattr(metric, "need", None) is not None]
    streams = {metric.name: metric.start() for metric in metrics if metric not in of_features}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        shared = Pass([metric.need for metric in of_features], None if cache is None else FeatureCache(cache))
        for images, prompts in batches:
            shared.update(images, prompts)
            for stream in streams.values():
                stream.update(images, prompts)
        found = {metric.name: metric.score(shared.collected(metric.need)) for metric in of_features}
        found |= {name: stream.score() for name, stream in streams.items()}
    said = tuple(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    return Scores({metric.name: found[metric.name] for metric in metrics}, said)


def measure_images(
    images: Images,
    metrics: Iterable[str | Metric | Prdc],
    reference: ReferenceLike = "fashion-test",
    *,
    prompts: Sequence[str] = (),
    batch_size: int = 250,
    cache: str | Path | None = None,
) -> Scores:
    """Several metrics of one set of images, in one pass over them and one over the reference.

    Args:
        images: in any form that :func:`~fewstep.eval.images.batches` takes; streamed.
        metrics: names as in :func:`make_metrics`, all of which compare with ``reference``, or metrics with one of their own.
        reference: as in :func:`~fewstep.eval.distribution.measures.fid`; images may be an iterator, they are read once.
        prompts: one an image, for the metrics that need them.
        batch_size: images in one pass of a net.
        cache: folder for features, see :mod:`fewstep.eval.distribution.feature_cache`; none is kept where left out.

    Raises:
        FewstepError: for an unknown metric, bad images, or another number of prompts than images.
    """
    specs = list(metrics)
    needs = {spec: need for spec in specs if isinstance(spec, str) and (need := _reference_need(spec)) is not None}
    known = resolved(reference, [*needs.values()], batch_size, None if cache is None else FeatureCache(cache))
    made: list[Metric] = []
    for spec in specs:
        if isinstance(spec, str):
            made += _by_name(spec, known[needs[spec]] if spec in needs else None, batch_size)
        else:
            made += spec if isinstance(spec, Prdc) else [spec]
    return measure(_distinct(made), _with_prompts(batches(images, batch_size), prompts), cache)


def _reference_need(spec: str) -> Need | None:
    """What a metric will want to know of the reference; None for one that has none, or is not known."""
    title, _, net = ALIASES.get(spec, spec).partition(":")
    if title not in REFERRED:
        return None
    kind = REFERRED[title]
    return Need(feature_net(net or kind.usual_net), kind.output, kind.reference_whole)


def _with_prompts(images: Iterable[Tensor], prompts: Sequence[str]) -> Iterator[tuple[Tensor, Sequence[str]]]:
    if isinstance(prompts, str):
        raise FewstepError("prompts is one string; give a list with one prompt for each image")
    done = 0
    for batch in images:
        yield batch, prompts[done : done + len(batch)]
        done += len(batch)
    if prompts and done != len(prompts):
        raise FewstepError(f"there are {len(prompts)} prompts for {done} images; give one each")
