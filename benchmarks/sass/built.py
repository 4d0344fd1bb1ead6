"""The kernels of the CUDA library as it was built: the machine code in its object files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from . import toolchain
from .toolchain import Kernel, ToolError

SOURCES = toolchain.ROOT / "kernels/cuda"
OBJECTS = "kernels/cuda/CMakeFiles/hqqlora_cuda.dir"
"""Of the build's folder, as CMake names it."""
WIDE_OBJECTS = "kernels/cuda/CMakeFiles/hqqlora_cuda_wide.dir"
"""Of kernels for sm_90a alone: what runs on an sm_90."""


def bring_up_to_date(build: Path) -> None:
    """Compiles what changed since it was built: the report is of the sources as they are."""
    if not (build / OBJECTS).is_dir():
        raise ToolError(f"no CUDA library was built in {build} (make sass)")
    toolchain.run("cmake", "--build", str(build), "--target", "hqqlora_cuda")


def arch_of(cubin: Path) -> str:
    """Of a name that cuobjdump gives: small_f16.cu.2.sm_90.cubin."""
    return cubin.name.split(".")[-2]


def extract(library_object: Path, folder: Path) -> dict[str, Path]:
    """An object file's cubins by architecture, in a folder that is named by its content."""
    content = toolchain.digest(library_object.read_bytes())
    of_this_source = folder / library_object.name
    kept = of_this_source / content
    if not kept.exists():
        shutil.rmtree(of_this_source, ignore_errors=True)
        unfinished = of_this_source / "unfinished"
        unfinished.mkdir(parents=True)
        # cuobjdump writes to where it is run
        toolchain.run("cuobjdump", "-xelf", "all", str(library_object), where=unfinished)
        unfinished.rename(kept)
    return {arch_of(cubin): cubin for cubin in sorted(kept.glob("*.cubin"))}


def kernels(build: Path, archs: Sequence[str], folder: Path) -> list[Kernel]:
    """Of all sources, for each of `archs`."""
    bring_up_to_date(build)
    found: list[Kernel] = []
    for source in sorted(path.name for path in SOURCES.glob("*.cu")):
        if source.startswith("wide_"):
            found += _wide_kernels(build, source, archs, folder)
            continue
        cubins = extract(build.resolve() / OBJECTS / f"{source}.o", folder)
        for arch in archs:
            if arch not in cubins:
                there = ", ".join(cubins) or "no architecture"
                raise ToolError(f"{build} was built for {there}, not for {arch}")
            found += toolchain.read_kernels(cubins[arch], source, keep=True)
    return found


def _wide_kernels(build: Path, source: str, archs: Sequence[str], folder: Path) -> list[Kernel]:
    if "sm_90" not in archs:
        return []
    cubins = extract(build.resolve() / WIDE_OBJECTS / f"{source}.o", folder)
    return toolchain.read_kernels(cubins["sm_90a"], source, keep=True)
