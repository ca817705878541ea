"""Feature nets by name: uint8 images in, features out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.eval import fingerprint


@dataclass(frozen=True)
class FeatureNet:
    """A net with a name to print and a hash to compare.

    Attributes:
        name: as it stands in recipes: the registered name, or ``Class:hash`` for a module of the caller's.
        module: float32 images in [0, 1] of shape (n, C, H, W) to features (n, d).
        sha256: hash of the weights.
    """

    name: str
    module: nn.Module
    sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features (n, d), float64 on the CPU, of uint8 ``images`` (n, C, H, W).

        Raises:
            FewstepError: where the net refuses the images' shape or returns anything but (n, d).
        """
        with inference(self.module):
            try:
                features = self.module(images.to(module_device(self.module)).float() / 255)
            except (RuntimeError, ValueError, TypeError) as error:
                raise FewstepError(
                    f"feature net {self.name!r} cannot read images (n, C, H, W) = {tuple(images.shape)}: {error}"
                ) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != images.shape[0]:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise FewstepError(f"feature net {self.name!r} gave {got} for {images.shape[0]} images; it must be (n, d)")
        return features.double().cpu()


def _fashion() -> nn.Module:
    from fewstep.pipelines import zoo

    return zoo.features()


NETS: dict[str, Callable[[], nn.Module]] = {"fashion": _fashion}


def feature_net(features: str | nn.Module | FeatureNet) -> FeatureNet:
    """The net of that name, or the caller's module with a name made of its class and its weights.

    Raises:
        FewstepError: for a name that is not registered, or something that is no net.
    """
    if isinstance(features, FeatureNet):
        return features
    if isinstance(features, nn.Module):
        sha256 = fingerprint.of_module(features)
        return FeatureNet(f"{type(features).__name__}:{sha256[:8]}", features, sha256)
    if not isinstance(features, str):
        raise FewstepError(f"features is a {type(features).__name__}; give one of {sorted(NETS)} or an nn.Module")
    if features not in NETS:
        raise FewstepError(f"unknown feature net {features!r}; known are {sorted(NETS)}, or give an nn.Module")
    module = NETS[features]()
    return FeatureNet(features, module, fingerprint.of_module(module))


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients (dropout would make scores random); every submodule's mode comes back."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for child, training in modes:
            child.training = training


def module_device(module: nn.Module) -> torch.device:
    """Where the module computes: the device of its first parameter or buffer, the CPU for a module without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
