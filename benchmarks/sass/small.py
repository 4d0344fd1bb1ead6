"""The small product: packed codes straight to the tensor cores (kernels/cuda/small_*.cuh)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from .assumptions import (
    ARRIVAL,
    ARRIVAL_COUNTED,
    ATTAINED,
    CACHE_BYTES_A_CYCLE,
    CACHE_LATENCY,
    CLUSTER_BARRIER,
    CLUSTER_BYTES_A_CYCLE,
    CLUSTER_LATENCY,
    JOIN,
    LAUNCH,
    MEMORY_LATENCY,
    SECTOR,
    SHARED_BYTES_A_CYCLE,
    Device,
)
from .hot_loop import fast_path, hot_loop, loops, mma_count
from .instructions import Instruction, count_units, widths
from .launches import Plan, Product
from .occupancy import occupancy
from .toolchain import Kernel
from .work import Work

BYTES = 2
UNIT = CHUNK = 64
MMA_CODES = 16 * 16
PAIRS_AT_ONCE = {2: 4, 8: 1}
"""small_pair.cuh: whose parts are on their way together."""
SCALES_AT_ONCE = 8
"""small_layout.cuh's METAS, forward at axis 1."""


@dataclass(frozen=True)
class Instance:
    """hqq_small<T, bits, transpose, axis, token tiles of 8>"""

    dtype: str
    nbits: int
    transpose: int
    axis: int
    token_tiles: int

    @classmethod
    def parse(cls, name: str) -> Instance | None:
        found = re.search(r"hqq_small<(\w+), (\d+), (\d+), (\d+), (\d+)>", name)
        return cls(found[1], *map(int, found.groups()[1:])) if found else None

    @property
    def tokens(self) -> int:
        return 8 * self.token_tiles

    @property
    def warps(self) -> int:
        """Of a block."""
        return 8 if self.token_tiles == 8 and self.nbits < 8 else 4

    @property
    def code_bytes(self) -> int:
        """Of a unit and chunk."""
        return UNIT * CHUNK * self.nbits // 8

    @property
    def chunks_under_way(self) -> int:
        """In a warp, while another is multiplied."""
        stages = 2 if self.nbits == 8 else 3 if (self.nbits, self.token_tiles) == (4, 8) else 4
        return stages - 1

    @property
    def mma_a_chunk(self) -> int:
        """A unit of 64 outputs times a chunk of 64, for each tile of 8 tokens."""
        return UNIT * CHUNK // MMA_CODES * self.token_tiles


@dataclass
class Parts:
    """The kernel's instructions by what they are for; all of one warp."""

    chunk: Work
    """One chunk of one unit."""
    stage: Work
    """Staging one token of one chunk, for all warps that share it."""
    sums: Work
    """Summing up one token of one chunk, likewise; token or not."""
    reduce_steps_a_split: float
    """Waits for L2 of the block that adds the parts up, for each of them, if one way does."""


