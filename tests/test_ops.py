"""The ops on the CPU against float64: values, shapes, strides, dtypes, empty sizes."""

import itertools

import oracle
import pytest
import torch
from format_oracle import BITS, SLOTS
from oracle import FLOATING, Adapter, random_adapter, random_weight

import hqqlora.ops

ops = torch.ops.hqqlora

# N, K, G for axis 1, G for axis 0: even splits, groups across rows, tails in the last words
SHAPES = (
    (64, 128, 64, 32),
    (192, 576, 64, 64),
    (96, 160, 32, 96),
    (33, 70, 35, 11),  # odd everything
    (6, 10, 4, 4),  # groups run across rows and columns
    (1, 256, 64, 1),
    (256, 1, 16, 64),
)
ROWS = (1, 2, 5, 8, 9, 31, 70)


def covering_cases():
    """Every bits x axis x input dtype x meta dtype, shapes and row counts taking turns."""
    shapes, rows = itertools.cycle(SHAPES), itertools.cycle(ROWS)
    bias = itertools.cycle((False, True, True))
    for nbits, axis, dtype, meta in itertools.product(BITS, (0, 1), FLOATING, FLOATING):
        N, K, G1, G0 = next(shapes)
        yield next(rows), N, K, G1 if axis else G0, nbits, axis, dtype, meta, next(bias)


def linear(x, weight, bias=None):
    return ops.linear(x, *weight.packed[:3], bias, *weight.packed[3:])


def lora_linear(x, weight, adapter, bias=None, seed=None, p=0.0):
    return ops.lora_linear(
        x,
        *weight.packed[:3],
        bias,
        adapter.A,
        adapter.B,
        seed,
        adapter.scaling,
        p,
        *weight.packed[3:],
    )


def lora_backward(dy, x, xa, weight, adapter, seed=None, p=0.0, needs=(True, True, True)):
    gradients = ops.lora_linear_backward(
        dy,
        x,
        xa,
        *weight.packed[:3],
        adapter.A,
        adapter.B,
        seed,
        adapter.scaling,
        p,
        *weight.packed[3:],
        *needs,
    )
    for gradient, needed in zip(gradients, needs, strict=True):
        assert needed or gradient.shape == (0,)
    return tuple(g if n else None for g, n in zip(gradients, needs, strict=True))


# ---- quantize and dequantize -----------------------------------------------------------


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_quantize_gives_a_weight_close_to_the_original(nbits, axis):
    N, K, G = 96, 128, 32
    W = torch.randn(N, K)
    for dtype, meta in zip(FLOATING, FLOATING[::-1], strict=True):
        parts = ops.quantize(W.to(dtype), nbits, G, axis, meta)
        assert parts[0].shape == hqqlora.ops.packed_shape(N, K, nbits, G, axis)
        assert parts[1].shape == parts[2].shape == hqqlora.ops.meta_shape(N, K, G, axis)
        assert parts[1].dtype == parts[2].dtype == meta
        quantized = oracle.Oracle(hqqlora.ops.PackedWeight(*parts, N, K, nbits, G, axis))
        # a uniform grid over about +-2.5 sigma; half a step at most, but for clipped tails
        error = (quantized.W - W.double()).abs().mean()
        assert error < 2.5 / (2**nbits - 1) / 2 + 0.01


