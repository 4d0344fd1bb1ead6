"""safetensors files read and written a tensor at a time, with read and write instead of mmap:
pages of a mapping would count as this process's memory."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_LARGEST_HEADER = 100 * 10**6  # safetensors' own limit
_MOST_SIDES = 64
_LARGEST_TRANSFER = 2**30  # a system call moves less than 2 GiB


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file: `nbytes` from byte `start` on."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.nbytes // self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        return self.read_part(0, self.nbytes).view(self.shape)

    def read_index(self, index: int) -> Tensor:
        """``tensor[index]``, in memory of its own."""
        size = self.nbytes // self.shape[0]
        return self.read_part(index * size, size).view(self.shape[1:])

    def read_part(self, first: int, nbytes: int) -> Tensor:
        """`nbytes` of it from byte `first` on, flat.

        Raises:
            OSError: it cannot be read; names the file.
        """
        if nbytes == 0:
            return torch.empty(0, dtype=self.dtype)
        data = bytearray(nbytes)
        view = memoryview(data)
        with self.file.open("rb", buffering=0) as file:
            done = 0
            while done < nbytes:
                part = view[done : done + _LARGEST_TRANSFER]
                count = os.preadv(file.fileno(), [part], self.start + first + done)
                if count == 0:
                    raise OSError(5, "the file has become shorter", str(self.file))
                done += count
        return torch.frombuffer(data, dtype=self.dtype)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name, in the order they lie in.

    Raises:
        ValueError: it is not one, or damaged; names the file.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{file} is not a whole safetensors file")
        try:
            header = json.loads(opened.read(length))
            tensors = [
                _stored(file, name, entry, 8 + length)
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} has no valid safetensors header: {error}") from error
    tensors.sort(key=lambda tensor: tensor.start)
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise ValueError(f"{file}: {tensor.name} does not begin where the last one ends")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{file} has {size} bytes, but its header describes {end}")
    return {tensor.name: tensor for tensor in tensors}


def _stored(file: Path, name: str, entry: Mapping[str, Any], base: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is of dtype {entry['dtype']}, which is not supported")
    dtype = _DTYPES[entry["dtype"]]
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if len(shape) > _MOST_SIDES or not all(
        type(number) is int and 0 <= number < 2**63 for number in (*shape, first, last)
    ):
        raise ValueError(f"{name} has the shape {shape[:_MOST_SIDES]}, from {first} to {last}")
    expected = dtype.itemsize
    for length in shape:
        expected *= length
    if last - first != expected:
        raise ValueError(f"{name} has {last - first} bytes, its shape needs {expected}")
    return StoredTensor(name, file, dtype, shape, base + first, expected)


@dataclass(frozen=True)
class TensorShape:
    """A tensor to be written, before it exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    @classmethod
    def of(cls, tensor: Tensor) -> TensorShape:
        """That of `tensor`."""
        return cls(tensor.dtype, tuple(tensor.shape))


class FileLayout:
    """Where each tensor of a file to be written will lie, so that they can be written in any
    order, and none needs to be kept."""

    def __init__(self, tensors: Mapping[str, TensorShape]) -> None:
        """Places `tensors`: those of wide dtypes first, as safetensors does, so that each is
        aligned."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.offsets: dict[str, int] = {}
        end = 0
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            tensor = tensors[name]
            offsets = [end, end + tensor.nbytes]
            code = _CODES[tensor.dtype]
            entries[name] = {
                "dtype": code,
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            self.offsets[name] = end
            end = offsets[1]
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self.beginning = len(header).to_bytes(8, "little") + header
        self.size = len(self.beginning) + end
        self.offsets = {
            name: offset + len(self.beginning) for name, offset in self.offsets.items()
        }

    def is_in(self, path: Path) -> bool:
        """Whether the file `path` is there and laid out so, by its size and its header."""
        try:
            if path.stat().st_size != self.size:
                return False
            with path.open("rb") as file:
                return file.read(len(self.beginning)) == self.beginning
        except FileNotFoundError:
            return False


class FileWriter:
    """Writes tensors to the places that a layout gives them."""

    def __init__(self, descriptor: int, layout: FileLayout) -> None:
        """Writes the header into the open file."""
        self._descriptor = descriptor
        self._offsets = layout.offsets
        _write(descriptor, memoryview(layout.beginning), 0)

    def write(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Writes `tensor`, or from byte `first` on a part of it."""
        data = tensor.detach().contiguous()
        if data.nbytes:
            # (not .numpy(), which knows no bfloat16, and which torch can do without)
            source = (ctypes.c_char * data.nbytes).from_address(data.data_ptr())
            _write(self._descriptor, memoryview(source), self._offsets[name] + first)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        part = data[done : done + _LARGEST_TRANSFER]
        done += os.pwrite(descriptor, part, offset + done)


def total_bytes(tensors: Iterable[TensorShape | StoredTensor]) -> int:
    """How much they take together."""
    return sum(tensor.nbytes for tensor in tensors)
