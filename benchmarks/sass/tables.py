"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import report

from .assumptions import DEVICES_BY_NAME

Facts = Mapping[str, Any]


def _figure(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _widths(counts: Mapping[Any, int]) -> str:
    """128 bits twice and 16 bits four times: 2x128 4x16"""
    return " ".join(f"{count}x{bits}" for bits, count in counts.items())


KERNEL_HEADER = (
    "kernel",
    "registers",
    "local",
    "threads",
    "shared",
    "blocks/SM",
    "loads",
    "stores",
    "loop",
    "mma",
    "ALU/mma",
    "FMA/mma",
    "memory/mma",
    "a weight",
)


def _kernel_line(k: Facts) -> list[str]:
    shared = k["static_shared_bytes"] + k["dynamic_shared_bytes"]
    return [
        k["name"].replace("__nv_bfloat16", "bf16").replace("__half", "fp16"),
        str(k["registers"]),
        str(k["local_instructions"]),
        _figure(k["threads"]),
        str(shared),
        _figure(k["blocks_per_multiprocessor"]),
        _widths(k["global_loads"]),
        _widths(k["global_stores"]),
        str(k["loop_instructions"]),
        str(k["loop_mma"]),
        *(_figure(k[f"loop_{what}_per_mma"]) for what in ("alu", "fma", "memory")),
        _figure(k["instructions_per_weight"]),
    ]


def _is_shown(k: Facts) -> bool:
    """One data type and one architecture stand for all, but what uses local memory is shown."""
    return bool(k["local_instructions"]) or (k["arch"] == "sm_90" and "__half" not in k["name"])


def kernels(found: Sequence[Facts], *, everything: bool = False) -> str:
    parts = []
    for arch in dict.fromkeys(k["arch"] for k in found):
        shown = [k for k in found if k["arch"] == arch and (everything or _is_shown(k))]
        if shown:
            shown.sort(key=lambda k: (k["source"], k["name"]))
            lines = [_kernel_line(k) for k in shown]
            parts.append(f"### Kernels, {arch}\n\n{report.markdown(lines, KERNEL_HEADER)}\n")
    return "\n".join(parts)


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _prediction_line(p: Facts) -> list[str]:
    return [
        f"{p['N']} x {p['K']}",
        str(p["axis"]),
        str(p["M"]),
        p["kernel"],
        _microseconds(p["seconds"]),
        p["bound_by"],
        _figure(p.get("times_roofline")),
        _microseconds(p["dense_seconds"]),
        _microseconds(p["hqq_seconds"]),
        report.times_faster(p["times_dense"]),
        report.times_faster(p["times_hqq"]),
    ]


PREDICTION_HEADER = (
    "weight",
    "axis",
    "M",
    "kernel",
    "us",
    "bound by",
    "of roofline",
    "dense us",
    "hqq us",
    "vs dense",
    "vs hqq",
)
SHOWN_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))


def predictions(found: Sequence[Facts], *, everything: bool = False) -> str:
    """4 bits, groups of 64, bf16."""
    parts = [
        "### Predictions, not measurements: 4 bits, groups of 64, bf16\n\n"
        "`of roofline`: the time of the resource that is used longest, launches and the end of "
        "a shared sum, over one launch and the least bytes and mma instructions. `us` counts "
        "the share of it that kernels commonly attain."
    ]
    for name in DEVICES_BY_NAME if everything else list(DEVICES_BY_NAME)[:1]:
        for operation in dict.fromkeys(p["operation"] for p in found):
            lines = [
                _prediction_line(p)
                for p in found
                if (p["device"], p["operation"]) == (name, operation)
                and (everything or (p["N"], p["K"]) in SHOWN_SHAPES)
            ]
            if lines:
                table = report.markdown(lines, PREDICTION_HEADER)
                parts.append(f"#### {name}, {operation}\n\n{table}")
    return "\n\n".join(parts)
