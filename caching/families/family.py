"""A family: what a cache has to know about a class of models, asked by name of the sites that it offers."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fewstep.caching.forms import special_role
from fewstep.caching.residual import RESIDUAL, OutputResidual
from fewstep.caching.roles import Output, Role
from fewstep.errors import FewstepError, unknown

CONDITIONING = (
    "encoder_hidden_states", "class_labels", "pooled_projections", "encoder_hidden_states_image", "added_cond_kwargs",
    "encoder_attention_mask",
)  # fmt: skip
"""Arguments that tell what is drawn; they do not change along a trajectory and tell its streams apart."""
OUTPUT = "output"


@dataclass(frozen=True)
class Site:
    """A part of a network with one value that can be put in its place.

    Attributes:
        name: what plans call it.
        roles: the modules on its way, in the order in which they are reached.
    """

    name: str
    roles: tuple[Role, ...]

    @property
    def halves(self) -> bool:
        """Whether it needs guidance in one call, every sample twice."""
        return any(role.wraps for role in self.roles)


class Family:
    """The sites of one model. Every module is a site by its path; subclasses know those that several modules make up.

    Attributes:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.signature = inspect.signature(type(model).forward)
        self._names = [name for name in self.signature.parameters if name != "self"]

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    @property
    def config_hash(self) -> str:
        """Hash of the model's configuration, without what says where it was loaded from."""
        config = getattr(self.model, "config", None) or {}
        told = {str(k): v for k, v in dict(config).items() if not str(k).startswith("_")}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def adapters(self) -> list[str]:
        """Names of the LoRA adapters that are active now."""
        return sorted(self.model.active_adapters()) if getattr(self.model, "_hf_peft_config_loaded", False) else []  # type: ignore[operator]

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            FewstepError: where the model has none.
        """
        if name == OUTPUT:
            return Site(name, (Output(""),))
        if name == RESIDUAL:
            return Site(name, (OutputResidual(),))
        if role := special_role(self, name):
            return Site(name, (role,))
        if made := self.composite(name):
            return made
        if name and name in dict(self.model.named_modules()):
            return Site(name, (Output(name),))
        raise FewstepError(unknown(f"site of {self.name}", name, self.offered()))

    def composite(self, name: str) -> Site | None:
        """A site that several modules make up, or None."""
        return None

    @property
    def conditional_first(self) -> bool:
        """Whether pipelines put the conditional half of a guided batch first. DiTPipeline alone does."""
        return self.name == "DiTTransformer2DModel"

    def offered(self) -> list[str]:
        """Names of sites, for messages."""
        return [OUTPUT, "uncond"]

    def branches(self, kind: str) -> list[str]:
        """Sites that a residual connection leads past: ``kind`` is ``attention``, ``cross_attention`` or ``feed_forward``."""
        return []

    # -- calls --------------------------------------------------------------------------------------------------------
    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def sample(self, arguments: Mapping[str, Any]) -> Any:
        """The noisy sample of a call."""
        return arguments.get(self._names[0])

    def conditioning(self, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors that tell what is drawn."""
        return tuple(v for name in CONDITIONING for v in tree_leaves(arguments.get(name)) if isinstance(v, Tensor))

    def example(self, batch: int = 1) -> dict[str, Any]:
        """Arguments of a call with ``batch`` samples, of the model's usual size; zeros on the model's device.

        Raises:
            FewstepError: where the family does not know how.
        """
        raise FewstepError(f"no example inputs are known for {self.name}; give them as inputs=")


def check_indices(name: str, indices: Iterable[int], count: int, what: str) -> None:
    """Raises FewstepError where an index is outside ``0..count-1``."""
    for index in indices:
        if not 0 <= index < count:
            raise FewstepError(f"{name} needs {what} {index}; there are {count} (0 to {count - 1})")
