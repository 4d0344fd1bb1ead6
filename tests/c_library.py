"""libhqqlora.so through ctypes: the C functions that have no torch op."""

from __future__ import annotations

import ctypes as ct
import functools
import importlib
from pathlib import Path

import numpy as np
from format_oracle import Format

F32, F16, BF16 = 0, 1, 2
HQQS_OWN = 0
OK, INVALID, UNSUPPORTED, NO_MEMORY, NON_FINITE, CALLBACK = range(6)


class Weight(ct.Structure):
    """hqq_weight."""

    _fields_ = (
        ("out_features", ct.c_int64),
        ("in_features", ct.c_int64),
        ("group_size", ct.c_int64),
        ("nbits", ct.c_int32),
        ("axis", ct.c_int32),
        ("meta_dtype", ct.c_int),
        ("packing", ct.c_int),
        ("packed", ct.c_void_p),
        ("scale", ct.c_void_p),
        ("zero", ct.c_void_p),
    )


def installed(name: str) -> Path:
    """A file of the installed package; an editable install has its Python files elsewhere."""
    folders = [Path(folder) for folder in importlib.import_module("hqqlora").__path__]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}")


def path() -> Path:
    """libhqqlora.so"""
    return installed("libhqqlora.so")


def header() -> Path:
    """hqqlora.h"""
    return installed("include/hqqlora.h")


@functools.cache
def library() -> ct.CDLL:
    """The loaded library."""
    lib = ct.CDLL(str(path()))
    lib.hqq_last_error.restype = ct.c_char_p
    return lib


def pointer(array: np.ndarray | None) -> ct.c_void_p:
    """The address of a contiguous array."""
    if array is None:
        return ct.c_void_p(None)
    assert array.flags.c_contiguous
    return ct.c_void_p(array.ctypes.data)


def descriptor(
    f: Format,
    packed: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    zero: np.ndarray | None = None,
) -> Weight:
    """An hqq_weight; it borrows the arrays."""
    arrays = (pointer(packed), pointer(scale), pointer(zero))
    return Weight(f.N, f.K, f.G, f.nbits, f.axis, F32, HQQS_OWN, *arrays)


def check(status: int) -> None:
    """RuntimeError with the library's message unless status is HQQ_OK."""
    if status != OK:
        raise RuntimeError(f"status {status}: {library().hqq_last_error().decode()}")


def layout_of(f: Format) -> tuple[int, int, int]:
    """Words, bytes in a word, groups."""
    words, word_bytes, groups = ct.c_int64(), ct.c_int64(), ct.c_int64()
    check(
        library().hqq_layout_of(
            ct.byref(words), ct.byref(word_bytes), ct.byref(groups), ct.byref(descriptor(f))
        )
    )
    return words.value, word_bytes.value, groups.value


def pack(f: Format, codes: np.ndarray) -> np.ndarray:
    """hqq_pack into memory that was not zero."""
    packed = np.full(f.packed_shape, 0x55, f.word_dtype)
    weight = descriptor(f)
    check(library().hqq_pack(pointer(packed), pointer(codes), ct.byref(weight), None))
    return packed


def unpack(f: Format, packed: np.ndarray) -> np.ndarray:
    """hqq_unpack: codes uint8 [N,K]."""
    codes = np.full((f.N, f.K), 0xAA, np.uint8)
    weight = descriptor(f, packed)
    check(library().hqq_unpack(pointer(codes), ct.byref(weight), None))
    return codes


def dequantize_block(
    f: Format,
    packed: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    rows: tuple[int, int],
    columns: tuple[int, int],
    padding: int = 0,
) -> np.ndarray:
    """hqq_dequantize of one block to float32, with `padding` untouched elements (NaN) after
    each row."""
    out = np.full((rows[1] - rows[0], columns[1] - columns[0] + padding), np.nan, np.float32)
    weight = descriptor(f, packed, scale, zero)
    bounds = (ct.c_int64(v) for v in (*rows, *columns))
    check(
        library().hqq_dequantize(
            pointer(out), ct.c_int64(out.shape[1]), F32, ct.byref(weight), *bounds, None
        )
    )
    return out
