"""GGUF files: reading with every size checked first, and writing tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from hqqlora.files import naming, replacing_file
from hqqlora.optional_packages import needing

# A file of key-value pairs alone can be small and claim to hold 2^60 of them.
_ARRAY = 9  # GGUF's number of the type
_SMALLEST_ENTRY = 13  # a key's length, no key, a type and one byte
# gguf makes objects of some 400 bytes of each element of a list, also where the element is a
# byte. No tokenizer has as many: 256,000 tokens come with about a million.
_MOST_ELEMENTS = 4 * 2**20


def import_gguf() -> Any:
    """The package gguf.

    Raises:
        ImportError: it is not installed; says how to get it.
    """
    with needing("reading and writing GGUF"):
        import gguf
    return gguf


class Value(NamedTuple):
    """Something that a GGUF file says about itself."""

    type: str
    """GGUF's name of the type: "UINT32", "FLOAT32", "BOOL", "STRING", "ARRAY", ..."""
    value: Any
    """A number, a boolean, a string, or a list of one of them."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a GGUF file, still in the file."""

    name: str
    type: str
    """GGUF's name of the format, such as "Q4_1" or "F32"."""
    shape: tuple[int, ...]
    """In the order of torch: the row length is last."""
    data: numpy.ndarray[Any, Any]
    """Mapped: rows of bytes [N, bytes], or of numbers for F32, F16 and the like."""

    def rows(self, start: int, stop: int) -> Tensor:
        """A copy of the bytes of rows [start, stop), uint8 [rows, bytes]."""
        # Of one dimension: a single row.
        table = self.data.reshape(-1, self.data.shape[-1])
        return torch.from_numpy(table[start:stop].copy().view("uint8"))

    @property
    def row_count(self) -> int:
        """How many rows there are: 1 of a vector."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """A GGUF file opened for reading: memory-mapped, all sizes known to be right."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads the header.

        Raises:
            FileNotFoundError, OSError: there is no such file, or it cannot be read.
            ValueError: it is no GGUF file, truncated or damaged; names the tensor where there
                is one, what was found and what expected.
        """
        self.path = Path(path)
        size = os.stat(self.path).st_size
        _check_header(self.path, size)
        self._reader = _read(self.path, size)
        self.tensors = {
            tensor.name: FileTensor(
                tensor.name,
                tensor.tensor_type.name,
                tuple(int(side) for side in reversed(tensor.shape)),
                tensor.data,
            )
            for tensor in self._reader.tensors
        }

    def own_keys(self) -> list[str]:
        """The names of all values that the file has about itself."""
        return [key for key in self._reader.fields if not key.startswith("GGUF.")]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default` if the file does not have it. See `entry`."""
        return default if key not in self._reader.fields else self.entry(key).value

    def entry(self, key: str) -> Value:
        """Type and value of a key that the file has. Strings of a list are bytes: not all
        tokens are text.

        Raises:
            ValueError: the value is damaged.
        """
        field = self._reader.fields[key]
        types = import_gguf().GGUFValueType
        try:
            text = field.types[-1] == types.STRING
            parts = [field.parts[i] for i in field.data]
            values = [bytes(part) if text else part[0].item() for part in parts]
            if field.types[0] == types.ARRAY:
                return Value("ARRAY", values)
            return Value(field.types[0].name, values[0].decode("utf-8") if text else values[0])
        except (IndexError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path}: the value of {key!r} is damaged: {error}"
            ) from error


def _check_header(path: Path, size: int) -> None:
    with path.open("rb") as file:
        header = file.read(24)
    if header[:4] != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it begins with {header[:4]!r}")
    if len(header) < 24:
        raise ValueError(f"{path} is truncated: {size} bytes are less than a header's 24")
    if not header[4] | header[5]:
        raise ValueError(f"{path} is a big-endian GGUF file, which is not supported")
    for what, start in (("tensors", 8), ("values", 16)):
        count = int.from_bytes(header[start : start + 8], "little")
        if count * _SMALLEST_ENTRY > size:
            raise ValueError(
                f"{path} is damaged: {count} {what} do not fit in its {size} bytes"
            )