def test_quantize_takes_any_strides_and_every_solver():
    W = torch.randn(64, 96)
    for solver in hqqlora.ops.Solver:
        a = ops.quantize(W, 4, 32, 1, torch.float32, solver=int(solver))
        b = ops.quantize(W.T.contiguous().T, 4, 32, 1, torch.float32, solver=int(solver))
        for left, right in zip(a, b, strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_quantize_refuses_non_finite_weights(value):
    W = torch.randn(64, 64)
    W[17, 23] = value
    with pytest.raises(RuntimeError, match=r"hqqlora: .*(finite|NaN)"):
        ops.quantize(W, 4, 64, 1, torch.float32)


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_dequantize(nbits, axis):
    for (N, K, G1, G0), meta in zip(SHAPES, itertools.cycle(FLOATING), strict=False):
        weight = random_weight(N, K, G1 if axis else G0, nbits, axis, meta)
        for dtype in FLOATING:
            W = ops.dequantize(*weight.packed, dtype)
            assert W.dtype == dtype
            # rounded once to dtype, after float32 arithmetic on q - zero
            bound = oracle.unit_roundoff(dtype) * weight.W.abs() + 2.0**-22 * weight.magnitude
            oracle.assert_close(W, weight.W, bound + oracle.smallest(dtype))


# ---- linear and linear_dgrad -----------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [4, None], ids=["few_rows", "all_rows"])
def test_identity_shows_every_code_at_every_position(nbits, axis, dtype, rows):
    """Row by row, y = x W^T of the identity is W: a code in the wrong place cannot hide. Few
    rows at a time and all at once take different kernels."""
    N, K, G = 48, 64, 16
    weight = random_weight(N, K, G, nbits, axis)
    step = 1 if nbits < 8 else 37  # 8 bits: every code, seven at a time
    for shift in range(0, 2**nbits, step):
        W_q = weight.packed.W_q
        if nbits == 8:
            W_q = (torch.arange(N * K) + shift).to(torch.uint8).reshape(W_q.shape)
        else:
            codes = (weight.codes + shift) % 2**nbits
            W_q = pack(codes, weight.packed)
        shifted = oracle.Oracle(weight.packed._replace(W_q=W_q))
        u = 2 * oracle.unit_roundoff(dtype)  # one unit in the last place
        for matrix, size, op in (
            (shifted.W.T, K, lambda x, s=shifted: linear(x, s)),
            (shifted.W, N, lambda x, s=shifted: ops.linear_dgrad(x, *s.packed)),
        ):
            parts = torch.eye(size, dtype=dtype).split(rows or size)
            product = torch.cat([op(part) for part in parts])
            magnitude = shifted.magnitude.T if size == K else shifted.magnitude
            bound = u * matrix.abs() + 2.0**-21 * magnitude + oracle.smallest(dtype)
            oracle.assert_close(product, matrix, bound)


def pack(codes, packed):
    """Codes [N, K] -> words, the inverse of Oracle.codes."""
    _, _, _, _, _, nbits, _, _ = packed
    words, per = packed.W_q.numel(), SLOTS[nbits]
    slots = torch.zeros(per * words, dtype=torch.int64)
    slots[: codes.numel()] = codes.reshape(-1)
    shifts = nbits * (per - 1 - torch.arange(per).reshape(per, 1))
    total = (slots.reshape(per, words) << shifts).sum(0)
    return total.to(packed.W_q.dtype).reshape(packed.W_q.shape)


def check_products(cases):
    for M, N, K, G, nbits, axis, dtype, meta, with_bias in cases:
        weight = random_weight(N, K, G, nbits, axis, meta)
        x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        bias = torch.randn(N).to(dtype if M % 2 else torch.float32) if with_bias else None
        oracle.check_linear(x, linear(x, weight, bias), weight, bias)
        oracle.check_dgrad(dy, ops.linear_dgrad(dy, *weight.packed), weight)


def test_linear_and_dgrad_against_float64():
    check_products(covering_cases())


def check_that_identity_gives_the_very_bits():
    """Of the plain loops: y of the identity is the dequantized weight, rounded once."""
    for N, K, G1, G0 in SHAPES[2:]:
        for nbits, axis, dtype in itertools.product(BITS, (0, 1), FLOATING):
            weight = random_weight(N, K, G1 if axis else G0, nbits, axis)
            W = ops.dequantize(*weight.packed, dtype)
            assert torch.equal(linear(torch.eye(K, dtype=dtype), weight), W.T)
            assert torch.equal(ops.linear_dgrad(torch.eye(N, dtype=dtype), *weight.packed), W)


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 576, 576),  # SmolLM2-135M: attention, mlp, key and value
        (130, 576, 1536),
        (257, 1536, 576),
        (64, 192, 576),
        (1, 4096, 4096),  # Llama-3-8B, or a part of its mlp
        (2, 512, 14336),
        (20, 14336, 512),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_real_shapes(M, N, K, axis):
    weight = random_weight(N, K, 64, 4, axis, torch.bfloat16)
    for dtype in FLOATING if N * K < 2**22 else (torch.bfloat16,):
        x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        oracle.check_linear(x, linear(x, weight), weight)
        oracle.check_dgrad(dy, ops.linear_dgrad(dy, *weight.packed), weight)


