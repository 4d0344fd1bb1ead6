"""What the tests of `hqqlora quantize` share."""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hqqlora.cli import main
from hqqlora.command.safetensors_file import FileWriter
from hqqlora.quantize_command import job


def quantize(source: Path, destination: Path, *options: str) -> int:
    """Runs the command in this process, and returns its exit code."""
    return main(["quantize", str(source), str(destination), *options])


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as the public reader of safetensors reads them."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors.update(found)
    return tensors


def stored_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def assert_same_checkpoint(folder: Path, expected: Path) -> None:
    """Equal in the names, dtypes and every bit of all tensors, and in config.json."""
    mine, other = stored_tensors(folder), stored_tensors(expected)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    assert stored_config(folder) == stored_config(expected)


def quantize_slowly(
    begun: Any, plan_file: Path, source: Path, folder: Path, options: Any
) -> None:
    """For a process that is to be killed: runs the command, with the plan that is in a file,
    and 10 ms for each tensor; sets the event `begun`. Its exit code is the command's."""
    write = FileWriter.write

    def slow(self: FileWriter, name: str, tensor: Tensor, first: int = 0) -> None:
        if name.endswith((".W_q", ".weight")):
            time.sleep(0.01)
        write(self, name, tensor, first)

    FileWriter.write = slow  # type: ignore[method-assign]
    job.plan_apart = lambda _: pickle.loads(plan_file.read_bytes())
    begun.set()
    sys.exit(quantize(source, folder, *options, "--threads", "1"))
