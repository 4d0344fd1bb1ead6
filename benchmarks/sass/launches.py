"""What the library's host code decides: asked of itself, through launch_plan.cu."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from . import toolchain
from .assumptions import Device
from .occupancy import LIMITS

KERNELS = toolchain.ROOT / "kernels"
SOURCES = (
    Path(__file__).with_name("launch_plan.cu"),
    KERNELS / "cuda/device.cu",
    KERNELS / "cuda/small_dot.cu",
    KERNELS / "cuda/block_width.c",
    KERNELS / "cuda/choose_kernel.c",
    KERNELS / "cuda/wide_product.c",
    KERNELS / "status.c",
)


class Product(NamedTuple):
    """One product with a weight, forward (transpose 0) or dgrad (1)."""

    N: int
    K: int
    M: int
    transpose: int
    axis: int
    nbits: int = 4
    group: int = 64

    @property
    def outputs(self) -> int:
        return self.K if self.transpose else self.N

    @property
    def length(self) -> int:
        """What is summed over."""
        return self.N if self.transpose else self.K


class Plan(NamedTuple):
    small: int
    """Whether the small product serves, else the wide one, or blocks of `width` outputs."""
    tokens: int
    token_tiles: int
    units: int
    units_of_block: int
    """Side by side in a block; each of them `ways` times, for parts of the reduction."""
    chunks: int
    chunks_per_split: int
    busiest_chunks: int
    """Of a quarter of a block's multiprocessor."""
    ways: int
    splits: int
    paired: int
    """Whether two splits at a time are a cluster."""
    width: int
    wide: int
    """Whether the wide product serves, with these:"""
    wide_tokens: int
    """Of a block."""
    wide_token_tiles: int
    wide_output_tiles: int
    wide_splits: int
    wide_chunks_per_split: int
    wide_cluster: int
    """Whether these are a cluster."""

    @property
    def tiles(self) -> int:
        """Of outputs and tokens: what a block does, whichever its split."""
        return -(-self.units // self.units_of_block) * self.token_tiles

    @property
    def parts(self) -> int:
        """Of a sum, that meet in the workspace."""
        return self.splits // 2 if self.paired else self.splits

    @property
    def blocks(self) -> int:
        """Of the small product."""
        return self.tiles * self.splits


class Launch(NamedTuple):
    threads: int
    shared_bytes_without_ways: int
    way_bytes: int

    def dynamic_shared_bytes(self, ways: int = 1) -> int:
        return self.shared_bytes_without_ways + ways * self.way_bytes


@dataclass(frozen=True)
class Launches:
    program: Path

    @cache  # noqa: B019  (few, and as long-lived as the process)
    def instances(self) -> dict[str, Launch]:
        """By name, as in the machine code: hqq_small<__nv_bfloat16, 4, 0, 1, 8>."""
        found = {}
        for line in toolchain.run(str(self.program), "instances").splitlines():
            name, *figures = line.split(" | ")
            found[name] = Launch(*map(int, figures))
        return found

    def of(self, kernel: str) -> Launch | None:
        instance = instance_of(kernel)
        return self.instances().get(instance) if instance else None

    def plans(self, device: Device, products: Sequence[Product]) -> dict[Product, Plan]:
        shared = LIMITS[device.arch].shared_bytes_a_block
        capability = device.arch.removeprefix("sm_")
        asked = [str(device.multiprocessors), capability, str(device.cache_bytes), str(shared)]
        given = "".join(" ".join(map(str, product)) + "\n" for product in products)
        printed = toolchain.run(str(self.program), "plan", *asked, given=given).splitlines()
        return {
            product: Plan(*map(int, line.split()))
            for product, line in zip(products, printed, strict=True)
        }


def instance_of(kernel: str) -> str | None:
    """The hqq_small<...> or hqq_wide<...> of a product's name."""
    found = re.search(r"hqq_(?:small|wide)<[^<>]*>", kernel)
    return found.group(0) if found else None


def build(kernel_names: Iterable[str], folder: Path) -> Launches:
    """Compiles launch_plan.cu for the instances among these kernels (again only if something
    changed). Its device code is never run, so it is not optimised."""
    instances = sorted({name for name in map(instance_of, kernel_names) if name})
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "instances.inc"
    text = "".join(
        f"{'WIDE' if name.startswith('hqq_wide') else 'SMALL'}({name})\n" for name in instances
    )
    if not listed.exists() or listed.read_text() != text:
        listed.write_text(text)
    includes = [f"-I{toolchain.ROOT / path}" for path in toolchain.INCLUDES]
    flags = ["-std=c++17", "-O0", "-Xcicc", "-O0", "-Xptxas", "-O0", "-arch=sm_80"]
    flags += ["-DHQQ_CUDA_HAS_WIDE=1", f"-I{folder}", *includes]
    return Launches(toolchain.build_program(SOURCES, flags, folder / "launch_plan"))
