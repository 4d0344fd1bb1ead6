"""Reading what `torch.save` has written, from whomever it comes.

torch's restricted unpickler runs no code. What it leaves to its caller is checked here before:
that nothing is made which is larger than the file.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

_PICKLE = "data.pkl"
_LEGACY_PICKLES = 5  # before 2020: magic number, protocol, system, content, keys; then the data
# What makes memory of any size from a number; tensors' storages torch compares with the file.
_MAKERS = ("builtins bytearray", "__builtin__ bytearray")


def read_torch(path: str | os.PathLike[str], *, mmap: bool = False) -> Any:
    """The tensors, lists, dicts and plain values in a file, on the CPU.

    Args:
        path: the file.
        mmap: whether tensors are to stay in the file until they are used; not in files as torch
            wrote them before 2020.

    Raises:
        ValueError: the file is damaged, or holds other things; names it.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            zipped = zipfile.is_zipfile(file)
            file.seek(0)
            if zipped:
                _check_zip(file)
            else:
                _check_pickles(file, _LEGACY_PICKLES)
        content = torch.load(path, map_location="cpu", mmap=mmap and zipped, weights_only=True)
        _check_tensors(content)
        return content
    except OSError:
        raise
    except Exception as error:  # which ones a damaged file leads to, torch does not say
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(
            f"{path} is damaged, or holds other things than tensors and plain values: {reason}"
        ) from error


def _check_zip(file: BinaryIO) -> None:
    """torch stores entries as they are; compressed, or one within the other, a small file could
    hold any amount."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
        total = sum(entry.file_size for entry in entries)
        if total > size:
            raise ValueError(f"its entries are of {total} bytes together, the file of {size}")
        for entry in entries:
            if entry.filename.rpartition("/")[2] == _PICKLE:
                with archive.open(entry) as pickled:
                    _check_pickles(pickled, 1)  # type: ignore[arg-type]


def _check_tensors(content: Any) -> None:
    """A view that repeats its elements is small in the file, and of any size once copied."""
    seen: set[int] = set()
    to_do = [content]
    while to_do:
        value = to_do.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise ValueError(
                    f"it has a {value.layout} tensor of {value.dtype}, not a dense one"
                )
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(
                    f"a tensor {list(value.shape)} of {value.dtype} has "
                    f"{value.untyped_storage().nbytes()} bytes in the file"
                )
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            to_do.extend(value.values() if isinstance(value, Mapping) else value)


def _check_pickles(file: BinaryIO, count: int) -> None:
    for _ in range(count):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL" and argument in _MAKERS:
                raise ValueError(f"it makes a {str(argument).split()[1]}")
