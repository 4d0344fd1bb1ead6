"""Reads what results.c wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from oracle import Oracle, dropout_mask
from product import Adapter, Product
from torch import Tensor

from hqqlora.ops import PackedWeight, meta_shape, packed_shape

# by hqq_dtype; -1: bytes
DTYPES = {-1: torch.uint8, 0: torch.float32, 1: torch.float16, 2: torch.bfloat16}
SCALING, DROPOUT, SEED = 0.5, 0.25, 77  # as in results.c


@dataclass(frozen=True)
class Case:
    """Inputs and results of one weight."""

    M: int
    N: int
    K: int
    G: int
    R: int
    nbits: int
    axis: int
    arrays: dict[str, Tensor]

    def packed(self, W_q: Tensor, scale: Tensor, zero: Tensor) -> PackedWeight:
        """A weight of flat parts."""
        words = W_q.view(torch.int32) if self.nbits == 3 else W_q
        shape = packed_shape(self.N, self.K, self.nbits, self.G, self.axis)
        meta = meta_shape(self.N, self.K, self.G, self.axis)
        return PackedWeight(
            words.reshape(shape), scale.reshape(meta), zero.reshape(meta),
            self.N, self.K, self.nbits, self.G, self.axis,
        )  # fmt: skip

    @property
    def product(self) -> Product:
        """The inputs of the products."""
        M, N, K, R = self.M, self.N, self.K, self.R
        a, seed = self.arrays, torch.tensor([SEED])
        mask = dropout_mask(M, K, DROPOUT, seed)
        adapter = Adapter(a["A"].reshape(R, K), a["B"].reshape(N, R), SCALING, mask)
        weight = Oracle(self.packed(a["W_q"], a["scale"], a["zero"]))
        x, dy = a["x"].reshape(M, K), a["dy"].reshape(M, N)
        return Product(weight, adapter, x, dy, seed, DROPOUT)


def read_cases(data: bytes) -> Iterator[Case]:
    """The cases of results.c's output."""
    place, case = 0, None
    while place < len(data):
        end = data.index(b"\n", place)
        name, *words = data[place:end].decode().split()
        numbers = list(map(int, words))
        place = end + 1
        if name == "case":
            if case:
                yield case
            case = Case(*numbers[:7], arrays={})
            continue
        dtype, elements = DTYPES[numbers[0]], numbers[1]
        assert case is not None
        case.arrays[name] = torch.frombuffer(
            bytearray(data[place : place + elements * dtype.itemsize]), dtype=dtype
        )
        place += elements * dtype.itemsize
    if case:
        yield case
