"""What the figures were taken on."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hqqlora", "torch", "bitsandbytes", "hqq", "triton")


def _ask(*command: str) -> str:
    """The first line of what a program prints, or nothing."""
    program = shutil.which(command[0])
    if not program:
        return ""
    done = subprocess.run([program, *command[1:]], text=True, capture_output=True, cwd=ROOT)
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Of the checkout, with "+" where files differ from it; "unknown" outside of one."""
    name = _ask("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    return name + "+" * bool(_ask("git", "status", "--porcelain", "--untracked-files=no"))


def describe(device: str) -> dict[str, Any]:
    """The device, its driver, the versions."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "device": platform.processor() or platform.machine(),
        "driver": "",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        facts |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _ask("nvidia-smi", query, "--format=csv,noheader"),
        }
    return facts


def in_words(facts: dict[str, Any]) -> str:
    """A paragraph for the top of the table."""
    versions = [f"{name} {facts[name]}" for name in PACKAGES if facts[name]]
    device = facts["device"]
    if facts["driver"]:
        device += (
            f" (compute capability {facts['compute_capability']}, "
            f"{facts['multiprocessors']} multiprocessors, "
            f"{facts['memory_bytes'] / 2**30:.0f} GiB, "
            f"L2 {facts['l2_bytes'] / 2**20:.0f} MiB), "
            f"driver {facts['driver']}, clocks and power limit {facts['clocks']}"
        )
    return (
        f"{device}; CUDA {facts['cuda']}, {', '.join(versions)}, Python {facts['python']}; "
        f"commit {facts['commit']}, {facts['date']}."
    )
