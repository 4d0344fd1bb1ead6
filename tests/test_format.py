"""The packed format, bit for bit: against arrays that hqq wrote, against hqq itself where it is
installed, and against a numpy statement of the format (format_oracle.py)."""

import json
import random
from pathlib import Path

import c_library
import numpy as np
import pytest
import torch
from format_oracle import BITS, Format
from safetensors import safe_open

import hqqlora.ops
from hqqlora import BaseQuantizeConfig, HQQLinear

GOLDEN = Path(__file__).parent / "golden" / "hqq_0.2.8.safetensors"
FLOATING = [torch.float32, torch.float16, torch.bfloat16]


def read_golden():
    with safe_open(GOLDEN, "pt") as file:
        cases = {
            name: (Format(*(case[key] for key in ("N", "K", "G", "nbits", "axis"))), {})
            for name, case in json.loads(file.metadata()["cases"]).items()
        }
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name, _, part = key.rpartition(".")
            cases[name][1][part] = file.get_tensor(key)
    return cases


CASES = read_golden()


def integer_words(f: Format, W_q: torch.Tensor) -> torch.Tensor:
    """W_q as integers, whatever dtype its bytes are viewed as."""
    return W_q.view(torch.int32 if f.nbits == 3 else torch.uint8)


def dequantize(f: Format, W_q, scale, zero, dtype=torch.float32):
    return torch.ops.hqqlora.dequantize(W_q, scale, zero, f.N, f.K, f.nbits, f.G, f.axis, dtype)


def unused_bits(f: Format, packed: np.ndarray) -> np.ndarray:
    """The bits of each word that hold no element."""
    word, shift = f.place()
    used = np.zeros(f.words, np.int64)
    np.add.at(used, word, np.int64(2**f.nbits - 1) << shift)
    return packed.reshape(-1).astype(np.int64) & ~used


def random_format(pick: random.Random, nbits: int, axis: int) -> Format:
    """Any legal shape: also those that hqq cannot pack, with a tail in the last words."""
    while True:
        N, K = pick.randint(1, 40), pick.randint(1, 70)
        divisors = [d for d in range(1, N * K + 1) if N * K % d == 0]
        G = pick.choice([*divisors, K if axis == 1 else N])
        if max(N, K) * 4 >= G:
            return Format(N, K, G, nbits, axis)


def random_weight(f: Format, seed: int):
    """Random codes with both ends among them, their words, and scale and zero."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**f.nbits, (f.N, f.K)).astype(np.uint8)
    codes.flat[0], codes.flat[-1] = 2**f.nbits - 1, 2**f.nbits - 1
    scale = generator.uniform(0.001, 0.1, f.meta_shape).astype(np.float32)
    zero = generator.uniform(-1, 2**f.nbits, f.meta_shape).astype(np.float32)
    return codes, f.pack(codes), scale, zero


ANY_FORMAT = [
    pytest.param(
        random_format(random.Random(1000 * seed + 10 * nbits + axis), nbits, axis),
        id=f"{nbits}bit-axis{axis}-{seed}",
    )
    for nbits in BITS
    for axis in (1, 0)
    for seed in range(6)
]


# ---- what hqq wrote -------------------------------------------------------------------------


def test_golden_covers_the_format():
    assert {(f.nbits, f.axis) for f, _ in CASES.values()} == {
        (b, a) for b in BITS for a in (0, 1)
    }
    for nbits in BITS:  # every code, the largest included, is in some array
        codes = torch.cat([t["codes"].flatten() for f, t in CASES.values() if f.nbits == nbits])
        if nbits == 8:
            assert (codes.min(), codes.max()) == (0, 255)
        else:
            assert codes.unique().tolist() == list(range(2**nbits))
    views = {t["W_q"].dtype for _, t in CASES.values() if t["W_q"].is_floating_point()}
    assert views == set(FLOATING)


@pytest.mark.parametrize("name", CASES)
def test_golden_words(name):
    """The library and the oracle read and write hqq's words as hqq does."""
    f, arrays = CASES[name]
    W_q = integer_words(f, arrays["W_q"])
    words, codes = W_q.numpy(), arrays["codes"].numpy()

    assert hqqlora.ops.packed_shape(f.N, f.K, f.nbits, f.G, f.axis) == W_q.shape
    assert hqqlora.ops.meta_shape(f.N, f.K, f.G, f.axis) == arrays["scale"].shape
    assert c_library.layout_of(f) == (W_q.numel(), W_q.element_size(), f.groups)

    np.testing.assert_array_equal(f.unpack(words), codes)
    np.testing.assert_array_equal(f.pack(codes), words)
    np.testing.assert_array_equal(c_library.unpack(f, words), codes)
    np.testing.assert_array_equal(c_library.pack(f, codes), words)
    assert not unused_bits(f, words).any()


