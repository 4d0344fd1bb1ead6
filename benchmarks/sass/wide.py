"""The wide product: many tokens with packed codes on warpgroups' tensor cores
(kernels/cuda/wide_layout.cuh)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from . import rivals, small
from .assumptions import (
    ATTAINED,
    CACHE_BYTES_A_CYCLE,
    CLUSTER_BARRIER,
    CLUSTER_BYTES_A_CYCLE,
    CLUSTER_LATENCY,
    LARGER_CLUSTER_BYTES_A_CYCLE,
    LAUNCH,
    MEMORY_LATENCY,
    SECTOR,
    SHARED_BYTES_A_CYCLE,
    WGMMA_CYCLES,
    Device,
)
from .hot_loop import fast_path, hot_loop
from .launches import Plan, Product
from .toolchain import Kernel
from .work import Work

BYTES = 2
OUTPUTS, CHUNK = 256, 64
"""Of a block, and of the reduction at a time."""
FEW = 64
"""Tokens of a block, else 128."""
WARPS = 8
TOGETHER = 8
"""Tiles of tokens whose blocks run side by side, so that L2 serves the codes to all of them."""


@dataclass(frozen=True)
class Wide:
    """hqq_wide_kernel<hqq_wide<dtype, bits, transpose, tokens>, true>, as a warp's work for a
    chunk."""

    dtype: str
    nbits: int
    transpose: int
    tokens: int
    chunk: Work

    @classmethod
    def of(cls, kernel: Kernel) -> Wide | None:
        """Only the kernel for aligned rows."""
        form = r"hqq_wide_kernel<hqq_wide<(\w+), (\d), (\d), (\d+)>, true>"
        found = re.search(form, kernel.name)
        if not found:
            return None
        nbits, transpose, tokens = map(int, found.groups()[1:])
        chunk = Work.of(fast_path(hot_loop(kernel.code)))
        return cls(found[1], nbits, transpose, tokens, chunk)


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
    """The splits' parts, written and read; or their meeting in a cluster."""

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


def _chunk_bytes(kernel: Wide) -> float:
    """What one block moves from L2 for a chunk."""
    codes = OUTPUTS * CHUNK * kernel.nbits / 8
    # forward a row's scales come by the sector, sixteen chunks' at a time, which L1 keeps
    scales = 2 * CHUNK * SECTOR if kernel.transpose else 2 * OUTPUTS * BYTES
    return kernel.tokens * CHUNK * BYTES + codes + scales


def _chunk_seconds(device: Device, kernel: Wide) -> dict[str, float]:
    """Of one block on its multiprocessor."""
    work = Work()
    work.add(kernel.chunk, WARPS)
    products = work.units.pop("mma")
    work.units["control"] = work.units.get("control", 0.0) + products  # issued all the same
    # seconds() shares the work between all multiprocessors; here it is one's
    seconds = {n: s * device.multiprocessors for n, s in work.seconds(device).items()}
    quarters = device.quarters / device.multiprocessors
    cycles = WGMMA_CYCLES * kernel.tokens / 128
    seconds["tensor cores"] = products * cycles / quarters / device.clock
    return seconds


def bounds(device: Device, kernel: Wide, plan: Plan, p: Product) -> Bounds:
    blocks = plan.wide_token_tiles * plan.wide_output_tiles * plan.wide_splits
    waves = -(-blocks // device.multiprocessors)
    chunks = waves * plan.wide_chunks_per_split
    resources = {n: chunks * s for n, s in _chunk_seconds(device, kernel).items()}
    moved = _chunk_bytes(kernel)
    if kernel.tokens == FEW:  # as of the small product, with which it competes
        full = plan.wide_output_tiles * p.length / CHUNK
        port = chunks * moved / (CACHE_BYTES_A_CYCLE * device.clock)
        resources["L2"] = max(full * moved / device.cache, port)
    else:  # each multiprocessor has its share, whether others are idle or not
        resources["L2"] = chunks * moved * device.multiprocessors / device.cache
    weights = p.N * p.K * (p.nbits / 8 + 2 * BYTES / p.group)
    groups = -(-plan.wide_token_tiles // TOGETHER)
    read = weights * groups + BYTES * p.M * (p.length + p.outputs)
    return Bounds(
        waves=resources,
        memory=read / device.memory,
        launches=LAUNCH,
        ends=waves * _end(device, kernel, plan),
        sums=waves * _meeting(device, kernel, plan) + _parts(device, plan, p),
    )


def _end(device: Device, kernel: Wide, plan: Plan) -> float:
    """A tile's first loads and its stores, which nothing hides."""
    out = kernel.tokens * OUTPUTS * BYTES
    if plan.wide_cluster:
        out //= plan.wide_splits
    elif plan.wide_splits > 1:
        out *= 2  # fp32
    return MEMORY_LATENCY + out / CACHE_BYTES_A_CYCLE / device.clock


def _parts(device: Device, plan: Plan, p: Product) -> float:
    """Of splits that are no cluster: left in the workspace, and added up by a second kernel."""
    if plan.wide_cluster or plan.wide_splits == 1:
        return 0.0
    return LAUNCH + 4 * plan.wide_splits * p.M * p.outputs / device.cache / ATTAINED


def _meeting(device: Device, kernel: Wide, plan: Plan) -> float:
    """From a cluster's last chunk to its sums: a block's to its own shared memory, the
    cluster's barrier, a share of the tokens from the others', and another barrier, beside which
    the block stores."""
    if not plan.wide_cluster:
        return 0.0
    sums = 4 * OUTPUTS * kernel.tokens
    rate = CLUSTER_BYTES_A_CYCLE if plan.wide_splits == 2 else LARGER_CLUSTER_BYTES_A_CYCLE
    cycles = sums / SHARED_BYTES_A_CYCLE + CLUSTER_BARRIER + CLUSTER_LATENCY
    cycles += sums * (1 - 1 / plan.wide_splits) / rate
    return cycles / device.clock + small.last_barrier(device)


def roofline(device: Device, plan: Plan, p: Product) -> float:
    """One launch, and a dense product at its own pace; of few tokens each byte once, or the
    product at a dense one's pace."""
    if plan.wide_tokens == FEW:
        memory = (small.packed_bytes(p) + BYTES * p.M * (p.N + p.K)) / device.memory
        return LAUNCH + max(memory, 2.0 * p.M * p.N * p.K / device.dense)
    return LAUNCH + rivals.gemm(device, p.M, p.outputs, p.length)
