"""Runs checks in several processes that share a gloo process group, once for many tests.

A module of checks has a table ``CHECKS: dict[str, Callable[[Path], None]]``. `run_checks`
starts the processes; each runs every check in the order of the table, all at the same time, and
leaves a file that says how it went. `outcome` turns these files into one test's success or
failure.

The processes are forked from a server that has imported torch, transformers and peft, which
costs more than the checks themselves.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 4
PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed._functional_collectives",
    "transformers.models.llama.modeling_llama",
    "peft",
    "hqqlora.distributed",
]
# A process that waits for one that has failed gives up after this.
PATIENCE = timedelta(seconds=90)


def run_checks(modules: str | list[str], folder: Path, world: int = WORLD) -> Path:
    """Runs the checks of `modules` in `world` processes; returns `folder`, for `outcome`.

    Nothing is raised if a check fails: its own test says so.
    """
    if not dist.is_gloo_available():
        pytest.skip("torch without gloo")
    forkserver.set_forkserver_preload(PRELOAD)
    processes = mp.start_processes(
        _process,
        args=(modules, str(folder), world),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    try:
        while not processes.join():
            pass
    except Exception as error:
        (folder / "broken").write_text(str(error))
    return folder


def outcome(folder: Path, check: str, world: int = WORLD) -> None:
    """Fails with what the processes have said about `check`."""
    failures = []
    for rank in range(world):
        result = folder / f"{check}.{rank}"
        text = result.read_text() if result.exists() else "not run: an earlier check failed"
        if text:
            failures.append(f"process {rank} of {world}: {text}")
    assert not failures, "\n".join(failures)


def _process(rank: int, modules: str | list[str], folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=PATIENCE
    )
    checks: dict[str, Callable[[Path], None]] = {}
    for module in [modules] if isinstance(modules, str) else modules:
        checks.update(importlib.import_module(module).CHECKS)
    for name, check in checks.items():
        torch.manual_seed(0)
        result = Path(folder) / f"{name}.{rank}"
        try:
            check(Path(folder))
        except BaseException:
            result.write_text(traceback.format_exc())
            os._exit(1)  # the others cannot go on without this one
        result.write_text("")
    dist.barrier()
    # gloo's threads may still hold the last tensors. Python, when it shuts down, ends such a
    # thread in the middle of a C++ destructor, which aborts the process; so it does not.
    os._exit(0)
