"""GGUF's block formats as affine groups: every weight is ``scale * (q - zero)``.

A row of a GGUF tensor is a run of blocks; a block holds codes and what scales them. In the
formats below a run of 16 or 32 weights shares one scale and one offset, which is what an HQQ
group of axis 1 is: the codes are taken over as they are, and nothing is quantized again.

========== ===== ====== ==================================== ==================
format     group codes  weight                               as HQQ
========== ===== ====== ==================================== ==================
Q4_0       32    4 bits ``d (q - 8)``                        4 bits
Q4_1       32    4 bits ``d q + m``                          4 bits
Q5_0       32    5 bits ``d (q - 16)``                       8 bits
Q5_1       32    5 bits ``d q + m``                          8 bits
Q8_0       32    8 bits ``d q``, q signed                    8 bits, q + 128
Q2_K       16    2 bits ``(d s) q - (dmin t)``               2 bits
Q3_K       16    3 bits ``(d s) (q - 4)``                    3 bits
Q4_K       32    4 bits ``(d s) q - (dmin t)``               4 bits
Q5_K       32    5 bits ``(d s) q - (dmin t)``               8 bits
Q6_K       16    6 bits ``(d s) (q - 32)``                   8 bits
========== ===== ====== ==================================== ==================

d, m and dmin are fp16, s and t small integers, so that scale and offset are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A group with scale 0 and offset m is written as scale m / FLAT and zero -FLAT: so far from
# zero that float32 rounds q - zero to FLAT for every q, while fp16 rounds the scale to 0 again.
FLAT = 2.0**42
# Weights that are decoded at once.
_CHUNK = 2**19


@dataclass(frozen=True)
class Groups:
    """Decoded rows: ``W = (codes - zero) * scale``, group by group."""

    codes: Tensor
    """uint8 [N, K]."""
    scale: Tensor
    """float32 [N, K / group_size]."""
    zero: Tensor
    """Like `scale`."""


@dataclass(frozen=True)
class BlockFormat:
    """One of GGUF's formats."""

    block_size: int
    """Weights in a block."""
    block_bytes: int
    group_size: int
    nbits: int
    """Bits of an HQQ code that holds one of the format's."""
    parts: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    """Blocks uint8 [B, block_bytes] -> codes [B, block_size], scale and zero [B, groups]."""

    def decode(self, rows: Tensor) -> Groups:
        """Rows uint8 [N, bytes] -> codes, scale and zero. Scales may be any fp16, NaN too.

        Goes some rows at a time: each step has temporaries of many times its size.
        """
        N, width = rows.shape
        K = width // self.block_bytes * self.block_size
        codes = rows.new_empty(N, K)
        scale, zero = rows.new_empty(2, N, K // self.group_size, dtype=torch.float32)
        step = max(1, _CHUNK // K)
        for start in range(0, N, step):
            some = slice(start, min(start + step, N))
            parts = self.parts(rows[some].reshape(-1, self.block_bytes))
            for whole, part in zip((codes, scale, zero), parts, strict=True):
                whole[some] = part.reshape(whole[some].shape)
        return Groups(codes, scale, zero)


def scale_and_zero(d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """The HQQ form of ``d q + m``, float32.

    Where d is not 0, scale is d and zero is -m / d rounded to float32; `scale_and_offset`
    finds both again, bit for bit, if they are fp16. Where d is 0 the weight is m whatever q is:
    see `FLAT`.
    """
    flat = (d == 0) & (m != 0)
    scale = torch.where(flat, torch.copysign(m.abs() / FLAT, d), d)
    divisor = torch.where(scale == 0, torch.copysign(torch.ones_like(d), d), scale)
    return scale, -(m / divisor)


def scale_and_offset(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """d and m, fp16, of the block that is nearest to ``scale * (q - zero)``: both are rounded
    once. Not finite where fp16 does not reach."""
    offset = -(scale.double() * zero.double())
    return scale.double().half(), offset.half()


# ---- decoding ------------------------------------------------------------------------------


def _half(blocks: Tensor, start: int) -> Tensor:
    """The fp16 at byte `start` of each block, as float32 [B, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(data: Tensor, width: int, shifts: tuple[int, ...], bits: int) -> Tensor:
    """Codes from bytes [B, bytes]: of each run of `width` bytes first the bits at shifts[0],
    then those at shifts[1], and so on. uint8 [B, bytes * len(shifts)]."""
    distances = data.new_tensor(shifts).unsqueeze(1)
    runs = data.reshape(data.size(0), -1, 1, width)
    codes: Tensor = (runs >> distances) & (2**bits - 1)
    return codes.reshape(data.size(0), -1)


_NIBBLES = (0, 4)
_PAIRS = (0, 2, 4, 6)
_BITS = (0, 1, 2, 3, 4, 5, 6, 7)


def _symmetric(codes: Tensor, d: Tensor, zero: int) -> tuple[Tensor, Tensor, Tensor]:
    return codes, d, torch.full_like(d, zero)


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _symmetric(_fields(blocks[:, 2:], 16, _NIBBLES, 4), _half(blocks, 0), 8)


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _fields(blocks[:, 4:], 16, _NIBBLES, 4)
    return codes, *scale_and_zero(_half(blocks, 0), _half(blocks, 2))


def _fifth_bits(high: Tensor, low: Tensor) -> Tensor:
    """5-bit codes from 4 bytes of single bits in the order of the codes, and 16 of nibbles."""
    return _fields(low, 16, _NIBBLES, 4) | (_fields(high, 1, _BITS, 1) << 4)


def _q5_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _fifth_bits(blocks[:, 2:6], blocks[:, 6:])
    return _symmetric(codes, _half(blocks, 0), 16)


def _q5_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = _fifth_bits(blocks[:, 4:8], blocks[:, 8:])
    return codes, *scale_and_zero(_half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _symmetric(blocks[:, 2:] ^ 128, _half(blocks, 0), 128)


def _q2_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """16 bytes of scale and offset nibbles, 64 of codes, d, dmin."""
    factors = blocks[:, :16]
    codes = _fields(blocks[:, 16:80], 32, _PAIRS, 2)
    scale = _half(blocks, 80) * (factors & 15)
    return codes, *scale_and_zero(scale, -(_half(blocks, 82) * (factors >> 4)))


def _q3_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """32 bytes of third bits, 64 of pairs, 12 of 6-bit scales, d."""
    codes = _fields(blocks[:, 32:96], 32, _PAIRS, 2)
    codes = codes | (_fields(blocks[:, :32], 32, _BITS, 1) << 2)
    low = _fields(blocks[:, 96:104], 8, _NIBBLES, 4)
    high = _fields(blocks[:, 104:108], 4, _PAIRS, 2)
    scale = _half(blocks, 108) * ((low | (high << 4)).float() - 32)
    return _symmetric(codes, scale, 4)


def _six_bit_factors(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight offsets [B, 8] from 12 bytes: the first four of each whole, the
    last four with their low bits in the last bytes and their high bits above the first."""
    s, t, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([s & 63, (low & 15) | ((s >> 2) & 48)], dim=1)
    offsets = torch.cat([t & 63, (low >> 4) | ((t >> 2) & 48)], dim=1)
    return scales, offsets


def _k_affine(blocks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s, t = _six_bit_factors(blocks[:, 4:16])
    return codes, *scale_and_zero(_half(blocks, 0) * s, -(_half(blocks, 2) * t))


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d, dmin, 12 bytes of 6-bit scales and offsets, 128 of nibbles."""
    return _k_affine(blocks, _fields(blocks[:, 16:], 32, _NIBBLES, 4))


def _q5_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles."""
    low = _fields(blocks[:, 48:], 32, _NIBBLES, 4)
    return _k_affine(blocks, low | (_fields(blocks[:, 16:48], 32, _BITS, 1) << 4))


def _q6_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """128 bytes of nibbles, 64 of pairs, 16 signed scales, d."""
    codes = _fields(blocks[:, :128], 64, _NIBBLES, 4)
    codes = codes | (_fields(blocks[:, 128:192], 32, _PAIRS, 2) << 4)
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    return _symmetric(codes, scale, 32)


FORMATS = {
    "Q4_0": BlockFormat(32, 18, 32, 4, _q4_0),
    "Q4_1": BlockFormat(32, 20, 32, 4, _q4_1),
    "Q5_0": BlockFormat(32, 22, 32, 8, _q5_0),
    "Q5_1": BlockFormat(32, 24, 32, 8, _q5_1),
    "Q8_0": BlockFormat(32, 34, 32, 8, _q8_0),
    "Q2_K": BlockFormat(256, 84, 16, 2, _q2_k),
    "Q3_K": BlockFormat(256, 110, 16, 3, _q3_k),
    "Q4_K": BlockFormat(256, 144, 32, 4, _q4_k),
    "Q5_K": BlockFormat(256, 176, 32, 8, _q5_k),
    "Q6_K": BlockFormat(256, 210, 16, 8, _q6_k),
}


# ---- encoding ------------------------------------------------------------------------------


def encode_q4(codes: Tensor, d: Tensor, m: Tensor | None) -> Tensor:
    """Q4_1 rows, or without m Q4_0 rows: uint8 [N, bytes].

    Args:
        codes: uint8 [N, K], 0 to 15.
        d: fp16 [N, K / 32].
        m: like d.
    """
    N = codes.size(0)
    halves = codes.reshape(-1, 2, 16)
    heads = [meta.reshape(-1, 1).view(torch.uint8) for meta in (d, m) if meta is not None]
    blocks = torch.cat([*heads, halves[:, 0] | (halves[:, 1] << 4)], dim=1)
    return blocks.reshape(N, -1)


def encode_q8(codes: Tensor, d: Tensor) -> Tensor:
    """Q8_0 rows uint8 [N, bytes].

    Args:
        codes: [N, K], signed, as the bytes that they are.
        d: fp16 [N, K / 32].
    """
    head = d.reshape(-1, 1).view(torch.uint8)
    return torch.cat([head, codes.reshape(-1, 32)], dim=1).reshape(codes.size(0), -1)
