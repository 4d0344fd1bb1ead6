"""The HQQ format in plain numpy, written from its description alone: the tests' own oracle.

Nothing of the library is used here. Element e = n*K + k of W [N,K]; `per` codes share a word:

1. rows x columns of the grouped matrix: axis 1: E/G x G; axis 0: G x E/G
2. per codes in a word: 8/bits in uint8 words; 10 in int32 words for 3 bits
3. words = ceil(rows / per) * columns
4. element e is in word e mod words, slot e div words
5. the first slot in the highest of the per * bits bits: shifted left by bits * (per - 1 - slot)
6. its group is e div G (axis 1) or e mod E/G (axis 0)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

# Bits of a code -> codes in a word: the widths that the tests walk over.
SLOTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
BITS = tuple(SLOTS)


@dataclass(frozen=True)
class Format:
    """One way of storing an N x K weight."""

    N: int
    K: int
    G: int
    nbits: int
    axis: int

    @property
    def elements(self) -> int:
        return self.N * self.K

    @property
    def groups(self) -> int:
        return self.elements // self.G

    @property
    def grouped_shape(self) -> tuple[int, int]:
        return (self.groups, self.G) if self.axis == 1 else (self.G, self.groups)

    @property
    def per(self) -> int:
        return SLOTS[self.nbits]

    @property
    def packed_shape(self) -> tuple[int, int]:
        rows, columns = self.grouped_shape
        return -(-rows // self.per), columns

    @property
    def words(self) -> int:
        rows, columns = self.packed_shape
        return rows * columns

    @property
    def word_dtype(self) -> type:
        return np.uint8 if self.per * self.nbits == 8 else np.int32

    @property
    def meta_shape(self) -> tuple[int, int]:
        return (self.groups, 1) if self.axis == 1 else (1, self.groups)

    def place(self) -> tuple[np.ndarray, np.ndarray]:
        """Word and left shift of every element."""
        e = np.arange(self.elements)
        return e % self.words, self.nbits * (self.per - 1 - e // self.words)

    def group_of(self) -> np.ndarray:
        """Group of every element."""
        e = np.arange(self.elements)
        return e // self.G if self.axis == 1 else e % self.groups

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """Codes [N,K] -> words, in hqq's two-dimensional shape."""
        word, shift = self.place()
        packed = np.zeros(self.words, np.int64)
        np.add.at(packed, word, codes.reshape(-1).astype(np.int64) << shift)
        return packed.astype(self.word_dtype).reshape(self.packed_shape)

    def pack_planes(self, codes: np.ndarray) -> np.ndarray:
        """3-bit codes [N,K] -> planes: their upper two bits as 2 bits are packed, and under
        these rows the lowest one as 1 bit is."""
        twos, ones = replace(self, nbits=2), replace(self, nbits=1)
        return np.concatenate([twos.pack(codes >> 1), ones.pack(codes & 1)])

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Words -> codes uint8 [N,K]."""
        word, shift = self.place()
        # int32 words may have their top bit set by a careless writer: read them as unsigned
        bits = packed.reshape(-1).astype(np.int64)[word] >> shift
        return (bits & (2**self.nbits - 1)).astype(np.uint8).reshape(self.N, self.K)

    def dequantize(self, packed: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """(q - zero) * scale, float32 [N,K]; each operation rounded to float32."""
        group = self.group_of()
        q = self.unpack(packed).reshape(-1).astype(np.float32)
        s = scale.reshape(-1).astype(np.float32)[group]
        z = zero.reshape(-1).astype(np.float32)[group]
        return ((q - z) * s).reshape(self.N, self.K)
