"""Finding and loading the native libraries behind ``torch.ops.hqqlora``.

There are two: one defines the ops and computes on the CPU, the other computes on CUDA devices.
The second is loaded only into a CUDA build of torch, as it needs parts of it. Where it cannot
be had, the package works on the CPU, and CUDA tensors are refused with the reason.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from .fakes import FAKES

LIBRARY = "hqqlora_torch.so"
CUDA_LIBRARY = "hqqlora_torch_cuda.so"
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."
OLDEST_TORCH = (2, 10)
OPS = tuple(fake.__name__ for fake in FAKES)


def package_folders() -> list[Path]:
    """Every folder of the package: an editable install has its Python files in one and its
    native libraries in another."""
    name = __name__.split(".")[0]
    package = sys.modules.get(name)
    folders = [Path(folder) for folder in getattr(package, "__path__", [])]
    return folders or [Path(__file__).resolve().parent.parent]


def check_torch() -> None:
    """Raise ImportError if torch is older than the stable ABI that the library uses."""
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release and tuple(map(int, release.groups())) < OLDEST_TORCH:
        raise ImportError(
            f"hqqlora needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, found "
            f"{torch.__version__} in {Path(torch.__file__).parent}; "
            f"upgrade it: pip install --upgrade torch"
        )


def _find(name: str) -> Path | None:
    for folder in package_folders():
        if (folder / name).is_file():
            return folder / name
    return None


def _searched() -> str:
    return ", ".join(map(str, package_folders()))


def find_library() -> Path:
    """The path of the native library. Raises ImportError where there is none."""
    path = _find(LIBRARY)
    if path is None:
        raise ImportError(
            f"hqqlora's native library {LIBRARY} is not in {_searched()}; "
            f"build it by installing the package: pip install . (or, to work on it, "
            f"pip install --no-build-isolation -e .)"
        )
    return path


def _open(path: Path) -> None:
    """Load a library that registers ops. Raises OSError with the loader's own reason."""
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as failure:
        raise OSError(str(failure.__cause__ or failure)) from failure


def leave_out_autograd() -> torch.library.Library:
    """Have autograd pass the ops by: what they return never requires a gradient. Without this
    torch marks the results of a parameter as waiting for a gradient that cannot come.

    Lasts as long as the object that is returned.
    """
    registration = torch.library.Library(  # type: ignore[no-untyped-call]
        "hqqlora", "IMPL", "Autograd"
    )
    for name in OPS:
        registration.impl(  # type: ignore[no-untyped-call]
            name, torch.library.fallthrough_kernel
        )
    return registration


def is_loaded() -> bool:
    """Whether this process has the ops already, from whatever path."""
    return hasattr(torch.ops.hqqlora, "lora_linear_backward")


def load() -> None:
    """Load the library once a process: a second copy, from a second path, would define the
    same ops again and end the process.

    Raises ImportError with what to do about it where that is not possible.
    """
    if is_loaded():
        return
    check_torch()
    path = find_library()
    try:
        _open(path)
    except OSError as failure:
        raise ImportError(
            f"{path} does not load ({failure}); it may have been built for another platform: "
            f"reinstall the package with {REINSTALL}"
        ) from failure


# ---- CUDA ------------------------------------------------------------------------------


def load_cuda() -> str | None:
    """Load the CUDA half into a CUDA build of torch.

    Returns why that is not possible, or None: it is loaded, or this torch has no CUDA tensors
    that could want it.
    """
    if torch.version.cuda is None:
        if torch.version.hip is None:
            return None
        return (
            f"no CUDA kernels: torch {torch.__version__} is for AMD's GPUs, hqqlora for "
            f"NVIDIA's and for CPUs"
        )
    again = f"with nvcc of CUDA {torch.version.cuda} on the PATH, reinstall it: {REINSTALL}"
    path = _find(CUDA_LIBRARY)
    if path is None:
        return (
            f"no CUDA kernels: this hqqlora was built without them ({CUDA_LIBRARY} is not in "
            f"{_searched()}); {again}"
        )
    try:
        _open(path)
    except OSError as failure:
        return (
            f"no CUDA kernels: {path} does not load ({failure}); it may have been built for "
            f"another CUDA; {again}"
        )
    return None


def refuse_cuda(reason: str) -> torch.library.Library:
    """Have the ops raise RuntimeError with the reason when they meet CUDA tensors. Without this
    torch would, with the list of all the backends that it knows.

    Lasts as long as the object that is returned.
    """

    def refuse(*arguments: Any, **keywords: Any) -> NoReturn:
        raise RuntimeError(f"hqqlora: {reason}")

    registration = torch.library.Library(  # type: ignore[no-untyped-call]
        "hqqlora", "IMPL", "CUDA"
    )
    for name in OPS:
        registration.impl(name, refuse)  # type: ignore[no-untyped-call]
    return registration
