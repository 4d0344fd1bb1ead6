"""What a contender needs of memory, measured in a process of its own.

Four figures, in bytes of resident memory as Linux counts it (the interpreter and its libraries
are resident, too, and so is what is mapped from files):

- ``loading``: the most while the dense model is loaded, which all do first, and made into the
  contender.
- ``training``: the most in a step (the second: the first one lacks the optimizer's state).
- ``step``: by how much that exceeds what is resident between two steps.
- ``held``: what a contender holds between two steps, which is what becomes free when it is
  dropped in the end: weights, adapters, the optimizer's state.

What the allocator keeps without need is given back before a moment is looked at. The steps are
on random tokens: memory depends on their number alone.

A process of its own, since freed memory is used again: in one process the first contender would
pay for all. (Nor can ``ru_maxrss`` serve: a new process inherits its parent's.)
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from hqqlora.bench.contenders import make_contender
from hqqlora.bench.options import BenchOptions
from hqqlora.command.errors import RunError, first_line
from hqqlora.command.machine import resident_memory, restart_peak_memory
from hqqlora.command.model_source import choose_dtype, find_model, load_dense_model


def can_measure() -> bool:
    """Whether this system tells a process its peak memory, and lets it start anew."""
    return resident_memory("VmHWM") is not None and restart_peak_memory()


def measure_memory(name: str, options: BenchOptions) -> dict[str, int]:
    """The four figures of a contender, from a new process.

    Raises:
        RunError: that process failed; with its last words.
    """
    given = json.dumps(dataclasses.asdict(options))
    command = [sys.executable, "-m", "hqqlora.bench.memory", name, given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise RunError(f"{name}: cannot measure its memory: {words[-1]}")
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _measure_here(name: str, options: BenchOptions) -> dict[str, int]:
    if options.threads:
        torch.set_num_threads(options.threads)
    dense = load_dense_model(find_model(options.model), choose_dtype(options.dtype))
    vocabulary = int(dense.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.randint(vocabulary, (2, options.batch, options.sequence_length))
    loading = _known("VmHWM")
    _take_out_of_file(dense)
    _settled()
    restart_peak_memory()
    contender = make_contender(name, dense, options.rank)
    del dense
    loading = max(loading, _known("VmHWM"))
    contender.step(ids[0])
    _settled()
    restart_peak_memory()
    contender.step(ids[1])
    training = _known("VmHWM")
    between_steps = _settled()
    del contender
    return {
        "loading": loading,
        "training": training,
        "step": training - between_steps,
        "held": between_steps - _settled(),
    }


def _take_out_of_file(model: nn.Module) -> None:
    """Copies weights that are mapped from a safetensors file: they stay resident, all of them,
    as long as one of them is used, and would count for those who have replaced the rest."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _settled() -> int:
    """Resident bytes, once what is not needed has been given back."""
    gc.collect()
    with suppress(OSError, AttributeError):  # other C libraries keep nothing, or do not tell
        ctypes.CDLL(None).malloc_trim(0)
    return _known("VmRSS")


def _known(key: str) -> int:
    value = resident_memory(key)
    assert value is not None, f"/proc/self/status has no {key}"
    return value


def _main(name: str, given: str) -> int:
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(given).items()
    }
    try:
        print(json.dumps(_measure_here(name, BenchOptions(**values))))
    except (RunError, MemoryError, RuntimeError) as error:
        print(first_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
