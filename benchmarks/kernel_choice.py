"""What the library itself would choose: c_api/choose_kernel.c, asked of its C interface."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os

from hqqlora.ops.library import find_library

# Of the columns of the table in c_api/choose_kernel.c, and of hqq_dtype.
COLUMNS = ("fp32", "fp16", "bf16")
_KERNEL_NAMES = {2: "direct", 3: "blocked", 4: "tiled"}


class Weight(ctypes.Structure):
    """hqq_weight, as far as the choice asks: no codes, in hqq's packing."""

    _fields_ = (
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("nbits", ctypes.c_int32),
        ("axis", ctypes.c_int32),
        ("meta_dtype", ctypes.c_int),
        ("packing", ctypes.c_int),
        ("data", ctypes.c_void_p * 3),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The C library, to ask what it would choose."""
    lib = ctypes.CDLL(str(find_library().with_name("libhqqlora.so")))
    lib.hqq_isa_name.restype = ctypes.c_char_p
    lib.hqq_choose_kernel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int32,
        ctypes.c_int,
    ]
    return lib


def instruction_set() -> str:
    """The name of what the kernels use: HQQLORA_ISA, or what the library finds."""
    found: bytes = library().hqq_isa_name(library().hqq_isa_in_use(None))
    return os.environ.get("HQQLORA_ISA") or found.decode()


def chosen(rows: int, dtype: str, name: str, weight: Weight | None = None) -> str:
    """The kernel for so many rows, forward or dgrad, of that weight, or of most at axis 1."""
    names = (library().hqq_isa_name(isa).decode() for isa in itertools.count())
    isas = list(itertools.takewhile(lambda name: name != "unknown", names))
    isa = isas.index(instruction_set())
    described = None if weight is None else ctypes.byref(weight)
    kernel = library().hqq_choose_kernel(
        described, rows, COLUMNS.index(dtype), name == "dgrad", isa
    )
    return _KERNEL_NAMES[kernel]


def switches(dtype: str, name: str, most_rows: int) -> list[tuple[int, str]]:
    """[(M, kernel)]: from how many rows on which kernel serves, up to `most_rows`."""
    found = [(1, chosen(1, dtype, name))]
    for rows in range(2, most_rows + 1):
        kernel = chosen(rows, dtype, name)
        if kernel != found[-1][1]:
            found.append((rows, kernel))
    return found
