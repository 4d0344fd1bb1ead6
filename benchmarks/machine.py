"""What the figures were taken on: stamped in every output."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# What decides between the kernels of this library, torch's and hqq's.
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")


def cache_bytes(level: int) -> int:
    """The first core's cache of that level, as the system reports it; 0: unknown."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        kind = (index / "type").read_text().strip()
        if kind != "Instruction" and int((index / "level").read_text()) == level:
            size = (index / "size").read_text().strip()
            return int(size.rstrip("KM")) * {"K": 2**10, "M": 2**20}[size[-1]]
    return 0


def cold_bytes() -> int:
    """How much else is read before a weight is used again: more than the last-level cache
    holds, but no more than 1 GiB."""
    return min(max(int(1.25 * cache_bytes(3)), 2**26), 2**30)


def describe() -> dict[str, Any]:
    """The processor, the versions and the settings."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    found = flags.group(1).split() if flags else []
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": name.group(1) if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in found],
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "cold_bytes": cold_bytes(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "hqqlora")},
        "hqq": peer_version(),
        "HQQLORA_ISA": os.environ.get("HQQLORA_ISA", ""),
        "HQQLORA_KERNEL": os.environ.get("HQQLORA_KERNEL", ""),
    }


def peer_version() -> str | None:
    """hqq's version, or None where it is not installed."""
    try:
        return metadata.version("hqq")
    except metadata.PackageNotFoundError:
        return None


def in_words(machine: dict[str, Any]) -> str:
    """A paragraph for the top of a report."""
    mib = {name: machine[name] // 2**20 for name in ("l2_bytes", "l3_bytes", "cold_bytes")}
    settings = [f"{k}={machine[k]}" for k in ("HQQLORA_ISA", "HQQLORA_KERNEL") if machine[k]]
    busy = (
        f"Another {machine['load']:.1f} threads want these {machine['cores']} cores: with more "
        "than one thread, what follows measures the scheduler as much as the kernels.\n\n"
    )
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags'])}), "
        f"L2 {mib['l2_bytes']} MiB, L3 {mib['l3_bytes']} MiB as reported; "
        f"{machine['threads']} threads, load {machine['load']:.1f}.\n"
        f"hqqlora {machine['hqqlora']}, torch {machine['torch']}, hqq {machine['hqq']}, "
        f"Python {machine['python']}, {machine['date']}. {' '.join(settings)}\n\n"
        + busy
        * (machine["load"] > 0.5 * machine["cores"])
        + "Medians. Contenders take turns in one process; a ratio is the median over the "
        "rounds of that round's ratio, and above 1 where hqqlora is faster. Weights are cold: "
        f"between two uses of one copy, {mib['cold_bytes']} MiB of others are read."
    )
