"""The LoRA side of a training step, from the skinny kernels' machine code
(kernels/cuda/lora_*.cu): bytes against the instructions that a multiplication costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .assumptions import ATTAINED, LAUNCH, Device
from .hot_loop import fast_path, innermost, loops, mma_count
from .toolchain import Kernel, ToolError
from .work import Work

BYTES = 2
RANK = 16
PLANES = 3
"""An fp32 factor is three bf16 (kernels/cuda/lora_mma.cuh)."""
MMA_PRODUCTS = 16 * 8 * 16


def products_of(work: Work) -> float:
    """Multiplications that a warp's instructions do: of tensor cores where there are any, else
    by all float instructions."""
    if work.count("mma"):
        return MMA_PRODUCTS / PLANES * work.count("mma")
    return 32 * work.count("float")


def _work_a_product(kernel: Kernel) -> Work:
    """Of the innermost loop that multiplies most an instruction; tensor cores where there are
    any."""
    paths = [fast_path(body) for body in innermost(loops(kernel.code))]
    works = [Work.of(path) for path in paths if not mma_count(kernel.code) or mma_count(path)]
    best = max(works, key=lambda w: products_of(w) / w.instructions, default=None)
    if best is None or not products_of(best):
        raise ToolError(f"{kernel.name}: no loop that multiplies")
    one = Work()
    one.add(best, 1 / products_of(best))
    return one


@dataclass(frozen=True)
class Lora:
    """Work of one multiplication in each kernel."""

    projection: Work
    """xa = x A^T, dyb = dy B"""
    gradient: Work
    """dA, dB"""
    addend: Work
    """written for the large product to add to"""

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> Lora:
        def find(pattern: str) -> Work:
            for kernel in kernels:
                if re.search(pattern, kernel.name):
                    return _work_a_product(kernel)
            raise ToolError(f"no kernel is called {pattern}")

        return cls(
            projection=find(rf"lora_mma<{RANK}, true, {PLANES}>"),
            gradient=find(rf"lora_mma<{RANK}, false, {PLANES}>"),
            addend=find(r"write_addend<__nv_bfloat16\b"),
        )

    def projection_seconds(self, device: Device, M: int, width: int) -> float:
        return _skinny(device, self.projection, M, width)

    def gradient_seconds(self, device: Device, M: int, width: int) -> float:
        """A sum over M is split, and its parts are added by a second kernel."""
        return _skinny(device, self.gradient, M, width) + LAUNCH

    def addend_seconds(self, device: Device, M: int, width: int) -> float:
        return _skinny(device, self.addend, M, width)


def _skinny(device: Device, one: Work, M: int, width: int) -> float:
    """A kernel that reads or writes [M, width] once and multiplies by R at each element."""
    work = Work()
    work.add(one, float(M) * width * RANK)
    seconds = [*work.seconds(device).values(), BYTES * M * width / device.memory]
    return LAUNCH + max(seconds) / ATTAINED
