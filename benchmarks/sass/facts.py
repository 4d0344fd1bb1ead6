"""The figures of one kernel that gates and tables know by name."""

from __future__ import annotations

from typing import Any

from . import instructions
from .hot_loop import fast_path, hot_loop, mma_count
from .instructions import count_units
from .large import Dequantize
from .launches import Launch
from .occupancy import occupancy
from .small import CHUNK, UNIT, Instance, parts_of
from .toolchain import Kernel

LOADS = ("LDG", "LDGSTS")
STORES = ("STG",)
FMA = ("float", "half", "multiply")
MEMORY = ("global", "shared", "shuffle", "local")


def _per(count: int, mma: int) -> float | None:
    return round(count / mma, 2) if mma else None


def facts_of(kernel: Kernel, launch: Launch | None = None) -> dict[str, Any]:
    """`launch` is what only the host code knows: threads and dynamic shared memory.

    Counts of the loop are of its fast path: one iteration with full tiles.
    """
    threads = launch.threads if launch else kernel.max_threads
    dynamic = launch.dynamic_shared_bytes() if launch else 0
    loop = fast_path(hot_loop(kernel.code))
    units = count_units(loop)
    mma = mma_count(loop)
    whole = count_units(kernel.code)
    loads = instructions.widths(kernel.code, LOADS)
    stores = instructions.widths(kernel.code, STORES)
    resident = (
        occupancy(kernel.arch, kernel.registers, threads, kernel.static_shared_bytes + dynamic)
        if threads
        else None
    )
    return {
        "name": kernel.name,
        "arch": kernel.arch,
        "source": kernel.source,
        "threads": threads,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack_bytes,
        "local_instructions": whole["local"],
        "static_shared_bytes": kernel.static_shared_bytes,
        "dynamic_shared_bytes": dynamic,
        "blocks_per_multiprocessor": resident.blocks if resident else None,
        "warps_per_multiprocessor": resident.warps if resident else None,
        "limited_by": resident.limited_by if resident else None,
        "instructions": len(kernel.code),
        "unknown_opcodes": sorted(
            {i.base for i in kernel.code if instructions.unit_of(i) == "unknown"}
        ),
        "unknown_instructions": whole["unknown"],
        "global_loads": loads,
        "global_stores": stores,
        "wide_loads": loads.get(128, 0),
        "wide_stores": stores.get(128, 0),
        "loop_instructions": len(loop),
        "loop_units": dict(units),
        "loop_mma": mma,
        "loop_wide_loads": instructions.widths(loop, LOADS).get(128, 0),
        "loop_divisions": units["special"],
        "loop_instructions_per_mma": _per(len(loop), mma),
        "loop_alu_per_mma": _per(units["alu"], mma),
        "loop_fma_per_mma": _per(sum(units[u] for u in FMA), mma),
        "loop_memory_per_mma": _per(sum(units[u] for u in MEMORY), mma),
        "instructions_per_weight": instructions_per_weight(kernel),
    }


def instructions_per_weight(kernel: Kernel) -> float | None:
    """A lane's, in the kernels that walk over a weight: for the small products with all tokens
    of a block there, their staging included."""
    instance = Instance.parse(kernel.name)
    if instance:
        parts = parts_of(kernel, instance)
        stage = parts.stage.instructions + parts.sums.instructions
        chunk = parts.chunk.instructions + stage * instance.tokens / instance.warps
        return round(chunk * 32 / (UNIT * CHUNK), 3)
    dequantize = Dequantize.of(kernel)
    return round(dequantize.instructions_a_weight, 3) if dequantize else None
