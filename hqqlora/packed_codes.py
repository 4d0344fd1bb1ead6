"""Codes in hqq's packed words, and back; planes (hqqlora.planes) are put into words before.

Element e = n * K + k of a weight [N, K] is in word e mod words, slot e div words, the first
slot in the highest bits (of 30 for 3 bits). So a run of elements is a few runs of words, and
what follows needs nothing of a format but its bits and the number of its words.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hqqlora.ops import PackedWeight, packed_shape
from hqqlora.ops.weight import SLOTS_PER_WORD, word_dtype
from hqqlora.planes import in_words


def read_codes(W_q: Tensor, nbits: int, start: int, stop: int) -> Tensor:
    """The codes uint8 [stop - start] of the elements from `start` to before `stop`."""
    words = W_q.reshape(-1)
    codes = torch.empty(stop - start, dtype=torch.uint8, device=W_q.device)
    for shift, run, place in _runs(len(words), nbits, start, stop):
        codes[place] = (words[run] >> shift) & (2**nbits - 1)
    return codes


def write_codes(W_q: Tensor, nbits: int, start: int, codes: Tensor) -> None:
    """Puts codes uint8 [count] into the words for the elements from `start` on. Their slots
    must be empty: zero, as in a new `empty_words`."""
    words = W_q.view(-1)
    for shift, run, place in _runs(len(words), nbits, start, start + len(codes)):
        words[run] |= codes[place].to(words.dtype) << shift


def empty_words(
    shape: tuple[int, int], nbits: int, device: torch.device | None = None
) -> Tensor:
    """`W_q` of a `packed_shape`, with all codes zero."""
    return torch.zeros(shape, dtype=word_dtype(nbits), device=device)


def pack_codes(codes: Tensor, nbits: int, group_size: int) -> Tensor:
    """`W_q` of axis 1 for codes uint8 [N, K]."""
    N, K = codes.shape
    packed = empty_words(packed_shape(N, K, nbits, group_size, 1), nbits, codes.device)
    write_codes(packed, nbits, 0, codes.reshape(-1))
    return packed


def unpack_codes(packed: PackedWeight) -> Tensor:
    """The codes uint8 [N, K] of a packed weight of any format."""
    packed = in_words(packed)
    N, K = packed.out_features, packed.in_features
    return read_codes(packed.W_q, packed.nbits, 0, N * K).reshape(N, K)


def _runs(words: int, nbits: int, start: int, stop: int) -> Iterator[tuple[int, slice, slice]]:
    """For each slot that holds some of the elements: how far left its codes are shifted, their
    words, and their place among the elements from `start` on."""
    assert 0 <= start <= stop <= words * SLOTS_PER_WORD[nbits]
    top = nbits * (SLOTS_PER_WORD[nbits] - 1)
    done = start
    while done < stop:
        slot, word = divmod(done, words)
        count = min(stop - done, words - word)
        place = slice(done - start, done - start + count)
        yield top - nbits * slot, slice(word, word + count), place
        done += count
