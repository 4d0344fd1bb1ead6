"""Runs checks in several processes that share a gloo process group, once for many tests.

A module of checks has a table ``IN_TWO`` or ``IN_FOUR: dict[str, Callable[[Path], None]]``, for
that many processes. `run_checks` starts them; each runs every check in the order of the table,
all at the same time, and leaves a file that says how it went. `outcome` turns these files into
one test's success or failure. `run_script` runs a program instead.

The processes are forked from a server that has imported torch, transformers and peft, which
costs more than the checks themselves.
"""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TABLES = {2: "IN_TWO", 4: "IN_FOUR"}
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


def checks_of(modules: Iterable[ModuleType], world: int) -> dict[str, Callable[[Path], None]]:
    """The tables for `world` processes, one after the other."""
    checks: dict[str, Callable[[Path], None]] = {}
    for module in modules:
        checks.update(getattr(module, TABLES[world], {}))
    return checks


def run_checks(modules: Iterable[ModuleType], folder: Path, world: int) -> Path:
    """Runs the checks of `modules` in `world` processes; returns `folder`, for `outcome`.

    Nothing is raised if a check fails: its own test says so.
    """
    names = [module.__name__ for module in modules]
    try:
        _start(_check, (names, str(folder), world), world)
    except Exception as error:
        (folder / "broken").write_text(str(error))
    return folder


def outcome(folder: Path, check: str, world: int) -> None:
    """Fails with what the processes have said about `check`."""
    failures = []
    for rank in range(world):
        result = folder / f"{check}.{rank}"
        text = result.read_text() if result.exists() else "not run: an earlier check failed"
        if text:
            failures.append(f"process {rank} of {world}: {text}")
    assert not failures, "\n".join(failures)


def run_script(script: Path, arguments: list[str], folder: Path, world: int) -> str:
    """Runs a program in `world` processes, with the environment that torchrun gives it, on the
    CPU; returns what the first has printed.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one has failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = folder / "printed"
    _start(_script, (str(script), arguments, str(printed), port, world), world)
    return Path(f"{printed}.0").read_text()


def _start(function: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    forkserver.set_forkserver_preload(PRELOAD)
    processes = mp.start_processes(
        function, args=arguments, nprocs=world, join=False, start_method="forkserver"
    )
    while not processes.join():
        pass


def _check(rank: int, modules: list[str], folder: str, world: int) -> None:
    _tell(rank, world)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=PATIENCE
    )
    for name, check in checks_of(map(importlib.import_module, modules), world).items():
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


def _script(
    rank: int, script: str, arguments: list[str], printed: str, port: int, world: int
) -> None:
    _tell(rank, world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [script, *arguments]
    with Path(f"{printed}.{rank}").open("w") as output, redirect_stdout(output):
        runpy.run_path(script, run_name="__main__")
    os._exit(0)  # as above


def _tell(rank: int, world: int) -> None:
    """What a launcher says in the environment; and no more threads than a process has cores."""
    torch.set_num_threads(1)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
