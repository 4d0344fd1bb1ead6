"""What packing and quantizing promise of any weight, as properties."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import backends
import c_library
import numpy as np
import pytest
import torch
from format_oracle import Format
from hypothesis import given
from hypothesis import strategies as st
from oracle import FLOATING, unit_roundoff
from torch import Tensor
from weight_strategies import (
    dtypes,
    formats,
    generator,
    quick,
    random_codes,
    random_meta,
    random_words,
    seeds,
)

from hqqlora.ops import PackedWeight, Solver
from hqqlora.packed_codes import empty_words, pack_codes, unpack_codes, write_codes

ops = torch.ops.hqqlora
pytestmark = pytest.mark.usefixtures("one_thread")
NO_META = torch.zeros(0)


@contextlib.contextmanager
def library(name: str) -> Iterator[None]:
    """c_library's functions over the CPU's library, or over the emulated CUDA library."""
    chosen = c_library.library if name == "cpu" else backends.library
    with mock.patch.object(c_library, "library", chosen):
        yield


def bits_of_codes(f: Format) -> np.ndarray:
    """Of each word, the bits that hold a code."""
    return f.pack(np.full((f.N, f.K), 2**f.nbits - 1))


def packed_weight(f: Format, W_q: Tensor, scale: Tensor, zero: Tensor) -> PackedWeight:
    return PackedWeight(W_q, scale, zero, f.N, f.K, f.nbits, f.G, f.axis)


# ---- packing is a bijection ----------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "emulated cuda"])
@quick(60)
@given(f=formats(), seed=seeds)
def test_packing_is_a_bijection_of_codes_and_the_bits_that_hold_them(
    device: str, f: Format, seed: int
) -> None:
    """unpack o pack is the identity on codes, and pack o unpack on words: but for the bits
    that hold no code (of the last words, and the top two of 3 bits), which become zero. Where
    all bits hold one, that is every word there is."""
    codes, words = random_codes(f, seed).numpy(), random_words(f, seed).numpy()
    with library(device):
        assert np.array_equal(c_library.unpack(f, c_library.pack(f, codes)), codes)
        again = c_library.pack(f, c_library.unpack(f, words))
    assert np.array_equal(again, words & bits_of_codes(f))
    if f.nbits != 3 and f.grouped_shape[0] % f.per == 0:
        assert np.array_equal(again, words)


@quick(60)
@given(f=formats(), seed=seeds)
def test_packing_in_python_is_the_same_bijection(f: Format, seed: int) -> None:
    """packed_codes, against the C library: reading, and writing into empty words."""
    words = random_words(f, seed)
    codes = unpack_codes(packed_weight(f, words, NO_META, NO_META))
    assert np.array_equal(codes.numpy(), c_library.unpack(f, words.numpy()))
    again = empty_words(f.packed_shape, f.nbits)
    write_codes(again, f.nbits, 0, codes.reshape(-1))
    assert np.array_equal(again.numpy(), words.numpy() & bits_of_codes(f))
    if f.axis == 1:
        assert torch.equal(pack_codes(codes, f.nbits, f.G), again)


# ---- quantizing what is quantized ----------------------------------------------------------


@quick(60)
@given(f=formats(), seed=seeds, meta_dtype=dtypes)
def test_the_nearest_codes_to_the_dequantized_weight_are_its_codes(
    f: Format, seed: int, meta_dtype: torch.dtype
) -> None:
    """Quantizing with the same scale and zero: round(W / scale + zero) = q. W is rounded to its
    dtype by at most u |q - zero| steps, which is below half a step for all but 8 bits in bf16;
    there a code that is 127 or more from zero may come back as its neighbour."""
    codes = random_codes(f, seed)
    W_q = torch.from_numpy(f.pack(codes.numpy()))
    scale, zero = random_meta(f, seed, meta_dtype)
    group = f.group_of().reshape(f.N, f.K)
    s, z = (meta.double().reshape(-1)[group] for meta in (scale, zero))
    for dtype in FLOATING:
        W = ops.dequantize(*packed_weight(f, W_q, scale, zero), dtype)
        off = ((W.double() / s + z).round() - codes).abs()
        certain = unit_roundoff(dtype) * (codes - z).abs() < 0.499
        assert certain.all() or (f.nbits, dtype) == (8, torch.bfloat16)
        assert not off[certain].any()
        assert (off <= 1).all()


def with_both_ends(f: Format, codes: Tensor, seed: int) -> Tensor:
    """codes, with 0 and the largest code in every group."""
    order = torch.argsort(torch.from_numpy(f.group_of()), stable=True).reshape(f.groups, f.G)
    places = torch.rand(f.groups, f.G, generator=generator(seed)).argsort(1)[:, :2]
    flat = codes.reshape(-1).clone()
    flat[order.gather(1, places[:, :1])] = 0
    flat[order.gather(1, places[:, 1:])] = 2**f.nbits - 1
    return flat.reshape(f.N, f.K)


grouped = formats().filter(lambda f: f.G >= 2)


@pytest.mark.parametrize("solver", list(Solver))
@quick(40)
@given(f=grouped, seed=seeds)
def test_a_weight_that_the_format_holds_gets_its_own_codes(
    solver: Solver, f: Format, seed: int
) -> None:
    """quantize o dequantize is the identity on codes, for every solver, where both end codes
    occur in each group: then the range of the group is that of its codes, and has no error to
    be improved on. (A group that leaves an end code unused has a narrower range, and gets
    other codes: solvers know W alone.) Scale and zero come back to float32's rounding."""
    codes = with_both_ends(f, random_codes(f, seed), seed)
    scale, zero = random_meta(f, seed)
    W_q = torch.from_numpy(f.pack(codes.numpy()))
    W = ops.dequantize(*packed_weight(f, W_q, scale, zero), torch.float32)
    again, new_scale, new_zero = ops.quantize(
        W, f.nbits, f.G, f.axis, torch.float32, int(solver)
    )
    assert torch.equal(again, W_q)
    levels = 2**f.nbits - 1
    torch.testing.assert_close(new_scale, scale, rtol=levels * 2.0**-20, atol=0)
    torch.testing.assert_close(new_zero, zero, rtol=0, atol=levels * 2.0**-20)


