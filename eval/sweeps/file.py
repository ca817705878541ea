"""A sweep as a TOML file: its keys are the arguments of ``Sweep``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError, unknown
from fewstep.eval.sweeps.sweep import Sweep

PROMPTS_FILE = "prompts_file"
_NEEDED = ("schedulers", "steps")
DEFAULT_MODEL = "fashion-sd"

# What each key holds, for the error that says so. A list may be given where one value would do.
_WORDS = "a list of texts"
_FORMS: dict[str, tuple[str, Any]] = {
    "model": ("a text or a list of texts", lambda v: _text(v) or _list(v, _text)),
    "schedulers": (_WORDS, lambda v: _list(v, _text)),
    "steps": ("a list of whole numbers", lambda v: _list(v, _whole)),
    "grids": (_WORDS, lambda v: _list(v, _text)),
    "guidance": ("a number or a list of numbers", lambda v: _number(v) or _list(v, _number)),
    "caches": (_WORDS, lambda v: _list(v, _text)),
    "quants": (_WORDS, lambda v: _list(v, _text)),
    "exclude": ("tables, [[exclude]]", lambda v: _list(v, lambda rule: isinstance(rule, dict))),
    "samples": ("a whole number", lambda v: _whole(v)),
    "blocks": ("a whole number", lambda v: _whole(v)),
    "seed": ("a whole number", lambda v: _whole(v)),
    "batch_size": ("a whole number", lambda v: _whole(v)),
    "limit": ("a whole number", lambda v: _whole(v)),
    "prompts": (_WORDS, lambda v: _list(v, _text)),
    PROMPTS_FILE: ("the path of a text file with one prompt a line", lambda v: _text(v)),
    "metrics": ("a list of names", lambda v: _list(v, _text)),
    "fidelity": ("a text or a table of texts, [fidelity]", lambda v: _text(v) or _texts(v)),
    "trackers": ("a list of names", lambda v: _list(v, _text)),
    "call": ("a table, [call]", lambda v: isinstance(v, dict)),
    "device": ("a text", lambda v: _text(v)),
}


def read(path: str | Path, over: Mapping[str, Any] | None = None) -> Sweep:
    """See :meth:`fewstep.eval.Sweep.from_file`; the values in ``over`` replace those of the file."""
    path = Path(path)
    try:
        return from_table({**load_table(path), **(over or {})}, path.parent)
    except FewstepError as error:
        raise FewstepError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def load_table(path: Path) -> dict[str, Any]:
    """What stands in the file.

    Raises:
        FewstepError: for a file that cannot be read, or is no TOML.
    """
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        table: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FewstepError(
            f"{path} cannot be read: {error.strerror}; give a TOML file that describes a sweep"
        ) from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, a number of too many digits, tables too deep
        raise FewstepError(f"{path} is no TOML: {error}") from error
    return table


def from_table(table: Mapping[str, Any], folder: Path) -> Sweep:
    """A sweep from the values of its arguments.

    Args:
        table: argument by name; ``prompts_file`` stands for ``prompts``.
        folder: where relative paths begin.

    Raises:
        FewstepError: for an unknown key, one that is missing, or a value of the wrong kind.
    """
    for key, value in table.items():
        if key not in _FORMS:
            raise FewstepError(unknown("key", key, _FORMS))
        form, fits = _FORMS[key]
        if not fits(value):
            raise FewstepError(f"{key} is {value!r}; give {form}")
    for key in _NEEDED:
        if key not in table:
            raise FewstepError(f"{key} is missing; give {_FORMS[key][0]}")
    arguments = {"model": DEFAULT_MODEL, **table}
    if PROMPTS_FILE in arguments:
        if "prompts" in arguments:
            raise FewstepError(f"prompts and {PROMPTS_FILE} are both given; give one of them")
        arguments["prompts"] = _lines(folder / arguments.pop(PROMPTS_FILE))
    return Sweep(**arguments)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FewstepError(f"{PROMPTS_FILE} {str(path)!r} cannot be read: {error}") from error
    if not any(lines):
        raise FewstepError(f"{PROMPTS_FILE} {str(path)!r} holds no prompt; give one a line")
    return [line for line in lines if line]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(values: Any, fits: Any) -> bool:
    return isinstance(values, list) and all(fits(value) for value in values)


assert set(_FORMS) - {PROMPTS_FILE} == {f.name for f in fields(Sweep)} - {"_"}, "every argument has its form"
