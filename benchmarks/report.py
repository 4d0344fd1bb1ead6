"""Markdown tables, and the options that all benchmarks share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import machine
import torch

Row = dict[str, Any]


def markdown(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    written = []
    for line in (lines[0], rule, *lines[1:]):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        written.append(f"| {' | '.join(cells)} |")
    return "\n".join(written)


def table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> None:
    """Print it."""
    print(markdown(rows, header), flush=True)


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def times_faster(ratio: float) -> str:
    """1.25x"""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument(
        "--seconds", type=float, help="time for each line of a table (at least 3 rounds)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Set torch up and print what this runs on. Returns the description."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    description = machine.describe()
    print(machine.in_words(description), flush=True)
    return description


def finish(
    path: Path | None, description: dict[str, Any], results: dict[str, list[Row]]
) -> None:
    """Write the JSON file, if one was asked for."""
    if path:
        path.write_text(json.dumps({"machine": description, "results": results}, indent=1))