@pytest.mark.parametrize("name", [name for name, (_, t) in CASES.items() if "dequantized" in t])
def test_golden_values(name):
    """hqq's float32 values bit for bit; 16-bit results are those, rounded once."""
    f, arrays = CASES[name]
    W_q, scale, zero = arrays["W_q"], arrays["scale"], arrays["zero"]
    assert torch.equal(dequantize(f, W_q, scale, zero), arrays["dequantized"])
    for meta_dtype in FLOATING:
        s, z = scale.to(meta_dtype), zero.to(meta_dtype)
        expected = f.dequantize(W_q.numpy(), s.float().numpy(), z.float().numpy())
        for dtype in FLOATING:
            ours = dequantize(f, W_q, s, z, dtype)
            assert torch.equal(ours, torch.from_numpy(expected).to(dtype)), (meta_dtype, dtype)


# ---- any shape ------------------------------------------------------------------------------


@pytest.mark.parametrize("f", ANY_FORMAT)
def test_words_of_any_shape(f):
    codes, packed, _, _ = random_weight(f, seed=1)
    assert hqqlora.ops.packed_shape(f.N, f.K, f.nbits, f.G, f.axis) == f.packed_shape
    assert c_library.layout_of(f) == (f.words, packed.itemsize, f.groups)
    written = c_library.pack(f, codes)
    np.testing.assert_array_equal(written, packed)
    assert not unused_bits(f, written).any()  # the tail and the top two bits of 3-bit words
    np.testing.assert_array_equal(c_library.unpack(f, packed), codes)


@pytest.mark.parametrize("f", ANY_FORMAT)
def test_values_of_any_shape(f):
    codes, packed, scale, zero = random_weight(f, seed=2)
    expected = f.dequantize(packed, scale, zero)
    group = f.group_of().reshape(f.N, f.K)
    n, k = f.N - 1, f.K // 2  # one element by hand
    s, z = scale.flat[group[n, k]], zero.flat[group[n, k]]
    assert expected[n, k] == (np.float32(codes[n, k]) - z) * s

    ours = dequantize(f, *map(torch.from_numpy, (packed, scale, zero)))
    np.testing.assert_array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("f", ANY_FORMAT)
def test_blocks_of_any_shape(f):
    """hqq_dequantize of part of the rows and columns; what lies between rows is left alone."""
    _, packed, scale, zero = random_weight(f, seed=3)
    whole = f.dequantize(packed, scale, zero)
    pick = random.Random(f.elements)
    for _ in range(4):
        rows = tuple(sorted(pick.choices(range(f.N + 1), k=2)))
        columns = tuple(sorted(pick.choices(range(f.K + 1), k=2)))
        block = c_library.dequantize_block(f, packed, scale, zero, rows, columns, padding=3)
        np.testing.assert_array_equal(
            block[:, : columns[1] - columns[0]], whole[slice(*rows), slice(*columns)]
        )
        assert np.isnan(block[:, columns[1] - columns[0] :]).all()


@pytest.mark.parametrize("axis", [1, 0])
def test_bits_that_hold_no_code_are_not_read(axis):
    """A writer that leaves rubbish in the tail, or in the top of 3-bit words, does no harm."""
    for nbits in (4, 3, 2, 1):
        # 15 groups or 15 rows, uneven for every number of slots in a word
        f = Format(5, 21, 7, nbits, 1) if axis == 1 else Format(15, 7, 15, nbits, 0)
        _, packed, scale, zero = random_weight(f, seed=4)
        all_ones = np.full(f.words, -1 if nbits == 3 else 255, f.word_dtype)
        rubbish = unused_bits(f, all_ones).astype(f.word_dtype).reshape(f.packed_shape)
        assert rubbish.any()
        dirty = packed | rubbish
        np.testing.assert_array_equal(c_library.unpack(f, dirty), f.unpack(packed))
        meta = torch.from_numpy(scale), torch.from_numpy(zero)
        clean_values = dequantize(f, torch.from_numpy(packed), *meta)
        assert torch.equal(dequantize(f, torch.from_numpy(dirty), *meta), clean_values)
        # W_q enters products too: identity x gives W back
        clean, soiled = (
            torch.ops.hqqlora.linear(
                torch.eye(f.K), torch.from_numpy(w), *meta, None, f.N, f.K, nbits, f.G, axis
            )
            for w in (packed, dirty)
        )
        assert torch.equal(clean, soiled)


