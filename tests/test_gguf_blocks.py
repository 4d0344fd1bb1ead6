"""A GGUF block is an HQQ group: the codes are kept, scale and offset come back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from format_oracle import Format
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import Oracle, check_dgrad, check_linear
from torch import Tensor

from hqqlora.gguf.blocks import (
    FORMATS,
    Groups,
    encode_q4,
    encode_q8,
    scale_and_offset,
    scale_and_zero,
)
from hqqlora.ops import PackedWeight
from hqqlora.packed_codes import pack_codes, unpack_codes

gguf = pytest.importorskip("gguf")
from gguf_files import TYPES, random_blocks  # noqa: E402

SYMMETRIC = ("Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K")
WITH_OFFSET = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
U = 2.0**-24


def weights(groups: Groups) -> Tensor:
    """(q - zero) * scale, each operation rounded to float32, as the operators dequantize."""
    N, K = groups.codes.shape
    q = groups.codes.reshape(N, groups.scale.size(1), -1).float()
    return ((q - groups.zero.unsqueeze(-1)) * groups.scale.unsqueeze(-1)).reshape(N, K)


def decoded(kind: str, N: int = 6, K: int = 512) -> tuple[np.ndarray, Groups, Tensor]:
    rows = random_blocks(kind, N, K, np.random.default_rng(1))
    reference = torch.from_numpy(gguf.dequantize(rows, TYPES[kind]))
    return rows, FORMATS[kind].decode(torch.from_numpy(rows)), reference


# ---- every format ------------------------------------------------------------------------


def test_all_formats_are_tested_and_of_gguf_s_size() -> None:
    assert sorted(FORMATS) == sorted(SYMMETRIC + WITH_OFFSET)
    for name, form in FORMATS.items():
        assert gguf.GGML_QUANT_SIZES[TYPES[name]] == (form.block_size, form.block_bytes)


@pytest.mark.parametrize("kind", SYMMETRIC)
def test_weights_around_a_whole_zero_are_gguf_s_bit_for_bit(kind: str) -> None:
    _, groups, reference = decoded(kind)
    assert torch.equal(weights(groups), reference)


@pytest.mark.parametrize("kind", WITH_OFFSET)
def test_weights_with_an_offset_are_gguf_s_up_to_float32_rounding(kind: str) -> None:
    """zero = -m/d is rounded once, q - zero once, the product once: each by one part in 2^24,
    the first of |m|, the others of |w|; gguf itself rounds the sum once."""
    _, groups, reference = decoded(kind)
    shape = (*groups.scale.shape, -1)
    offset = (groups.scale * groups.zero).unsqueeze(-1).abs()
    bound = 1.01 * U * (offset + 3 * reference.reshape(shape).abs())
    assert ((weights(groups) - reference).reshape(shape).abs() <= bound).all()
    assert (groups.codes.reshape(shape).amax() + 1) in (4, 16, 32)


@pytest.mark.parametrize("kind", SYMMETRIC + WITH_OFFSET)
def test_codes_are_packed_as_hqq_packs_them(kind: str) -> None:
    _, groups, _ = decoded(kind)
    form, (N, K) = FORMATS[kind], groups.codes.shape
    oracle = Format(N, K, form.group_size, form.nbits, 1)
    W_q = pack_codes(groups.codes, form.nbits, form.group_size)
    assert np.array_equal(W_q.numpy(), oracle.pack(groups.codes.numpy()))
    metas = (groups.scale.reshape(-1, 1), groups.zero.reshape(-1, 1))
    packed = PackedWeight(W_q, *metas, N, K, form.nbits, form.group_size, 1)
    assert torch.equal(unpack_codes(packed), groups.codes)


@pytest.mark.parametrize("nbits", [8, 4, 3, 2])
def test_an_odd_number_of_groups_is_packed_too(nbits: int) -> None:
    codes = torch.randint(0, 2**nbits, (3, 32)).to(torch.uint8)
    W_q = pack_codes(codes, nbits, 32)
    assert np.array_equal(W_q.numpy(), Format(3, 32, 32, nbits, 1).pack(codes.numpy()))


# ---- there and back ----------------------------------------------------------------------


def test_q4_1_comes_back_byte_for_byte() -> None:
    rows, groups, _ = decoded("Q4_1")
    d, m = scale_and_offset(groups.scale, groups.zero)
    assert encode_q4(groups.codes, d, m).numpy().tobytes() == rows.tobytes()


def test_q4_0_and_q8_0_come_back_byte_for_byte() -> None:
    rows, groups, _ = decoded("Q4_0")
    d, _ = scale_and_offset(groups.scale, groups.zero)
    assert encode_q4(groups.codes, d, None).numpy().tobytes() == rows.tobytes()
    rows, groups, _ = decoded("Q8_0")
    d, _ = scale_and_offset(groups.scale, groups.zero)
    assert encode_q8(groups.codes ^ 128, d).numpy().tobytes() == rows.tobytes()


def bits_of(value: float) -> int:
    return int(np.float16(value).view(np.uint16))


FINITE_HALF = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7C00 != 0x7C00)


@given(d=FINITE_HALF, m=FINITE_HALF)
@example(d=bits_of(2**-24), m=bits_of(65504.0))  # the largest |m / d|
@example(d=bits_of(65504.0), m=bits_of(-(2**-24)))  # the smallest
@example(d=bits_of(-0.01), m=bits_of(0.5))
@example(d=bits_of(0.0), m=bits_of(0.25))
@example(d=bits_of(-0.0), m=bits_of(2**-24))
@example(d=bits_of(0.0), m=bits_of(-65504.0))
@example(d=bits_of(0.0), m=bits_of(-0.0))
@example(d=bits_of(-0.0), m=bits_of(0.0))
@example(d=bits_of(0.5), m=bits_of(-0.0))
def test_any_d_and_m_come_back_bit_for_bit_and_mean_the_same(d: int, m: int) -> None:
    halves = torch.tensor([d, m], dtype=torch.int32).to(torch.uint16).view(torch.float16)
    scale, zero = scale_and_zero(halves[:1].float(), halves[1:].float())
    assert scale.isfinite().all()
    assert zero.isfinite().all()
    back = torch.cat(scale_and_offset(scale, zero)).view(torch.uint16)
    assert back.tolist() == [d, m]
    # and the weight of every code is d q + m
    q = torch.arange(16.0)
    exact = halves[0].double() * q.double() + halves[1].double()
    error = ((q - zero) * scale - exact).abs()
    assert (error <= 1.01 * U * (halves[1].double().abs() + 3 * exact.abs())).all()
    if halves[0] == 0:
        assert (error == 0).all()


@given(st.lists(FINITE_HALF, min_size=512, max_size=512))
def test_random_blocks_of_any_halves_come_back(halves: list[int]) -> None:
    metas = torch.tensor(halves, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    d, m = metas.reshape(2, 4, 64)
    back = scale_and_offset(*scale_and_zero(d.float(), m.float()))
    for found, expected in zip(back, (d, m), strict=True):
        assert torch.equal(found.view(torch.uint16), expected.contiguous().view(torch.uint16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 40])
def test_the_operators_take_groups_without_a_scale(dtype: torch.dtype, M: int) -> None:
    """Where d is 0 the zero is 2^42 away: neither direction loses the offset in it."""
    N, K = 48, 96
    d, m = torch.randn(2, N, K // 32).mul(0.05).half().float()
    d[::3] = 0
    m[::6] = 2.0**-24
    scale, zero = scale_and_zero(d, m)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    metas = (scale.reshape(-1, 1), zero.reshape(-1, 1))
    weight = Oracle(PackedWeight(pack_codes(codes, 4, 32), *metas, N, K, 4, 32, 1))
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    y = torch.ops.hqqlora.linear(x, *weight.packed[:3], None, *weight.packed[3:])
    check_linear(x, y, weight)
    check_dgrad(dy, torch.ops.hqqlora.linear_dgrad(dy, *weight.packed), weight)
