"""What the bench commands' reports have in common: the machine, and where the figures go."""

from __future__ import annotations

import ctypes
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from hqqlora.command.errors import UsageError
from hqqlora.command.machine import describe_machine
from hqqlora.ops.library import find_library


def describe_bench_machine() -> dict[str, Any]:
    """`describe_machine`, with the rivals' versions and the instruction set that is used."""
    machine = describe_machine()
    for package in ("peft", "hqq"):
        try:
            machine["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine["versions"][package] = None
    return {**machine, "isa": _instruction_set()}


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """Two lines of a table's head."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    return [
        f"machine  {machine['processor']}, {machine['isa']}, {machine['threads']} threads",
        f"         {versions}",
    ]


def check_writable(path: str | None) -> None:
    """Before minutes are spent.

    Raises:
        UsageError: no file can be written at `path`.
    """
    if path is None:
        return
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--json {path}: cannot be written")


def _instruction_set() -> str:
    """What this library's kernels use: what the environment says, or what the library finds."""
    library = ctypes.CDLL(str(find_library().with_name("libhqqlora.so")))
    library.hqq_isa_name.restype = ctypes.c_char_p
    found: bytes = library.hqq_isa_name(library.hqq_isa_in_use(None))
    return os.environ.get("HQQLORA_ISA") or found.decode()
