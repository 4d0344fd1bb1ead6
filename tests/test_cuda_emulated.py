"""The CUDA library's kernels, run on the CPU by the emulator, against float64: the very tests
of the CPU ops, and shapes that reach each of the kernels."""

import itertools

import oracle
import pytest
import test_ops
import torch
from backends import DEVICES, EmulatedOps, counts, library, set_device, set_schedule
from oracle import FLOATING, Adapter, random_adapter, random_weight
from test_ops import (  # noqa: F401 (collected here once more, over the CUDA library)
    linear,
    lora_backward,
    lora_linear,
    test_dequantize,
    test_dropout_is_the_same_forward_and_backward,
    test_empty_sizes,
    test_identity_shows_every_code_at_every_position,
    test_linear_and_dgrad_against_float64,
    test_lora_against_float64,
    test_only_the_gradients_that_are_asked_for,
    test_quantize_gives_a_weight_close_to_the_original,
)

from hqqlora.ops import Solver

HALVES = (torch.bfloat16, torch.float16)
ALIGNED_BITS = (8, 4, 2, 1)
cpu = torch.ops.hqqlora


@pytest.fixture(autouse=True)
def ops(monkeypatch):
    """test_ops runs over the emulated library, in the plainest schedule."""
    emulated = EmulatedOps()
    monkeypatch.setattr(test_ops, "ops", emulated)
    set_schedule()
    yield emulated
    set_schedule()
    set_device()


def use(monkeypatch, kernel):
    monkeypatch.setattr(test_ops, "ops", EmulatedOps(kernel))


def aligned_weight(N, K, G, nbits, axis, dtype):
    """One that the kernels of small products take."""
    return random_weight(N, K, G, nbits, axis, dtype)


def check_everything(M, weight, adapter, dtype, bias=None, seed=None, p=0.0):
    """Forward and backward, with xa kept and with xa made again."""
    N, K = weight.W.shape
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    y, xa = lora_linear(x, weight, adapter, bias, seed, p)
    adapter.check_forward(x, y, xa, weight, bias)
    gradients = lora_backward(dy, x, xa, weight, adapter, seed, p)
    adapter.check_backward(dy, x, gradients, weight)
    again = lora_backward(dy, x, None, weight, adapter, seed, p)
    for left, right in zip(gradients, again, strict=True):
        assert torch.equal(left, right)  # and results repeat bitwise
    oracle.check_linear(x, linear(x, weight, bias), weight, bias)
    oracle.check_dgrad(dy, test_ops.ops.linear_dgrad(dy, *weight.packed), weight)


# ---- small products ----------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", ALIGNED_BITS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_products_on_packed_codes(monkeypatch, ops, dtype, nbits, axis):
    """Chosen up to 16 rows; beyond, the wide kernel may be chosen."""
    use(monkeypatch, "direct")
    shapes = ((64, 64, 64), (128, 192, 64), (192, 320, 64), (256, 128, 128), (320, 256, 64))
    for (N, K, G), M, R in zip(shapes, (1, 8, 9, 33, 64), (8, 1, 16, 4, 32), strict=True):
        weight = aligned_weight(N, K, G, nbits, axis, dtype)
        for transpose in (False, True):
            chosen = ops.chosen(weight.packed, M, dtype, transpose)
            assert chosen == "direct" or (M > 16 and axis == 1 and chosen == "tiled")
        before = counts().mma
        check_everything(M, weight, random_adapter(N, K, R), dtype, torch.randn(N))
        assert counts().mma > before, "no tensor core was used"


def test_outputs_that_fill_no_tile(ops):
    """Axis 1: N is any multiple of the codes in a byte."""
    for N, nbits in itertools.product((8, 72, 200), ALIGNED_BITS):
        weight = aligned_weight(N, 128, 64, nbits, 1, torch.bfloat16)
        assert ops.chosen(weight.packed, 5, torch.bfloat16, False) == "direct"
        check_everything(5, weight, random_adapter(N, 128, 3), torch.bfloat16)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("device", "nbits"), [("H100", 8), ("H100", 4), ("H100", 1), ("A100", 4), ("RTX 4090", 1)]
)
def test_sums_that_many_warps_share(device, nbits, axis):
    """Ways of a block and splits over blocks, whose ends need not meet those of panels. Splits
    are counted on an H100, marked elsewhere; a 4090's blocks of 64 tokens have one way."""
    set_device(device)
    for N, K, M, R in ((64, 1984, 3, 4), (192, 1024, 16, 2), (128, 1344, 40, 1)):
        dtype = HALVES[M % 2]
        weight = aligned_weight(N, K, 64, nbits, axis, dtype)
        check_everything(M, weight, random_adapter(N, K, R), dtype, torch.randn(N))
        transposed = aligned_weight(K, N, 64, nbits, axis, dtype)
        dy = torch.randn(M, K).to(dtype)
        dx = test_ops.ops.linear_dgrad(dy, *transposed.packed)
        oracle.check_dgrad(dy, dx, transposed)


