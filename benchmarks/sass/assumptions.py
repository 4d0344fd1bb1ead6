"""Everything that the predictions take for granted, each value in one place.

None of it was measured by this project. Peaks are the makers'; shares of peaks are what is
commonly attained. gpu_bench.py puts measurements beside the predictions: correct this file by
them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    name: str
    arch: str
    multiprocessors: int
    clock: float
    """Hz under load."""
    memory: float
    """Bytes a second that a well-written kernel attains: 0.9 of the peak."""
    cache: float
    """Bytes a second out of and into L2."""
    cache_bytes: int
    dense: float
    """Flop/s that cuBLAS attains in bf16 with large shapes: 0.8 of the peak."""
    mma_cycles: float
    """Between two mma.sync m16n8k16 (fp32 accumulators) in a quarter of a multiprocessor."""

    @property
    def quarters(self) -> int:
        """Each has a scheduler, which issues one instruction a cycle."""
        return 4 * self.multiprocessors

    @property
    def mma_flops(self) -> float:
        """Flop/s with mma.sync alone."""
        return self.quarters * self.clock * (2 * 16 * 8 * 16) / self.mma_cycles


H100 = Device(
    name="H100",  # SXM: 3.35 TB/s, 989 TFLOP/s
    arch="sm_90",
    multiprocessors=132,
    clock=1.7e9,
    memory=3.0e12,
    cache=5.5e12,
    cache_bytes=50 * 2**20,
    dense=790e12,
    mma_cycles=6.5,  # the peak's 4 cycles need wgmma; mma.sync attains about 62 % of it
)
A100 = Device(
    name="A100",  # SXM, 80 GB: 2.04 TB/s, 312 TFLOP/s
    arch="sm_80",
    multiprocessors=108,
    clock=1.41e9,
    memory=1.83e12,
    cache=4.0e12,
    cache_bytes=40 * 2**20,
    dense=250e12,
    mma_cycles=8.0,  # the peak
)
RTX4090 = Device(
    name="RTX 4090",  # 1.01 TB/s, 165 TFLOP/s with fp32 accumulators
    arch="sm_89",
    multiprocessors=128,
    clock=2.52e9,
    memory=0.91e12,
    cache=4.5e12,
    cache_bytes=72 * 2**20,
    dense=132e12,
    mma_cycles=32.0,  # the peak
)
DEVICES = (H100, A100, RTX4090)

DEVICES_BY_NAME = {device.name: device for device in DEVICES}

# Instructions of a warp that a quarter of a multiprocessor starts in a cycle, by unit (see
# instructions.UNITS): the programming guide's throughputs, over 4 quarters and 32 lanes. Units
# that share a pipe are added up by PIPES. One instruction a cycle is issued in all.
_RATES_SM90 = {
    "alu": 0.5,
    "float": 1.0,
    "half": 1.0,
    "multiply": 0.5,
    "special": 0.125,
    "double": 0.5,
    "uniform": 0.5,
}
RATES = {
    "sm_80": _RATES_SM90 | {"float": 0.5, "double": 0.25},
    "sm_86": _RATES_SM90 | {"half": 0.5, "double": 1 / 64},
    "sm_89": _RATES_SM90 | {"half": 0.5, "double": 1 / 64},
    "sm_90": _RATES_SM90,
    "sm_100": _RATES_SM90,
    "sm_120": _RATES_SM90 | {"half": 0.5, "double": 1 / 64},
}
UNKNOWN_RATE = 0.5
PIPES = {
    "ALU": ("alu", "unknown"),
    "FMA": ("float", "half", "multiply"),
    "special": ("special",),
    "double": ("double",),
    "uniform": ("uniform",),
}

LAUNCH = 1.25e-6
"""Seconds from the end of one kernel's work to the start of the next one's in a stream that the
host keeps filled. Every kernel pays it, the rivals' too."""

WGMMA_CYCLES = 64.0
"""Of a quarter of a multiprocessor, for its part of a wgmma m64n128k16: the peak."""

CACHE_LATENCY = 0.18e-6
"""Seconds of a load from L2 that nothing hides: a step of a loop that waits for its loads."""

ARRIVAL = 1.0e-6
"""What a block of a split sum waits at its end: its parts visible to all (a fence), its mark
too (another), then the others' marks from L2."""

ARRIVAL_COUNTED = 0.65e-6
"""The same where one 16-byte compare and exchange counts the blocks (sm_90 on): a fence, 0.4 us
of those 1.0, and an atomic's way to L2 and back, of which a load takes CACHE_LATENCY."""

CACHE_BYTES_A_CYCLE = 64
"""What one multiprocessor can read from L2, whatever the others do: its port (A100, H100)."""

CLUSTER_LATENCY = 180
"""Cycles from a load of another multiprocessor's shared memory to its data. Measured by Luo et
al. on an H800 PCIe: Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, 2024,
arXiv:2402.13499."""

CLUSTER_BARRIER = 2 * CLUSTER_LATENCY
"""Cycles that a cluster's barrier takes: there and back. Not measured."""

CLUSTER_BYTES_A_CYCLE = 16
"""What a multiprocessor reads from another's shared memory in clusters of two, all of them at
the same time: the 3.27 TB/s of the same authors, over 114 multiprocessors at 1.755 GHz."""

LARGER_CLUSTER_BYTES_A_CYCLE = 13
"""The same in clusters of four, and taken for those of three: their 2.65 TB/s."""

SHARED_BYTES_A_CYCLE = 128
"""To or from a multiprocessor's own shared memory."""

JOIN = 0.2e-6
"""The same for the sums that warps of a block share: to shared memory, a barrier, and back."""

MEMORY_LATENCY = 0.7e-6
"""Seconds from a load to its data, memory being busy: what is not under way meanwhile does not
use the memory's rate."""

SECTOR = 32
"""Bytes that move between the caches for any load of one of them."""

ATTAINED = 0.85
"""The share of its bound that a kernel attains, ours and cuBLAS's with few rows alike."""

HQQ_BYTES_A_WEIGHT = 14.0
HQQ_KERNELS = 7
"""hqq dequantizes in seven elementwise kernels before a dense product."""
