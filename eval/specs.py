"""Lists on a command line: split at commas, but not at those inside parentheses, brackets or quotes."""

from __future__ import annotations

from fewstep.errors import FewstepError

_OPEN, _CLOSE = "([{", ")]}"


def split_top_level(text: str) -> list[str]:
    """``"DDIM, DPMSolver(solver_order=3, grid='karras')"`` to its two items, stripped, empty ones left out.

    Raises:
        FewstepError: for a parenthesis or quote that is not closed, or closed without being opened.
    """
    items, current, closers, quote = [], "", "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _OPEN:
            closers += _CLOSE[_OPEN.index(character)]
        elif character in _CLOSE:
            if not closers.endswith(character):
                raise FewstepError(f"{text!r} closes {character!r} without having opened it")
            closers = closers[:-1]
        if character == "," and not closers and not quote:
            items.append(current)
            current = ""
        else:
            current += character
    if closers or quote:
        raise FewstepError(f"{text!r} lacks a closing {quote or closers[-1]!r}")
    return [item.strip() for item in (*items, current) if item.strip()]


def whole_numbers(text: str, what: str) -> list[int]:
    """``"5, 8,10"`` to ``[5, 8, 10]``.

    Raises:
        FewstepError: naming the item that is no whole number.
    """
    numbers = []
    for item in split_top_level(text):
        try:
            numbers.append(int(item))
        except ValueError as error:
            raise FewstepError(f"{what} has {item!r}; give whole numbers, such as 5,8,10") from error
    return numbers
