"""Weight matrices as they lie in a dense checkpoint: a tensor of its own, one expert's part of
a 3-D tensor, or several tensors side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hqqlora.command.safetensors_file import StoredTensor

PIECE = 2**24  # bytes of a tensor in memory at a time, beside the matrix they become part of


@dataclass(frozen=True)
class Part:
    """A matrix [rows, columns] that lies at byte `first` of `source`. `is_transposed`: what it
    is a part of has its rows as columns."""

    source: StoredTensor
    first: int
    rows: int
    columns: int
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """As it is meant."""
        stored = (self.rows, self.columns)
        return stored[::-1] if self.is_transposed else stored

    @property
    def nbytes(self) -> int:
        """As it is stored."""
        return self.rows * self.columns * self.source.dtype.itemsize

    def beside(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Matrix.beside`."""
        rows = tensor.T if self.is_transposed else tensor
        row = self.columns * self.source.dtype.itemsize
        count = max(1, PIECE // row)
        for begin in range(0, self.rows, count):
            end = min(begin + count, self.rows)
            piece = self.source.read_part(self.first + begin * row, (end - begin) * row)
            yield piece.view(-1, self.columns), rows[begin:end]


@dataclass(frozen=True)
class Matrix:
    """`parts` one below the other (`axis` 0) or side by side (1)."""

    parts: tuple[Part, ...]
    axis: int = 0

    @classmethod
    def whole(cls, source: StoredTensor) -> Matrix:
        """All of a 2-D tensor."""
        rows, columns = source.shape
        return cls((Part(source, 0, rows, columns),))

    @classmethod
    def stacked(cls, source: StoredTensor) -> tuple[Matrix, ...]:
        """The matrices of a 3-D tensor."""
        count, rows, columns = source.shape
        size = source.nbytes // count if count else 0
        return tuple(cls((Part(source, e * size, rows, columns),)) for e in range(count))

    @classmethod
    def joined(cls, matrices: tuple[Matrix, ...], axis: int) -> Matrix | None:
        """`matrices`, of one part each, along `axis`; None: they do not fit."""
        parts = tuple(part for matrix in matrices for part in matrix.parts)
        others = {part.shape[1 - axis] for part in parts}
        if len(others) != 1 or len(parts) != len(matrices):
            return None
        return cls(parts, axis)

    def transposed(self) -> Matrix:
        """The same with rows as columns."""
        parts = (replace(part, is_transposed=not part.is_transposed) for part in self.parts)
        return Matrix(tuple(parts), 1 - self.axis)

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        along = sum(part.shape[self.axis] for part in self.parts)
        across = self.parts[0].shape[1 - self.axis]
        return (along, across) if self.axis == 0 else (across, along)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return sum(part.rows * part.columns for part in self.parts)

    @property
    def nbytes(self) -> int:
        """As it is stored."""
        return sum(part.nbytes for part in self.parts)

    def bytes_to_read(self, dtype: torch.dtype) -> int:
        """What `read` holds at a time."""
        if self._lies_as_read(dtype):
            return self.nbytes
        return self.numel * dtype.itemsize + min(PIECE, max(p.nbytes for p in self.parts))

    def read(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`.

        Raises:
            OSError: a file cannot be read; names it.
        """
        if self._lies_as_read(dtype):
            (part,) = self.parts
            return part.source.read_part(part.first, part.nbytes).view(part.shape)
        matrix = torch.empty(self.shape, dtype=dtype)
        for stored, place in self.beside(matrix):
            place.copy_(stored)
        return matrix

    def beside(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Piece by piece what is stored, and the elements of `tensor`, of this matrix's shape,
        in the same places."""
        begin = 0
        for part in self.parts:
            length = part.shape[self.axis]
            yield from part.beside(tensor.narrow(self.axis, begin, length))
            begin += length

    def _lies_as_read(self, dtype: torch.dtype) -> bool:
        first = self.parts[0]
        return len(self.parts) == 1 and not first.is_transposed and first.source.dtype == dtype