@pytest.mark.parametrize("solver", list(hqqlora.ops.Solver))
@pytest.mark.parametrize("f", ANY_FORMAT[::3])
def test_quantize_writes_the_format(f, solver):
    """The quantizer's words have the right shape and nothing in the tail, and every element got
    its own code: the nearest one, or an end of the range."""
    weight = torch.randn(f.N, f.K, generator=torch.Generator().manual_seed(5))
    W_q, scale, zero = torch.ops.hqqlora.quantize(
        weight, f.nbits, f.G, f.axis, torch.float32, int(solver)
    )
    assert W_q.shape == f.packed_shape
    assert W_q.dtype == (torch.int32 if f.nbits == 3 else torch.uint8)
    assert scale.shape == zero.shape == f.meta_shape
    assert not unused_bits(f, W_q.numpy()).any()

    steps = (dequantize(f, W_q, scale, zero) - weight).numpy().flatten()
    steps /= scale.numpy().flat[f.group_of()]
    codes = f.unpack(W_q.numpy()).flatten()
    clipped = ((codes == 0) & (steps > 0)) | ((codes == 2**f.nbits - 1) & (steps < 0))
    assert np.isfinite(steps).all()
    assert (np.abs(steps[~clipped]) <= 0.501).all()


# ---- hqq itself, where it is installed -----------------------------------------------------


def hqq_can_pack(f: Format) -> bool:
    """hqq splits the rows evenly among a byte's slots; its 3-bit packing pads instead."""
    return f.nbits == 3 or f.grouped_shape[0] % f.per == 0


def formats_for_hqq(count: int) -> list[Format]:
    pick = random.Random(20)
    formats = []
    for i in range(count):
        f = random_format(pick, BITS[i % 5], i // 5 % 2)
        while not hqq_can_pack(f):
            f = random_format(pick, f.nbits, f.axis)
        formats.append(f)
    return formats


@pytest.mark.parametrize("f", formats_for_hqq(60), ids=str)
def test_against_hqq(f):
    """hqq's weights mean the same here, and ours mean the same to hqq."""
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = torch.randn(f.N, f.K, generator=torch.Generator().manual_seed(f.elements))
    W_q, meta = quantizer.quantize(
        weight, nbits=f.nbits, group_size=f.G, axis=f.axis, device="cpu"
    )
    theirs = quantizer.dequantize(W_q, meta | {"compute_dtype": torch.float32})
    assert torch.equal(dequantize(f, W_q, meta["scale"], meta["zero"]), theirs)

    W_q, scale, zero = torch.ops.hqqlora.quantize(weight, f.nbits, f.G, f.axis, torch.float32)
    ours = meta | {"compute_dtype": torch.float32, "scale": scale, "zero": zero}
    assert torch.equal(quantizer.dequantize(W_q, ours), dequantize(f, W_q, scale, zero))


@pytest.mark.parametrize("view", FLOATING, ids=str)
@pytest.mark.parametrize("nbits", BITS)
def test_float_view_against_hqq(nbits, view):
    """A layer that hqq saved with view_as_float loads, and ours is the same bytes."""
    hqq = pytest.importorskip("hqq.core.quantize")
    linear = torch.nn.Linear(32, 48)
    config = hqq.BaseQuantizeConfig(nbits=nbits, group_size=16, axis=1, view_as_float=True)
    theirs = hqq.HQQLinear(linear, config, del_orig=False, compute_dtype=view, device="cpu")
    assert theirs.W_q.dtype == view

    layer = HQQLinear(
        torch.nn.Linear(32, 48),
        BaseQuantizeConfig(nbits=nbits, group_size=16, axis=1, view_as_float=True),
        compute_dtype=view,
    )
    layer.load_state_dict(theirs.state_dict())
    assert not layer.W_q.is_floating_point()
    stored = layer.state_dict()["W_q"]
    assert stored.dtype == view
    assert torch.equal(stored.view(torch.uint8), theirs.W_q.data.view(torch.uint8))
    layer.repack(planes=False)
    assert layer.W_q.dtype == (torch.int32 if nbits == 3 else torch.uint8)
    expected = theirs.W_q.data.view(layer.W_q.dtype)
    assert torch.equal(layer.W_q.flatten(), expected.flatten())
