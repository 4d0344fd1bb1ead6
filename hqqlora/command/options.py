"""Parsing what stands on a command line: numbers in a range, and complaints in one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from hqqlora.command.errors import UsageError

DTYPES = ("auto", "bfloat16", "float32")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError instead of printing the usage and exiting."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def number(kind: type, low: float, high: float, wish: str) -> Callable[[str], Any]:
    """A parser of an int or float in [low, high]; `wish` says in words what is expected."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wish}") from None
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not {wish}")
        return value

    return parse


positive_integer = number(int, 1, 2**31 - 1, "a positive integer")
non_negative_integer = number(int, 0, 2**31 - 1, "a non-negative integer")


def group_size_or_none(text: str) -> int | None:
    """A parser of group sizes; None: as long as a row or column."""
    parse = number(int, 1, 2**31 - 1, "a positive integer or 'none'")
    return None if text.lower() == "none" else parse(text)