def _read(path: Path, size: int) -> Any:
    reader: Any = import_gguf().GGUFReader

    class CheckedReader(reader):  # type: ignore[misc]
        """Finds what does not fit before anything is made of it."""

        elements = 0

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == _ARRAY:
                self.elements += _count_elements(path, self.data, int(orig_offs))
                if self.elements > _MOST_ELEMENTS:
                    raise _DamagedError(f"{path} has lists of {self.elements} elements")
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            for field in fields:
                _check_extent(path, size, int(start_offs), field)
            super()._build_tensors(start_offs, fields)

    try:
        return CheckedReader(path)
    except _DamagedError as error:
        raise ValueError(str(error)) from None
    except OSError:
        raise
    except Exception as error:  # numpy's and the reader's: which ones, neither says
        raise ValueError(f"{path} is truncated or damaged: {error}") from error


class _DamagedError(Exception):
    """What `_check_extent` has found."""


def _count_elements(path: Path, data: numpy.ndarray[Any, Any], start: int) -> int:
    """How many elements the list at `start` has: its type, 4 bytes, then their number, 8."""
    count = int.from_bytes(data[start + 4 : start + 12].tobytes(), "little")
    if count > len(data) - start:  # each takes a byte at least
        raise _DamagedError(
            f"{path} is damaged: a list of {count} elements does not fit in its {len(data)} "
            f"bytes"
        )
    return count


def _check_extent(path: Path, size: int, start: int, field: Any) -> None:
    gguf = import_gguf()
    _, name, _, dims, kind, offset = field.parts
    tensor = bytes(name).decode("utf-8", "replace")
    shape = [int(side) for side in reversed(dims)]
    if not 1 <= len(shape) <= 4:
        raise _DamagedError(f"{path}: tensor {tensor!r} has {len(shape)} dimensions")
    elements = math.prod(shape)
    if not 0 < elements < 2**63:
        raise _DamagedError(f"{path}: tensor {tensor!r} has the impossible shape {shape}")
    try:
        format_ = gguf.GGMLQuantizationType(int(kind[0]))
    except ValueError:
        raise _DamagedError(f"{path}: tensor {tensor!r} is of unknown type {kind[0]}") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[format_]
    if shape[-1] % block:
        raise _DamagedError(
            f"{path}: tensor {tensor!r} has rows of {shape[-1]} weights; {format_.name} needs "
            f"a multiple of {block}"
        )
    begin = start + int(offset[0])
    expected = elements // block * block_bytes
    found = max(0, size - begin)
    if found < expected:
        raise _DamagedError(
            f"{path} is truncated: tensor {tensor!r} ({format_.name}, {shape}) needs "
            f"{expected} bytes at {begin}; the file has {found} there"
        )


# ---- writing -----------------------------------------------------------------------------


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    type: str
    """GGUF's name of the format."""
    shape: tuple[int, ...]
    """In the order of torch."""
    make: Callable[[], Tensor]
    """Gives its bytes, uint8 [rows, bytes]: called once, when it is this tensor's turn."""


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    values: Mapping[str, Value],
    tensors: Iterable[NewTensor],
) -> None:
    """Writes a file, atomically, with no more than one tensor in memory.

    Args:
        path: replaced as a whole if it exists.
        architecture: the value of general.architecture.
        values: what the file is to say about itself.
        tensors: in the order of the file.

    Raises:
        OSError: the file cannot be written; names it.
    """
    gguf = import_gguf()
    tensors = list(tensors)
    with replacing_file(path, follow_link=True) as temporary, naming(path):
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            for key, (kind, value) in values.items():
                writer.add_key_value(key, value, gguf.GGUFValueType[kind])
            for tensor in tensors:
                _announce(writer, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                data = tensor.make().contiguous().numpy()
                writer.write_tensor_data(data.view(_Written))
        finally:
            writer.close()


class _Written(numpy.ndarray[Any, Any]):
    """numpy's own `tofile`, which gguf calls, writes through a stream of C's, and does not see
    that the last bytes find no room on the disk."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        """Writes the bytes through Python's file."""
        fid.write(self.data)


def _announce(writer: Any, tensor: NewTensor) -> None:
    gguf = import_gguf()
    format_ = gguf.GGMLQuantizationType[tensor.type]
    block, block_bytes = gguf.GGML_QUANT_SIZES[format_]
    in_bytes = (*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)
    writer.add_tensor_info(
        tensor.name, in_bytes, numpy.dtype("uint8"), math.prod(in_bytes), raw_dtype=format_
    )
