"""Did acceleration change the image? Each image against the unaccelerated output of its own seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError, unknown
from fewstep.eval.images import ROUNDING, Images, batches
from fewstep.eval.pairs.latents import latent_rmse
from fewstep.eval.pairs.perceptual import FeatureDistance, Lpips, LpipsLike
from fewstep.eval.pairs.pixels import psnr, ssim
from fewstep.eval.pairs.samples import Samples
from fewstep.eval.score import recipe
from fewstep.eval.sweeps.identity import jsonable

Pairwise = Callable[[Tensor, Tensor], Any]

PIXELS = 2**22  # of one pass, all channels counted: SSIM holds some ten maps of them in float64


@dataclass(frozen=True)
class Fidelity:
    """One value an image and metric; ``str()`` is a table with the worst cases, ``fidelity["psnr"]`` one metric.

    Attributes:
        samples: by metric, in the order of the table.
    """

    samples: Mapping[str, Samples] = field(repr=False)

    def __getitem__(self, metric: str) -> Samples:
        if metric not in self.samples:
            raise FewstepError(unknown("metric of this fidelity", metric, self.samples))
        return self.samples[metric]

    @property
    def seeds(self) -> tuple[int, ...]:
        return next(iter(self.samples.values())).ids

    def worst(self, metric: str, count: int = 5) -> dict[int, float]:
        """The ``count`` worst images by one metric, seed to value, the worst first."""
        return self[metric].worst(count)

    def table(self) -> list[dict[str, float]]:
        """One record an image: its seed and its value of every metric."""
        return [
            {"seed": seed, **{name: float(samples.values[i]) for name, samples in self.samples.items()}}
            for i, seed in enumerate(self.seeds)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Summaries, recipes and all values as JSON values; infinite ones are the string ``"inf"``."""
        body: dict[str, Any] = {"seeds": list(self.seeds), "metrics": {}}
        for name, samples in self.samples.items():
            entry = {"recipe": samples.recipe, **samples.summary(), "values": samples.values}
            body["metrics"][name] = {key: jsonable(value) for key, value in entry.items()}
        return body

    def __str__(self) -> str:
        header = f"{'metric':18}{'mean':>10}{'median':>10}{'5 %':>10}{'95 %':>10}  worst seeds"
        lines = [f"{len(self.seeds)} images against the same seeds' reference", header]
        for name, samples in self.samples.items():
            s = samples.summary()
            numbers = "".join(f"{s[key]:10.4g}" for key in ("mean", "median", "q05", "q95"))
            worst = ", ".join(f"{seed} ({value:.4g})" for seed, value in islice(s["worst"].items(), 3))
            lines.append(f"{name:18}{numbers}  {worst}")
        return "\n".join(lines)

    __repr__ = __str__


