"""What the same product takes by other means: dense in 16 bits, and hqq's way."""

from __future__ import annotations

from .assumptions import ATTAINED, HQQ_BYTES_A_WEIGHT, HQQ_KERNELS, LAUNCH, Device

BYTES = 2
TILES = {(128, 256): 1.0, (128, 128): 1.15, (64, 128): 1.3, (16, 128): 1.6}
"""Rows and columns of a GEMM's tiles, and what loading each element more often costs."""


def _waves_seconds(device: Device, M: int, outputs: int, length: int) -> float:
    """Arithmetic of a GEMM as its tiles fill the multiprocessors, with the sum split (1.25)
    where there are too few: the best choice of tiles."""
    best = float("inf")
    for (rows, width), factor in TILES.items():
        tiles = -(-M // rows) * -(-outputs // width)
        tile = 2.0 * rows * width * length * factor * device.multiprocessors / device.dense
        splits = min(device.multiprocessors // tiles, 16)
        waves = -(-tiles // device.multiprocessors)
        best = min(best, 1.25 * tile / splits if splits >= 2 else waves * tile)
    return best


def gemm(
    device: Device, M: int, outputs: int, length: int, *, weight_in_cache: bool = False
) -> float:
    """One GEMM, without its launch."""
    weight = BYTES * outputs * length
    rows = BYTES * M * (outputs + length)
    memory = (rows + (0 if weight_in_cache else weight)) / device.memory
    cache = (rows + weight) / device.cache
    return max(max(memory, cache) / ATTAINED, _waves_seconds(device, M, outputs, length))


def dense(device: Device, M: int, outputs: int, length: int) -> float:
    return LAUNCH + gemm(device, M, outputs, length)


def hqq(device: Device, M: int, outputs: int, length: int) -> float:
    """Its passes over the whole weight, then the dense product."""
    passes = HQQ_BYTES_A_WEIGHT * outputs * length / device.memory + HQQ_KERNELS * LAUNCH
    return passes + dense(device, M, outputs, length)


def streamed(device: Device, *byte_counts: float) -> float:
    """Kernels that do little but move bytes, one launch each."""
    return sum(LAUNCH + count / device.memory / ATTAINED for count in byte_counts)


def dense_lora_step(device: Device, M: int, N: int, K: int) -> float:
    """Forward and backward of a frozen dense weight with a hand-written LoRA in 16 bits, each
    tensor moved as seldom as separate ops can: xa reads x; y += xa B^T reads and writes y; dyb
    and dB read dy; dx += dyb A reads and writes dx; dA reads x. The skinny products' arithmetic
    is free."""
    x, y = BYTES * M * K, BYTES * M * N
    products = dense(device, M, N, K) + dense(device, M, K, N)
    return products + streamed(device, x, 2 * y, y, y, 2 * x, x)