# ---- strides and leading dimensions ----------------------------------------------------


def same_values(x):
    """x [12, K] in other memory layouts, each with whether it can be read in place."""
    M, K = x.shape
    wide = torch.full((M, K + 8), float("nan"), dtype=x.dtype)
    wide[:, 3 : 3 + K] = x
    tall = torch.full((2 * M + 1, K), float("nan"), dtype=x.dtype)
    tall[1::2] = x
    yield "columns sliced", wide[:, 3 : 3 + K], True
    yield "rows sliced", tall[1::2], True
    yield "both dimensions split", wide[:, 3 : 3 + K].unflatten(0, (3, 4)), True
    yield "ones between", x.reshape(3, 1, 4, 1, K), True
    yield "transposed", x.T.contiguous().T, False
    yield "leading dimensions permuted", x.reshape(3, 4, K).permute(1, 0, 2), False
    yield "negative offset of nothing", x[:0].reshape(0, 5, K), True


@pytest.mark.parametrize("dtype", FLOATING)
def test_strided_inputs_give_the_same_bits(dtype):
    weight = random_weight(24, 64, 32)
    x = torch.randn(12, 64).to(dtype)
    for name, view, in_place in same_values(x):
        expected = linear(view.contiguous(), weight)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as events:
            y = linear(view, weight)
        copies = sum(event.key == "aten::copy_" for event in events.key_averages())
        assert copies == (0 if in_place else 1), name
        assert y.shape == (*view.shape[:-1], 24), name
        assert torch.equal(y, expected), name
        dx = ops.linear_dgrad(y.transpose(0, -1).contiguous().transpose(0, -1), *weight.packed)
        assert torch.equal(dx, ops.linear_dgrad(y, *weight.packed)), name


def test_broadcast_rows_and_single_rows():
    weight = random_weight(24, 64, 32)
    row = torch.randn(64)
    y = linear(row, weight)
    assert y.shape == (24,)
    assert torch.equal(
        linear(row.expand(3, 5, 64), weight), linear(row.repeat(3, 5, 1), weight)
    )
    oracle.check_linear(row, y, weight)
    # as y.sum().backward() gives it: one element for all
    dy = torch.ones(()).expand(6, 24)
    assert torch.equal(
        ops.linear_dgrad(dy, *weight.packed), ops.linear_dgrad(dy.contiguous(), *weight.packed)
    )


@pytest.mark.parametrize(
    ("M", "N", "K", "R"), list(itertools.product((0, 3), (0, 4), (0, 8), (0, 2)))
)
def test_empty_sizes(M, N, K, R):
    weight, adapter = random_weight(N, K, 4), random_adapter(N, K, R)
    x, dy, bias = torch.randn(2, M, K), torch.randn(2, M, N), torch.randn(N)
    W = ops.dequantize(*weight.packed, torch.float32)
    assert W.shape == (N, K)
    oracle.check_linear(x, linear(x, weight, bias), weight, bias)
    oracle.check_dgrad(dy, ops.linear_dgrad(dy, *weight.packed), weight)
    y, xa = lora_linear(x, weight, adapter, bias)
    assert xa.shape == (2 * M, R)
    adapter.check_forward(x, y, xa, weight, bias)
    adapter.check_backward(dy, x, lora_backward(dy, x, xa, weight, adapter), weight)
    quantized = ops.quantize(torch.randn(N, K), 4, 4, 1, torch.float32)
    assert quantized[0].shape == hqqlora.ops.packed_shape(N, K, 4, 4, 1)


# ---- LoRA ------------------------------------------------------------------------------


