"""The machine a run is on: processor, versions, memory."""

from __future__ import annotations

import os
import platform
import resource
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads and versions, for the log."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in ("hqqlora", "torch", "transformers", "tokenizers", "gguf")
        },
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(("HQQLORA_", "OMP_"))
        },
    }


def peak_memory() -> int:
    """The most memory that this process has held at a time, in bytes."""
    highest = resident_memory("VmHWM")
    if highest is not None:
        return highest
    # On Linux this may be the parent's, from before the process became this program.
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def resident_memory(key: str) -> int | None:
    """VmRSS (now) or VmHWM (its highest) of this process, in bytes; None: unknown."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


def restart_peak_memory() -> bool:
    """Lets `peak_memory` count anew from here, where the system can (Linux); says whether."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
