"""Codes in hqq's packed words, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from hqqlora.ops import PackedWeight, packed_shape
from hqqlora.ops.weight import SLOTS_PER_WORD


def pack_codes(codes: Tensor, nbits: int, group_size: int) -> Tensor:
    """`W_q` of axis 1 for codes uint8 [N, K]: all words' first slots hold the first stretch of
    the codes, their second slots the next, from the highest bits down."""
    N, K = codes.shape
    shape = packed_shape(N, K, nbits, group_size, 1)
    words = shape[0] * shape[1]
    per, word = SLOTS_PER_WORD[nbits], torch.int32 if nbits == 3 else torch.uint8
    top = 27 if nbits == 3 else 8 - nbits
    packed = codes.new_zeros(words, dtype=word)
    for slot, stretch in enumerate(torch.split(codes.reshape(-1), words)):
        assert slot < per
        packed[: stretch.numel()] |= stretch.to(word) << (top - nbits * slot)
    return packed.reshape(shape)


def unpack_codes(packed: PackedWeight) -> Tensor:
    """The codes uint8 [N, K] of a packed weight of any format."""
    plain = packed._replace(
        scale=torch.ones_like(packed.scale), zero=torch.zeros_like(packed.zero)
    )
    codes: Tensor = torch.ops.hqqlora.dequantize(*plain, torch.float16)
    return codes.to(torch.uint8)
