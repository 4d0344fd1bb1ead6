"""Several Python threads, several torch threads, and the GIL."""

import threading
import time

import pytest
import torch
from oracle import FLOATING, random_adapter, random_weight

ops = torch.ops.hqqlora
N, K, R = 192, 576, 8


def everything(weight, adapter, x, dy):
    """The results of all products with one weight; first those that large products get from
    torch's GEMM."""
    packed, A, B = weight.packed, adapter.A, adapter.B
    seed = torch.tensor([3])
    numbers = (seed, 0.5, 0.2, *packed[3:])
    y, xa = ops.lora_linear(x, *packed[:3], None, A, B, *numbers)
    dx, dA, dB = ops.lora_linear_backward(
        dy, x, xa, *packed[:3], A, B, *numbers, True, True, True
    )
    return [
        ops.linear(x, *packed[:3], None, *packed[3:]),
        ops.linear_dgrad(dy, *packed),
        y,
        dx,
        xa,
        dA,
        dB,
        ops.dequantize(*packed, torch.float32),
    ]


def case(M, axis, dtype):
    weight, adapter = random_weight(N, K, 64, 4, axis), random_adapter(N, K, R)
    return weight, adapter, torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)


def assert_same(found, expected):
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("M", [1, 6, 40, 200])
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("axis", [0, 1])
def test_results_repeat_and_do_not_depend_on_torchs_threads(M, dtype, axis):
    """But for torch's GEMM, which may add in another order where it has more threads, as it
    does for a dense layer."""
    arguments = case(M, axis, dtype)
    ours = slice(0 if M <= 6 else 4, None)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything(*arguments)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            first = everything(*arguments)
            assert_same(first[ours], expected[ours])
            for _ in range(3):
                assert_same(everything(*arguments), first)
    finally:
        torch.set_num_threads(threads)


def test_quantizing_does_not_depend_on_torchs_threads():
    W = torch.randn(256, 512)
    threads = torch.get_num_threads()
    try:
        for solver in (0, 1):
            torch.set_num_threads(1)
            expected = ops.quantize(W, 4, 64, 1, torch.float32, solver=solver)
            torch.set_num_threads(2)
            assert_same(ops.quantize(W, 4, 64, 1, torch.float32, solver=solver), expected)
    finally:
        torch.set_num_threads(threads)


def in_threads(functions):
    """Runs the functions at once, each in a thread of its own; raises what they raise."""
    failures = []
    barrier = threading.Barrier(len(functions))

    def guarded(function):
        barrier.wait()
        try:
            function()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_python_threads_do_not_disturb_each_other():
    cases = [
        case(M, axis, dtype)
        for M, axis, dtype in (
            (1, 0, torch.float32),
            (40, 1, torch.bfloat16),
            (200, 1, torch.float32),
            (6, 1, torch.float16),
        )
    ]
    expected = [everything(*arguments) for arguments in cases]

    def worker(arguments, right):
        def run():
            for _ in range(10):
                assert_same(everything(*arguments), right)

        return run

    in_threads([worker(*pair) for pair in zip(cases, expected, strict=True)])


def test_errors_are_those_of_the_calling_thread():
    weight = random_weight(24, 64, 32).packed

    def worker(width):
        def run():
            for _ in range(50):
                with pytest.raises(RuntimeError, match=rf"got shape \[3, {width}\]$"):
                    ops.linear(torch.randn(3, width), *weight[:3], None, *weight[3:])

        return run

    in_threads([worker(width) for width in (63, 65, 66, 67)])


def test_python_runs_while_an_op_works():
    """The GIL is free during a call: a counting thread goes on counting."""
    W = torch.randn(2048, 2048)
    ticks, done = [], threading.Event()

    def count():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        start = time.perf_counter()
        ops.quantize(W, 4, 64, 1, torch.float32, solver=1, early_stop=False, iters=40)
        end = time.perf_counter()
    finally:
        done.set()
        counter.join()
    during = [t for t in ticks if start < t < end]
    assert end - start > 5e-3  # long enough to tell
    assert len(during) > 10, f"{len(during)} ticks in {end - start:.3f} s"
    gaps = [b - a for a, b in zip([start, *during], [*during, end], strict=True)]
    assert max(gaps) < (end - start) / 2
