"""Whether a regular expression that stands in a file may be matched: some take longer than
anybody waits, and nothing can stop them."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from typing import Any

_LONGEST = 1000
_REPEAT = 100  # ways in which a repeat can match a name of that many characters
_MOST_WAYS = 10**7


def check_cost(pattern: str, what: str) -> None:
    """Sees that the ways in which `pattern` can match a name can all be tried: no choice stands
    within a repeat, where it would be made again for each character, and the others are few.

    Raises:
        ValueError: it is no regular expression, or may take too long; begins with `what`.
    """
    shown = repr(pattern if len(pattern) < 100 else pattern[:97] + "...")
    try:
        ways = math.inf
        if len(pattern) <= _LONGEST:
            ways = math.prod(_choices(_parser().parse(pattern), within_repeat=False))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{what}: {shown} is not a regular expression: {error}") from error
    if ways > _MOST_WAYS:
        raise ValueError(f"{what}: {shown} could take forever to match, and is not supported")


def _parser() -> Any:
    """The standard library's parser of regular expressions, under its name of the day."""
    return importlib.import_module("re._parser" if hasattr(re, "_parser") else "sre_parse")


def _choices(parsed: Any, *, within_repeat: bool) -> Iterator[float]:
    """How many ways there are at each place where there is a choice."""
    for operation, argument in parsed:
        repeated = within_repeat
        kind = str(operation)
        if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            low, high, _ = argument
            if low != high:
                yield math.inf if within_repeat else 2 if high == 1 else _REPEAT
            repeated = repeated or high != 1
        elif kind in ("BRANCH", "GROUPREF_EXISTS"):
            ways = max(2, len(argument[1])) if kind == "BRANCH" else 2
            yield math.inf if within_repeat else ways
        for inner in _inside(argument):
            yield from _choices(inner, within_repeat=repeated)


def _inside(argument: Any) -> Iterator[Any]:
    """The parsed expressions in an operation's argument."""
    if type(argument).__name__ == "SubPattern":
        yield argument
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _inside(part)