class FidelityStream:
    """Fidelity of images that come batch by batch with their references; arguments as in :func:`fidelity`.

    Args:
        lpips: as there.
        features: as there.

    Attributes:
        columns: the metrics by name, in the order of the table; ``latent_rmse`` only where latents are given.
        identity: what the values depend on beside images and latents.

    Raises:
        FewstepError: for an unknown network, or weights that are not installed.
    """

    def __init__(
        self, lpips: LpipsLike | Lpips | None = None, features: str | nn.Module | FeatureDistance | None = None
    ) -> None:
        self._measures: dict[str, tuple[Pairwise, str]] = {"psnr": (psnr, "dB"), "ssim": (ssim, "windows inside")}
        nets: list[str] = []
        if lpips is not None:
            network = lpips if isinstance(lpips, Lpips) else Lpips(lpips)
            self._measures["lpips"] = (network, network.title)
            nets.append(network.identity)
        if features is not None:
            distance = features if isinstance(features, FeatureDistance) else FeatureDistance(features)
            self._measures["feature_distance"] = (distance, distance.title)
            nets.append(distance.identity)
        self.columns = ("latent_rmse", *self._measures)
        self.identity = "|".join([*self.columns, *nets])
        self._found: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in self.columns}
        self._digest = hashlib.sha256()

    def update(self, images: Tensor, reference: Tensor, latents: tuple[Tensor, Tensor] | None = None) -> None:
        """Add uint8 images (n, C, H, W), as many references, and where they are known the latents behind both."""
        self._digest.update(reference.contiguous().numpy().tobytes())
        at_once = max(1, PIXELS // images[0].numel())
        for start in range(0, len(images), at_once):
            part = slice(start, start + at_once)
            for name, (metric, _) in self._measures.items():
                self._found[name].append(np.asarray(metric(images[part], reference[part]), dtype=np.float64))
        if latents is not None:
            self._found["latent_rmse"].append(latent_rmse(*latents))

    def result(self, seeds: Sequence[int] | None = None, against: str = "") -> Fidelity:
        """One value an image and metric so far.

        Args:
            seeds: of the images; 0, 1, ... where left out.
            against: what the references are called in recipes; the hash of their pixels where left out.

        Raises:
            FewstepError: for no images, or other numbers of seeds or latents.
        """
        if not self._found["psnr"]:
            raise FewstepError("there are no images to compare")
        values = {name: np.concatenate(parts) for name, parts in self._found.items() if parts}
        count = len(values["psnr"])
        ids = tuple(range(count)) if seeds is None else tuple(int(seed) for seed in seeds)
        for what, number in (("seeds", len(ids)), ("latents", len(values.get("latent_rmse", ids)))):
            if number != count:
                raise FewstepError(f"there are {number} {what} for {count} images; give one each")
        said = (f"N={count}", f"ref={against or f'sha256:{self._digest.hexdigest()[:8]}'}")
        ways = {name: (how, ROUNDING) for name, (_, how) in self._measures.items()}
        return Fidelity(
            {name: Samples(found, ids, recipe(name, *ways.get(name, ()), *said)) for name, found in values.items()}
        )


def fidelity(
    images: Images,
    reference: Images,
    *,
    seeds: Sequence[int] | None = None,
    latents: tuple[Tensor, Tensor] | None = None,
    lpips: LpipsLike | Lpips | None = None,
    features: str | nn.Module | FeatureDistance | None = None,
    batch_size: int = 250,
) -> Fidelity:
    """How far each image is from the unaccelerated one of the same seed: PSNR, SSIM, and more where it is given.

    ``psnr`` (dB) and ``ssim`` as in :mod:`~fewstep.eval.pairs.pixels`, on the rounded uint8 images; ``latent_rmse`` where
    latents are given; ``lpips`` where its network is; ``feature_distance``, the formula of LPIPS on another net, where
    features are named. A distance to one reference says nothing about whether the images are good: see FID for that.

    Args:
        images: the accelerated images, in any form that :func:`~fewstep.eval.images.batches` takes; streamed.
        reference: the unaccelerated ones of the same seeds, in the same order.
        seeds: of the images; 0, 1, ... where left out. Worst cases are named by them.
        latents: the latents behind ``images`` and behind ``reference``, (n, ...) each; see
            :func:`~fewstep.eval.pairs.latents.capture_latents`.
        lpips: a LPIPS module or backbone, see :class:`~fewstep.eval.pairs.perceptual.Lpips`.
        features: a registered feature net, or a :class:`~fewstep.eval.pairs.perceptual.FeatureDistance` with named layers.
        batch_size: pairs in one pass.

    Raises:
        FewstepError: for bad images, two numbers or sizes of images, no images, other numbers of seeds or latents,
            repeated seeds, an unknown network, or weights that are not installed.

    References:
        PSNR and SSIM: Wang et al., IEEE TIP 13(4), 2004. LPIPS: Zhang et al., arXiv:1801.03924.
    """
    stream = FidelityStream(lpips, features)
    for ours, theirs in _pairs(images, reference, batch_size):
        stream.update(ours, theirs, latents)
        latents = None  # all of them came with the first batch
    return stream.result(seeds)


def _pairs(images: Images, reference: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both as uint8 batches of the same images, however either came batched."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for a, b in zip_longest(_single(images, batch_size), _single(reference, batch_size)):
        if a is None or b is None:
            which = "more" if a is not None else "fewer"
            raise FewstepError(f"there are {which} images than references; give one each")
        if a.shape != b.shape:
            raise FewstepError(
                f"images have shape (C, H, W) {tuple(a.shape)}, references {tuple(b.shape)}; give one size"
            )
        waiting.append((a, b))
        if len(waiting) == batch_size:
            yield _stacked(waiting)
            waiting = []
    if waiting:
        yield _stacked(waiting)


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


def _single(images: Images, batch_size: int) -> Iterator[Tensor]:
    for batch in batches(images, batch_size):
        yield from batch
