"""The large product: blocks of the weight dequantized into L2, a GEMM on each
(kernels/cuda/large_product.c), and the LoRA beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from . import rivals
from .assumptions import ATTAINED, LAUNCH, Device
from .hot_loop import fast_path, innermost, loops
from .instructions import widths
from .launches import Plan, Product
from .lora import Lora
from .toolchain import Kernel
from .work import Work

BYTES = 2
RUN = 8
"""Weights in a 16-byte store."""


@dataclass(frozen=True)
class Dequantize:
    """dequantize_rows<Out, bits, axis>, as work of one warp for 32 weights."""

    nbits: int
    axis: int
    work: Work
    instructions_a_weight: float

    @classmethod
    def of(cls, kernel: Kernel) -> Dequantize | None:
        """Only the kernel for whole rows, and 16-bit output: what training uses."""
        name = r"dequantize_rows<(?:__nv_bfloat16|__half), (\d), (\d)>"
        found = re.search(name, kernel.name)
        if not found:
            return None
        nbits, axis = map(int, found.groups())
        whole = fast_path(kernel.code)
        work, stores = Work.of(whole), widths(whole, ["STG"]).get(128, 0)
        for body in innermost(loops(kernel.code)):  # axis 0 walks down ROWS_A_THREAD rows
            path = fast_path(body)
            inside = widths(path, ["STG"]).get(128, 0)
            if inside:
                more = ROWS_A_THREAD * 8 // nbits - stores
                work.add(Work.of(path), more / inside)
                stores += more
        a_weight = Work()
        a_weight.add(work, 1 / (RUN * stores))
        return cls(nbits, axis, a_weight, a_weight.instructions)


ROWS_A_THREAD = 8
"""dequantize.cu's."""


def dequantize_seconds(device: Device, d: Dequantize, p: Product, weights: float) -> float:
    """Without its launch. Codes and their groups come from memory, the block goes to L2."""
    work = Work()
    work.add(d.work, weights / 32)
    seconds = work.seconds(device)
    # a forward block's rows share their bytes with rows of other blocks: read for each of them
    read = weights * ((1.0 if not p.transpose else p.nbits / 8) + 2 * BYTES / p.group)
    seconds["memory"] = read / device.memory
    seconds["L2"] = (read + BYTES * weights) / device.cache
    return max(seconds.values()) / ATTAINED


def product_seconds(device: Device, d: Dequantize, plan: Plan, p: Product) -> float:
    total = 0.0
    for begin in range(0, p.outputs, plan.width):
        width = min(plan.width, p.outputs - begin)
        block = BYTES * width * p.length
        in_cache = block + BYTES * p.M * width <= device.cache_bytes / 2
        total += 2 * LAUNCH + dequantize_seconds(device, d, p, width * p.length)
        total += rivals.gemm(device, p.M, width, p.length, weight_in_cache=in_cache)
    return total


def roofline(device: Device, p: Product) -> float:
    """The dense product at its own pace, the packed weight being read and a 16-bit one written
    and read in L2 before it."""
    weights = p.N * p.K
    before = max(
        weights * (p.nbits / 8 + 2 * BYTES / p.group) / device.memory,
        BYTES * weights / device.cache,
    )
    return 2 * LAUNCH + before + rivals.gemm(device, p.M, p.outputs, p.length)


def lora_step_seconds(
    device: Device,
    lora: Lora,
    forward: float,
    dgrad: float,
    plans: Sequence[tuple[Plan, Product]],
) -> float:
    """xa, dyb, dA, dB; and the addend, written where the GEMM then adds to it."""
    _, p = plans[0]
    seconds = forward + dgrad
    for width in (p.K, p.N):
        seconds += lora.projection_seconds(device, p.M, width)
        seconds += lora.gradient_seconds(device, p.M, width)
    for plan, product in plans:
        if not plan.small:  # the small product adds the addend itself
            seconds += lora.addend_seconds(device, p.M, product.outputs)
    return seconds
