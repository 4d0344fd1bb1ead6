"""The wide product: many tokens with packed codes on warpgroups' tensor cores
(kernels/cuda/wide_layout.cuh)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import rivals
from .assumptions import (
    ATTAINED,
    CACHE_BYTES_A_CYCLE,
    LAUNCH,
    MEMORY_LATENCY,
    SECTOR,
    WGMMA_CYCLES,
    Device,
)
from .hot_loop import fast_path, hot_loop
from .launches import Plan, Product
from .toolchain import Kernel
from .work import Work

BYTES = 2
OUTPUTS, TOKENS, CHUNK = 256, 128, 64
"""Of a block, and of the reduction at a time."""
WARPS = 8
TOGETHER = 8
"""Tiles of tokens whose blocks run side by side, so that L2 serves the codes to all of them."""


@dataclass(frozen=True)
class Wide:
    """hqq_wide_kernel<hqq_wide<dtype, bits, transpose>, true>, as a warp's work for a chunk."""

    dtype: str
    nbits: int
    transpose: int
    chunk: Work

    @classmethod
    def of(cls, kernel: Kernel) -> Wide | None:
        """Only the kernel for aligned rows."""
        found = re.search(r"hqq_wide_kernel<hqq_wide<(\w+), (\d), (\d)>, true>", kernel.name)
        if not found:
            return None
        dtype, nbits, transpose = found.group(1), int(found.group(2)), int(found.group(3))
        return cls(dtype, nbits, transpose, Work.of(fast_path(hot_loop(kernel.code))))


@dataclass(frozen=True)
class Bounds:
    """Seconds of the whole product."""

    waves: dict[str, float]
    """By resource: what a multiprocessor needs of it for its tiles, one after the other."""
    memory: float
    launches: float
    ends: float
    """A tile's first loads and its stores, which nothing hides: one block a multiprocessor."""
    sums: float
    """The splits' parts, written and read."""

    @property
    def longest(self) -> str:
        return max(self._resources, key=self._resources.__getitem__)

    @property
    def _resources(self) -> dict[str, float]:
        return self.waves | {"memory": self.memory}

    @property
    def bound(self) -> float:
        return max(self._resources.values()) + self.launches + self.ends + self.sums

    @property
    def predicted(self) -> float:
        attained = max(self._resources.values()) / ATTAINED
        return attained + self.launches + self.ends + self.sums

    @property
    def parts(self) -> dict[str, float]:
        return self._resources | {
            "launches": self.launches,
            "ends": self.ends,
            "sums": self.sums,
        }


def _chunk_seconds(device: Device, kernel: Wide) -> dict[str, float]:
    """Of one block on its multiprocessor."""
    work = Work()
    work.add(kernel.chunk, WARPS)
    products = work.units.pop("mma")
    work.units["control"] = work.units.get("control", 0.0) + products  # issued all the same
    # seconds() shares the work between all multiprocessors; here it is one's
    seconds = {n: s * device.multiprocessors for n, s in work.seconds(device).items()}
    quarters = device.quarters / device.multiprocessors
    seconds["tensor cores"] = products * WGMMA_CYCLES / quarters / device.clock
    codes = OUTPUTS * CHUNK * kernel.nbits / 8
    # forward a row's scales come by the sector, sixteen chunks' at a time, which L1 keeps
    scales = 2 * CHUNK * SECTOR if kernel.transpose else 2 * OUTPUTS * BYTES
    moved = TOKENS * CHUNK * BYTES + codes + scales
    seconds["L2"] = moved * device.multiprocessors / device.cache
    return seconds


def bounds(device: Device, kernel: Wide, plan: Plan, p: Product) -> Bounds:
    blocks = plan.wide_token_tiles * plan.wide_output_tiles * plan.wide_splits
    waves = -(-blocks // device.multiprocessors)
    chunks = waves * plan.wide_chunks_per_split
    per_chunk = _chunk_seconds(device, kernel)
    splits = plan.wide_splits if plan.wide_splits > 1 else 0
    out = TOKENS * OUTPUTS * (4 if splits else BYTES)
    end = MEMORY_LATENCY + out / CACHE_BYTES_A_CYCLE / device.clock
    weights = p.N * p.K * (p.nbits / 8 + 2 * BYTES / p.group)
    groups = -(-plan.wide_token_tiles // TOGETHER)
    read = weights * groups + BYTES * p.M * (p.length + p.outputs)
    sums = LAUNCH + 4 * splits * p.M * p.outputs / device.cache / ATTAINED if splits else 0.0
    return Bounds(
        waves={name: chunks * seconds for name, seconds in per_chunk.items()},
        memory=read / device.memory,
        launches=LAUNCH,
        ends=waves * end,
        sums=sums,
    )


def roofline(device: Device, p: Product) -> float:
    """One launch, and a dense product at its own pace."""
    return LAUNCH + rivals.gemm(device, p.M, p.outputs, p.length)
