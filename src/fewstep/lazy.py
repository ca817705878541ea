"""Public names that are loaded on first use: so that importing a room costs nothing that is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module


def load(package: str, home: Mapping[str, str], name: str) -> object:
    """What a package's ``__getattr__`` returns for a public name.

    Args:
        package: the package's full name.
        home: by public name the module below the package that it lies in.
        name: what was asked for.

    Raises:
        AttributeError: for a name that is not there, with those that are.
    """
    if name in home:
        return getattr(import_module(f"{package}.{home[name]}"), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(home))}")