def keep_workspace(ops, monkeypatch):
    """Every call gets what the first one was given, as it is by then; in the list returned."""
    kept = []
    given = ops.workspace

    def workspace(*asked):
        kept.extend([] if kept else [given(*asked)])
        return kept[0]

    monkeypatch.setattr(ops, "workspace", workspace)
    return kept


@pytest.mark.parametrize("order", ["FIFO", "RANDOM"])
@pytest.mark.parametrize("device", DEVICES)
def test_many_splits_repeat_bitwise(monkeypatch, device, order):
    """Whichever block comes last, and over the workspace that the last call left."""
    set_device(device)
    for M in (5, 12, 40):
        ops = EmulatedOps()
        kept = keep_workspace(ops, monkeypatch)
        monkeypatch.setattr(test_ops, "ops", ops)
        weight = aligned_weight(64, 4096, 64, 4, 1, torch.bfloat16)
        for seed in range(3):
            x = torch.randn(M, 4096).bfloat16()
            set_schedule(order, "LATE", seed)
            y = linear(x, weight)
            oracle.check_linear(x, y, weight)
            memory, _ = kept[0]
            assert not memory[:16].any(), "who arrived is cleared for the next call"
            set_schedule("FIFO")
            assert torch.equal(linear(x, weight), y)


# N, K, M, bits, axis; multiprocessors, for which the grid has these ways and splits
PAIRED = {
    "alone, 4 ways": (64, 1984, 40, 4, 1, 132),
    "alone, 4 ways, uneven": (128, 1344, 12, 4, 0, 132),
    "four of them, 4 ways": (64, 4096, 40, 4, 0, 132),
    "four of them, 4 ways, 16 tokens": (64, 4096, 16, 1, 0, 132),
    "eight of them, 2 ways, 16 tokens": (64, 4096, 12, 8, 0, 132),
    "four of them, 1 way, 16 tokens": (64, 1984, 12, 8, 1, 132),
    "alone, 2 ways, uneven": (256, 1536, 40, 4, 1, 2),
    "two of them, 2 ways, uneven": (256, 3072, 40, 4, 1, 4),
    "alone, 2 ways, 8 bits": (256, 1792, 64, 8, 0, 4),
    "alone, 1 way, 64 tokens": (448, 2048, 64, 8, 1, 4),
}


@pytest.mark.parametrize("case", PAIRED)
def test_pairs_of_splits(ops, case):
    """Two blocks as a cluster finish half of the tokens each. Both passes; other orders of the
    blocks change no bit."""
    N, K, M, nbits, axis, multiprocessors = PAIRED[case]
    dtype = HALVES[M % 2]
    set_device("H100", multiprocessors)
    weight = aligned_weight(N, K, 64, nbits, axis, dtype)
    transposed = aligned_weight(K, N, 64, nbits, 1 - axis, dtype)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N)
    before = counts().clusters
    y, dx = linear(x, weight, bias), ops.linear_dgrad(x, *transposed.packed)
    assert counts().clusters > before, "no cluster"
    oracle.check_linear(x, y, weight, bias)
    oracle.check_dgrad(x, dx, transposed)
    for order in ("LIFO", "RANDOM", "PRIORITY"):
        set_schedule(order, "MIXED")
        assert torch.equal(linear(x, weight, bias), y)
        assert torch.equal(ops.linear_dgrad(x, *transposed.packed), dx)


def test_pairs_where_the_code_knows_none(ops):
    """A library for older devices alone, on an H100: the same splits, without clusters."""
    weight = aligned_weight(64, 4096, 64, 4, 0, torch.bfloat16)
    x = torch.randn(40, 4096).bfloat16()
    library().hqqlora_emulated_set_ptx_version(80)
    before = counts().clusters
    y = linear(x, weight)
    assert counts().clusters == before
    oracle.check_linear(x, y, weight)


