"""Finding and loading the native library that defines ``torch.ops.hqqlora``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

LIBRARY = "hqqlora_torch.so"
OLDEST_TORCH = (2, 10)
OPS = (
    "quantize",
    "dequantize",
    "linear",
    "linear_dgrad",
    "lora_linear",
    "lora_linear_backward",
)


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


def find_library() -> Path:
    """The path of the native library. Raises ImportError where there is none."""
    folders = package_folders()
    for folder in folders:
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
    raise ImportError(
        f"hqqlora's native library {LIBRARY} is not in {', '.join(map(str, folders))}; "
        f"build it by installing the package: pip install . (or, to work on it, "
        f"pip install --no-build-isolation -e .)"
    )


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
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as failure:
        raise ImportError(
            f"{path} does not load ({failure}); it may have been built for another platform: "
            f"reinstall the package with pip install --force-reinstall --no-deps ."
        ) from failure
