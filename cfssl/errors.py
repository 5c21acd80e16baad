"""The one exception that speaks to the user, and the parts its sentences are made of."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """One clear sentence: what was found, where, what was expected, what to do. The command line prints it
    and exits with 2.

    A ValueError, so that pydantic collects it with a recipe's other mistakes when settings raise it.
    """


def nearest(name: Any, known: Iterable[Any]) -> str:
    """The tail of a message about an unknown name: the nearest of the `known` ones, or all of them."""
    names = [str(item) for item in known]
    close = difflib.get_close_matches(str(name).lower(), [item.lower() for item in names], n=1)
    if close:
        return f"; the nearest is {next(item for item in names if item.lower() == close[0])!r}"
    return f"; known are {quoted(names)}" if names else "; there are none"


def quoted(names: Iterable[Any], limit: int = 12) -> str:
    """Names for a message: 'a', 'b', 'c', at most `limit` of them."""
    known = [repr(name) for name in names]
    return ", ".join(known[:limit]) + (f" and {len(known) - limit} more" if len(known) > limit else "")


def listed(rows: Iterable[Any], count: int | None = None) -> str:
    """Rows for a message, counted from 0: "row 3" or "5 rows (3, 8, 9, ...)".

    `count` is given when `rows` are only the first ones.
    """
    first = [str(row) for row in rows]
    count = len(first) if count is None else count
    if count == 1:
        return f"row {first[0]}"
    return f"{count} rows ({', '.join(first[:3])}{', ...' if count > 3 else ''})"