@cache
def parts_of(kernel: Kernel, instance: Instance) -> Parts:
    """Tells the loops apart by what they move. Of several for the same thing (for memory that
    is aligned or not) the shortest."""
    hot = fast_path(hot_loop(kernel.code))
    chunk = Work()
    chunk.add(Work.of(hot), instance.mma_a_chunk / mma_count(hot))

    stagings, summings, waits = [], [], [1.0]
    for body in loops(kernel.code):
        if mma_count(body):
            continue
        path = fast_path(body)
        stores, loads = widths(path, ["STS"]), widths(path, ["LDG"])
        if loads and stores:  # tokens to shared memory
            stored = 32 * sum(bits // 8 * count for bits, count in stores.items())
            stagings.append(_times(path, CHUNK * BYTES / stored))
        elif _sums_tokens(path):
            summings.append(_times(path, 1 / (32 * stores[32])))
        elif _adds_parts(path):
            moved = sum(bits // 32 * count for bits, count in loads.items())
            waits.append(16 * instance.token_tiles / moved)

    def shortest(works: Sequence[Work]) -> Work:
        return min(works, key=lambda work: work.instructions, default=Work())

    return Parts(chunk, shortest(stagings), shortest(summings), waits[-1])


def _times(path: Sequence[Instruction], times: float) -> Work:
    work = Work()
    work.add(Work.of(path), times)
    return work


def _sums_tokens(path: Sequence[Instruction]) -> bool:
    return bool(
        widths(path, ["LDS"]).get(128)
        and widths(path, ["STS"]).get(32)
        and not widths(path, ["LDG"])
    )


def _adds_parts(path: Sequence[Instruction]) -> bool:
    """Loads that become sums, and nothing else."""
    loads = sum(widths(path, ["LDG"]).values())
    return loads >= 8 and count_units(path)["float"] >= loads


def meta_bytes(instance: Instance, units_of_block: int) -> float:
    """What scale and zero of one unit and chunk move between the caches. At axis 1 each of the
    64 rows has its own sector: forward, eight chunks' are read from it at once; in dgrad the
    block's units use the same ones, for two bytes each."""
    if instance.axis == 0:
        return 2 * BYTES * UNIT
    return 2 * SECTOR * UNIT / (units_of_block if instance.transpose else SCALES_AT_ONCE)


def packed_bytes(product: Product) -> float:
    return product.N * product.K * (product.nbits / 8 + 2 * BYTES / product.group)


@dataclass
class Bounds:
    """Seconds that each resource needs at least; the longest decides."""

    seconds: dict[str, float]
    launches: float
    tail: float
    """After the last chunk: adding the parts of a sum that warps or blocks share."""

    @property
    def longest(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def bound(self) -> float:
        """If everything overlaps that can."""
        return self.launches + self.seconds[self.longest] + self.tail

    @property
    def predicted(self) -> float:
        return self.launches + self.seconds[self.longest] / ATTAINED + self.tail


def bounds(
    device: Device,
    kernel: Kernel,
    instance: Instance,
    shared_bytes: int,
    plan: Plan,
    p: Product,
) -> Bounds:
    parts = parts_of(kernel, instance)
    chunks = plan.units * p.length / CHUNK * plan.token_tiles  # of all warps
    staged = plan.tiles * p.length / CHUNK  # panels' chunks
    alive = p.M / plan.token_tiles  # tokens there, of a tile
    work = Work()
    work.add(parts.chunk, chunks)
    work.add(parts.stage, staged * alive)
    work.add(parts.sums, staged * plan.tokens)

    warps = instance.warps
    resident = occupancy(
        device.arch, kernel.registers, 32 * warps, kernel.static_shared_bytes + shared_bytes
    ).blocks
    # whole chunks, in whole blocks, in waves of them (pairs of blocks, too, fit all
    # multiprocessors: these come in twos)
    full = plan.blocks * 4 * plan.busiest_chunks
    uneven = _unevenness(plan.blocks, device.multiprocessors, resident) * full / chunks
    seconds = {name: value * uneven for name, value in work.seconds(device).items()}

    split = plan.parts > 1
    part_bytes = 4 * UNIT * plan.tokens * plan.units * plan.parts * plan.token_tiles
    rows = BYTES * p.M * (p.N + p.K)
    under_way = min(plan.blocks, resident * device.multiprocessors) * warps
    under_way *= instance.chunks_under_way * instance.code_bytes
    rate = min(device.memory, under_way / MEMORY_LATENCY)
    seconds["memory"] = (packed_bytes(p) + rows) / rate
    tokens = BYTES * p.M * p.length * plan.tiles / plan.token_tiles
    codes = instance.code_bytes + meta_bytes(instance, plan.units_of_block)
    moved = chunks * codes + tokens + 2 * part_bytes * split
    seconds["L2"] = moved / device.cache
    # where no other block works meanwhile, every wave waits for its pairs
    waves = -(-plan.blocks // device.multiprocessors) if resident == 1 else 1
    tail = waves * _meeting(device, instance, plan) if plan.paired else 0.0
    tail += _reduction(device, parts, instance, plan) if split else 0.0
    tail += JOIN if plan.ways > 1 else 0.0
    return Bounds(seconds, LAUNCH, tail)


def _reduction(device: Device, parts: Parts, instance: Instance, plan: Plan) -> float:
    """From the last chunk of a split sum to its end: the block's arrival, then what the last
    one reads: the parts (but its own, up to 16 tokens), some at a time, and no faster than a
    multiprocessor reads."""
    counted = int(device.arch.removeprefix("sm_")) >= 90
    # of 64 tokens two ways add up half each
    gatherers = 2 if instance.token_tiles == 8 and plan.ways > 1 else 1
    waits = parts.reduce_steps_a_split / gatherers * CACHE_LATENCY
    if plan.paired:
        waits = CACHE_LATENCY / PAIRS_AT_ONCE[instance.token_tiles]
    own = instance.token_tiles <= 2 or plan.paired
    others = plan.parts - (1 if own else 0)
    part_bytes = _sum_bytes(instance, plan) / (2 if plan.paired else 1)
    reads = part_bytes / (CACHE_BYTES_A_CYCLE * device.clock)
    return (ARRIVAL_COUNTED if counted else ARRIVAL) + others * max(waits, reads)


def _sum_bytes(instance: Instance, plan: Plan) -> int:
    """A block's accumulators."""
    return 4 * UNIT * plan.units_of_block * instance.tokens


def _meeting(device: Device, instance: Instance, plan: Plan) -> float:
    """From a pair's last chunk to its sum: half of a block's sums to its own shared memory, the
    cluster's barrier (without a fence of the device), as much from the other's. Before a block
    ends another barrier, which hides behind the other parts of the sum, if there are any."""
    half = _sum_bytes(instance, plan) / 2
    cycles = half / SHARED_BYTES_A_CYCLE + CLUSTER_BARRIER
    cycles += CLUSTER_LATENCY + half / CLUSTER_BYTES_A_CYCLE
    return cycles / device.clock + (last_barrier(device) if plan.parts == 1 else 0.0)


def last_barrier(device: Device) -> float:
    """What a cluster's last barrier, which blocks arrive at before they store, adds to the way
    of these stores to L2: the kernel's end waits for both."""
    return max(0.0, CLUSTER_BARRIER / device.clock - CACHE_LATENCY)


def _unevenness(blocks: int, multiprocessors: int, resident: int) -> float:
    """The busiest multiprocessor's blocks over the mean, blocks being handed out in waves."""
    if resident == 0:
        return float("inf")
    in_a_wave = multiprocessors * resident
    full, rest = divmod(blocks, in_a_wave)
    busiest = full * resident + -(-rest // multiprocessors)
    return busiest * multiprocessors / blocks


def roofline(device: Device, p: Product) -> float:
    """One launch, each byte once, and the product's mma instructions, if nothing else took
    time."""
    memory = (packed_bytes(p) + BYTES * p.M * (p.N + p.K)) / device.memory
    mma = 2.0 * p.M * p.N * p.K / device.mma_flops
    return LAUNCH + max(memory, mma)
