"""Names of sites that say how a module is run: ``uncond``, and ``form[option=value]:path``.

A plan file holds the name, so it holds the options too.
"""

from __future__ import annotations

import re
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fewstep.errors import FewstepError, unknown

if TYPE_CHECKING:
    from fewstep.caching.families.family import Family
    from fewstep.caching.roles import Role

FORMS = {
    "merge": ("token_merging", "MergedTokens"),
    "frames": ("frame_merging", "MergedFrames"),
    "window": ("windowed", "Windowed"),
    "without": ("removed", "Removed"),
}
"""The forms, and where their roles are."""
_UNCOND = re.compile(r"uncond(?:\.(first|second))?(?::(.+))?")
_FORM = re.compile(r"(\w+)(?:\[(.*)\])?:(.+)")


def special_role(family: Family, name: str) -> Role | None:
    """The role that a name of this kind stands for; None for other names.

    ``uncond`` is the unconditional half of the network's batch, where the model's usual pipeline has it; ``uncond.first``
    and ``uncond.second`` say which half that is; ``uncond:path`` is that of one module.

    Raises:
        FewstepError: for an unknown form or option, or a module that the model has not.
    """
    if match := _UNCOND.fullmatch(name):
        from fewstep.caching.forms.guided import Guided

        half, path = match.groups()
        if path:
            _check_path(family, path, name)
        return Guided(path or "", family.conditional_first if half is None else half == "second")
    if match := _FORM.fullmatch(name):
        form, options, path = match.groups()
        if form not in FORMS:
            raise FewstepError(unknown("form of a site", form, FORMS))
        _check_path(family, path, name)
        module, cls = FORMS[form]
        made: Role = _make(getattr(import_module(f"fewstep.caching.forms.{module}"), cls), path, options or "", name)
        return made
    return None


def form_name(form: str, path: str, **options: Any) -> str:
    """The name of a site: the inverse of :func:`special_role`."""
    inside = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{form}[{inside}]:{path}" if inside else f"{form}:{path}"


def _make(cls: Any, path: str, options: str, name: str) -> Role:
    known: dict[str, Any] = {f.name: type(f.default) for f in fields(cls) if f.name != "path"}
    given: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise FewstepError(unknown(f"option of site {name!r}", key, known))
        try:
            given[key] = known[key](value)
        except ValueError:
            raise FewstepError(f"option {key} of site {name!r} is {value!r}; a number is needed") from None
    role: Role = cls(path, **given)
    return role


def _check_path(family: Family, path: str, name: str) -> None:
    if path not in dict(family.model.named_modules()):
        raise FewstepError(f"site {name!r} names module {path!r}, which {family.name} has not")