@pytest.mark.parametrize("axis", [0, 1])
def test_every_number_of_rows(axis):
    """From one to beyond all thresholds; small weights, each row of its own size."""
    weight = aligned_weight(64, 128, 64, 4, axis, torch.bfloat16)
    for M in (*range(1, 71), 130):
        x, dy = torch.randn(M, 128), torch.randn(M, 64)
        sizes = 2.0 ** torch.randint(-8, 8, (M, 1))
        x, dy = (x * sizes).bfloat16(), (dy * sizes).bfloat16()
        oracle.check_linear(x, linear(x, weight), weight)
        oracle.check_dgrad(dy, test_ops.ops.linear_dgrad(dy, *weight.packed), weight)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", ALIGNED_BITS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_identity_through_small_products(ops, dtype, nbits, axis):
    """A code in the wrong place cannot hide: y = x W^T of the identity is W."""
    N, K = 128, 128
    weight = aligned_weight(N, K, 64, nbits, axis, dtype)
    for matrix, magnitude, op in (
        (weight.W.T, weight.magnitude.T, lambda x: linear(x, weight)),
        (weight.W, weight.magnitude, lambda x: ops.linear_dgrad(x, *weight.packed)),
    ):
        for rows in (8, 64):
            product = torch.cat([op(part) for part in torch.eye(128, dtype=dtype).split(rows)])
            u = 2 * oracle.unit_roundoff(dtype)
            bound = u * matrix.abs() + 2.0**-19 * magnitude + oracle.smallest(dtype)
            oracle.assert_close(product, matrix, bound)


# ---- every kernel, every shape -----------------------------------------------------------


@pytest.mark.parametrize("kernel", ["reference", "direct", "blocked", "tiled"])
def test_every_kernel_is_accurate(monkeypatch, kernel):
    use(monkeypatch, kernel)
    cases = [c for c in test_ops.covering_cases() if c[0] * c[1] * c[2] < 200_000]
    test_ops.check_products(cases)
    test_ops.check_lora(cases[::3])


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 16, 17, 32, 64, 100, 128])
@pytest.mark.parametrize("M", [1, 20, 150, 200])
def test_ranks(M, rank):
    N, K = 96, 160
    dtype = FLOATING[(rank + M) % 3]
    weight = random_weight(N, K, 32, 4, 1)
    adapter = random_adapter(N, K, rank, 0.7, dtype if rank % 2 else torch.float32)
    check_everything(M, weight, adapter, dtype, torch.randn(N).to(dtype))