def check_lora(cases):
    ranks = itertools.cycle((8, 1, 16, 3, 64, 256))
    for M, N, K, G, nbits, axis, dtype, meta, with_bias in cases:
        weight = random_weight(N, K, G, nbits, axis, meta)
        adapter = random_adapter(N, K, next(ranks), 0.7, dtype if M % 3 else torch.float32)
        x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        bias = torch.randn(N) if with_bias else None
        y, xa = lora_linear(x, weight, adapter, bias)
        adapter.check_forward(x, y, xa, weight, bias)
        adapter.check_backward(dy, x, lora_backward(dy, x, xa, weight, adapter), weight)


def test_lora_against_float64():
    check_lora(covering_cases())


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("M", [3, 40])
def test_dropout_is_the_same_forward_and_backward(dtype, M):
    N, K, p, seed = 48, 96, 0.3, torch.tensor([-7])
    weight, mask = random_weight(N, K, 32), oracle.dropout_mask(M, 96, p, seed)
    plain = random_adapter(N, K, 8)
    adapter = Adapter(plain.A, plain.B, plain.scaling, mask)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    y, xa = lora_linear(x, weight, plain, seed=seed, p=p)
    adapter.check_forward(x, y, xa, weight)
    gradients = lora_backward(dy, x, xa, weight, plain, seed, p)
    adapter.check_backward(dy, x, gradients, weight)
    _, _, dB = lora_backward(dy, x, None, weight, plain, seed, p, (False, False, True))
    adapter.check_backward(dy, x, (None, None, dB), weight)  # xa computed again


def test_dropout_mask_is_random():
    M, K, p = 200, 256, 0.3
    mask = oracle.dropout_mask(M, K, p, torch.tensor([1]))
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    sigma = (p * (1 - p) / (M * K)) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * sigma
    for dim in (0, 1):  # no row and no column stands out
        rates = kept.double().mean(dim)
        assert ((rates - (1 - p)).abs() < 5 * (p * (1 - p) / kept.shape[dim]) ** 0.5).all()
    for seed in (2, 1 + 2**32, -1):  # other seeds: agreement as of independent masks
        other = oracle.dropout_mask(M, K, p, torch.tensor([seed])) != 0
        expected = p * p + (1 - p) * (1 - p)
        agreement = (kept == other).double().mean().item()
        assert abs(agreement - expected) < 5 * (expected * (1 - expected) / (M * K)) ** 0.5
    neighbours = (kept[:, 1:] == kept[:, :-1]).double().mean().item()
    assert abs(neighbours - expected) < 0.02


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
def test_only_the_gradients_that_are_asked_for(needs):
    M, N, K, R = 7, 24, 64, 4
    weight, adapter = random_weight(N, K, 32), random_adapter(N, K, R)
    x, dy = torch.randn(M, K), torch.randn(M, N)
    _, xa = lora_linear(x, weight, adapter)
    needs_dA, needs_dB = needs[1:]
    gradients = lora_backward(
        dy, x if needs_dA else None, xa if needs_dB else None, weight, adapter, needs=needs
    )
    adapter.check_backward(dy, x, gradients, weight)


def test_strided_adapter_gives_the_same_bits():
    weight, adapter = random_weight(24, 64, 32), random_adapter(24, 64, 4)
    strided = Adapter(adapter.A.T.contiguous().T, adapter.B.T.contiguous().T, adapter.scaling)
    x, dy = torch.randn(5, 64), torch.randn(5, 24)
    y, xa = lora_linear(x, weight, adapter)
    for left, right in zip(lora_linear(x, weight, strided), (y, xa), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(
        lora_backward(dy, x, xa, weight, strided),
        lora_backward(dy, x, xa, weight, adapter),
        strict=True,
    ):
        assert torch.equal(left, right)


def test_inference_mode():
    weight, adapter = random_weight(24, 64, 32), random_adapter(24, 64, 4)
    x = torch.randn(5, 64)
    expected = linear(x, weight)
    with torch.inference_mode():
        for view in (x, x.T.contiguous().T):
            y = linear(view, weight)
            assert y.is_inference()
            assert torch.equal(y, expected)
            assert lora_linear(view, weight, adapter)[0].is_inference()
