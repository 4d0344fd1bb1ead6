"""Files of text and of records, read; and records held out."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hqqlora.command.errors import UsageError

RECORD_SUFFIXES = (".jsonl", ".ndjson")


def read_file(file: str) -> str:
    """The text of a file, its lines ended by ``\\n``.

    Raises:
        UsageError: it cannot be read, is no UTF-8 text, or is empty.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {os.strerror(error.errno or 0)}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text: byte {error.start} is {content[error.start]:#x}"
        ) from None
    if not text.strip():
        raise UsageError(f"{file} is empty")
    return text.replace("\r\n", "\n")


def read_records(file: str, field: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The objects of a JSONL file: where each stands, its line number, and itself.

    Raises:
        UsageError: the file cannot be read, or a line is no JSON object; the message says that
            one with `field` was expected.
    """
    for number, line in enumerate(read_file(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise UsageError(f"{where}: not an object with a {field!r} field")
        yield where, number, record


def hold_out(
    source: str, sizes: Sequence[int], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Which records to train on, and which to hold out: they are shuffled by `seed`, and held
    out until these have `fraction` of all characters.

    Args:
        source: what an error message calls them.
        sizes: the characters of each record.

    Raises:
        UsageError: there are fewer than two.
    """
    if len(sizes) < 2:
        raise UsageError(f"{source}: one record alone cannot be split; give two or more")
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    wanted = fraction * sum(sizes)
    held: list[int] = []
    taken = 0
    for index in order[:-1]:  # one stays to train on, however long the others are
        if taken >= wanted:
            break
        held.append(index)
        taken += sizes[index]
    return order[len(held) :], held