@quick(60)
@given(f=grouped, seed=seeds, source=st.sampled_from(("normal", "coarse", "far")))
def test_minmax_quantizes_its_own_result_to_the_same_codes(
    f: Format, seed: int, source: str
) -> None:
    """Of any weight: the smallest and the largest of a group get the end codes, which is what
    the property above asks for. (Groups of one value have no range; they are one code.)"""
    W = torch.randn(f.N, f.K, generator=generator(seed))
    W = {"normal": W, "coarse": (2 * W).round() / 2, "far": W + 30}[source]
    arguments = (f.nbits, f.G, f.axis, torch.float32, int(Solver.MINMAX))
    first = ops.quantize(W, *arguments)
    again = ops.quantize(ops.dequantize(*packed_weight(f, *first), torch.float32), *arguments)
    assert torch.equal(again[0], first[0])


@quick(40)
@given(f=formats(), seed=seeds, exponent=st.integers(-20, 20))
def test_a_weight_times_a_power_of_two_gets_the_same_codes(
    f: Format, seed: int, exponent: int
) -> None:
    """The default solver works in units of each group's range: scales alone are multiplied.
    (hqq's has thresholds in units of the weight.)"""
    W = torch.randn(f.N, f.K, generator=generator(seed))
    arguments = (f.nbits, f.G, f.axis, torch.float32)
    W_q, scale, zero = ops.quantize(W, *arguments)
    found = ops.quantize(W * 2.0**exponent, *arguments)
    for left, right in zip(found, (W_q, scale * 2.0**exponent, zero), strict=True):
        assert torch.equal(left, right)
