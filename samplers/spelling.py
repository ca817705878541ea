"""How schedulers and grids are written in one line of text: ``NAME`` or ``NAME(key=value, ...)``."""

from __future__ import annotations

import ast
from typing import Any

from fewstep.errors import FewstepError


def parse_call(text: str, kind: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of ``text``; values are Python literals, and a bare word is taken as a string.

    Args:
        kind: what is being read, for the message.

    Raises:
        FewstepError: not of that form.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null characters, parentheses without end
        tree = ast.Constant(None)
    call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
    if not isinstance(call.func, ast.Name) or call.args or any(k.arg is None for k in call.keywords):
        raise FewstepError(f"cannot read the {kind} {text!r}; write it as NAME or NAME(key=value, ...)")
    return call.func.id, {str(k.arg): _literal(k.value, text) for k in call.keywords}


def _literal(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    try:
        found = ast.literal_eval(node)
        if ast.literal_eval(repr(found)) != found:  # not a number; infinity is refused by reading its repr
            raise ValueError(found)
        return found
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise FewstepError(
            f"cannot read an option of {text!r}; values are numbers, strings, lists, True, False, None"
        ) from None