@pytest.mark.parametrize("kernel", ["direct", "blocked", "tiled"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_dropout(monkeypatch, dtype, kernel):
    """The mask is the CPU's for the same seed."""
    use(monkeypatch, kernel)
    N, K, p = 128, 192, 0.4
    for M, value in ((1, 3), (12, -1), (70, 2**40)):
        seed = torch.tensor([value])
        plain = random_adapter(N, K, 8)
        mask = oracle.dropout_mask(M, K, p, seed)
        adapter = Adapter(plain.A, plain.B, plain.scaling, mask)
        weight = random_weight(N, K, 64, 4, 1, dtype)
        check_everything(M, weight, adapter, dtype, None, seed, p)


@pytest.mark.parametrize("M", [3, 16, 90, 200])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_rows_of_a_larger_matrix(dtype, M):
    """Sliced inputs, at addresses and strides of any alignment, give the same bits."""
    N, K = 128, 192
    weight, adapter = random_weight(N, K, 64, 4, 1, dtype), random_adapter(N, K, 4)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    expected = lora_linear(x, weight, adapter)
    gradients = lora_backward(dy, x, expected[1], weight, adapter)
    for pad, at in ((8, 0), (8, 8), (3, 1), (2, 2)):
        wide = [
            torch.full((M, width + pad + at), float("nan"), dtype=dtype) for width in (K, N)
        ]
        for place, values in zip(wide, (x, dy), strict=True):
            place[:, at : at + values.shape[1]] = values
        x_view, dy_view = wide[0][:, at : at + K], wide[1][:, at : at + N]
        found = lora_linear(x_view, weight, adapter)
        for left, right in zip(found, expected, strict=True):
            assert torch.equal(left, right)
        found = lora_backward(dy_view, x_view, expected[1], weight, adapter)
        for left, right in zip(found, gradients, strict=True):
            assert torch.equal(left, right)


# ---- the quantizer -----------------------------------------------------------------------


@pytest.mark.parametrize("solver", list(Solver), ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", test_ops.BITS)
def test_quantized_to_the_bytes_of_the_cpu(ops, nbits, axis, solver):
    shapes = ((64, 96, 32), (33, 70, 35), (40, 50, 10), (16, 256, 64))
    for (N, K, G), dtype, meta in zip(
        shapes, (*FLOATING, torch.float32), (*FLOATING[::-1], torch.float32), strict=True
    ):
        W = (torch.randn(N, K) * 0.05).to(dtype)
        ours = ops.quantize(W, nbits, G, axis, meta, int(solver))
        theirs = cpu.quantize(W, nbits, G, axis, meta, int(solver))
        for name, found, right in zip(("W_q", "scale", "zero"), ours, theirs, strict=True):
            assert torch.equal(found, right), name


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", test_ops.BITS)
def test_quantized_by_importance_to_the_bytes_of_the_cpu(ops, nbits, axis):
    for N, K, G in ((64, 96, 32), (33, 70, 35), (40, 50, 125), (3, 1700, 1700)):
        W, importance = torch.randn(N, K) * 0.05, torch.rand(K) ** 8
        options = {"importance": importance}
        ours = ops.quantize(W, nbits, G, axis, torch.float32, **options)
        theirs = cpu.quantize(W, nbits, G, axis, torch.float32, **options)
        for name, found, right in zip(("W_q", "scale", "zero"), ours, theirs, strict=True):
            assert torch.equal(found, right), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_group_of_unsound_importance_is_nan(ops, value):
    W, importance = torch.randn(4, 64), torch.rand(64)
    sound = ops.quantize(W, 4, 8, 1, torch.float32, importance=importance)
    importance[21] = value
    found = ops.quantize(W, 4, 8, 1, torch.float32, importance=importance)
    bad = torch.arange(4 * 8) % 8 == 21 // 8
    for before, after in zip(sound[1:], found[1:], strict=True):
        assert after[bad].isnan().all()
        assert torch.equal(after[~bad], before[~bad])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("solver", list(Solver), ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_group_that_is_not_finite_is_nan(ops, axis, solver, value):
    """Nobody waits for the device to say so; no other group is touched by it."""
    W = torch.randn(24, 64)
    # hqq's solver stops early by the mean error of all groups together
    options = {"early_stop": False} if solver == Solver.REFERENCE else {}
    before = ops.quantize(W, 4, 8, axis, torch.float32, int(solver), **options)
    W[17, 23] = value
    after = ops.quantize(W, 4, 8, axis, torch.float32, int(solver), **options)
    element = 17 * 64 + 23
    group = element // 8 if axis == 1 else element % (24 * 64 // 8)
    others = torch.arange(24 * 64 // 8) != group
    for found, clean in zip(after[1:], before[1:], strict=True):
        assert found.reshape(-1)[group].isnan()
        assert torch.equal(found.reshape(-1)[others], clean.reshape(-1)[others])


# ---- schedules ---------------------------------------------------------------------------

SCHEDULES = [
    ("LIFO", "LATE", 1),
    ("RANDOM", "MIXED", 1),
    ("RANDOM", "EARLY", 2),
    ("PRIORITY", "MIXED", 3),
    ("PRIORITY", "LATE", 4),
]


def some_of_everything():
    """The bits of one run through each family of kernels."""
    torch.manual_seed(11)
    results = []
    for M, nbits, axis, dtype in (
        (3, 4, 1, torch.bfloat16),
        (20, 8, 0, torch.float16),
        (70, 3, 1, torch.bfloat16),
        (5, 2, 1, torch.float32),
        (40, 1, 0, torch.bfloat16),
        (200, 4, 1, torch.float16),
    ):
        N, K = 128, 192
        weight, adapter = random_weight(N, K, 64, nbits, axis, dtype), random_adapter(N, K, 8)
        x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
        seed = torch.tensor([5])
        y, xa = lora_linear(x, weight, adapter, torch.randn(N), seed, 0.1)
        results += [y, xa, *lora_backward(dy, x, xa, weight, adapter, seed, 0.1)]
        results += test_ops.ops.quantize(
            weight.W.to(dtype), nbits, 64, axis, torch.float16, 2 if M > 20 else 0
        )
    return results


@pytest.mark.parametrize(("order", "cp_async", "seed"), SCHEDULES)
def test_no_order_of_threads_matters(order, cp_async, seed):
    expected = some_of_everything()
    set_schedule(order, cp_async, seed)
    for found, right in zip(some_of_everything(), expected, strict=True):
        assert torch.equal(found, right)
