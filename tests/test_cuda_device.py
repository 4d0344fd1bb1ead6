"""On a GPU: the very tests of the CPU ops, and what only a GPU can get wrong: streams, several
devices, capture into graphs, waiting. Skipped where there is none."""

import copy

import oracle
import pytest
import torch
from oracle import random_adapter, random_weight
from test_ops import (  # noqa: F401 (collected here once more, with the GPU as default device)
    linear,
    lora_backward,
    lora_linear,
    test_broadcast_rows_and_single_rows,
    test_dequantize,
    test_empty_sizes,
    test_inference_mode,
    test_linear_and_dgrad_against_float64,
    test_lora_against_float64,
    test_only_the_gradients_that_are_asked_for,
    test_quantize_gives_a_weight_close_to_the_original,
    test_real_shapes,
    test_strided_adapter_gives_the_same_bits,
)

import hqqlora
import hqqlora.autograd
from hqqlora.ops import PackedWeight, Solver

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ops = torch.ops.hqqlora
N, K, R = 96, 256, 8


@pytest.fixture(autouse=True)
def _on_the_gpu():
    with torch.device(DEVICE):
        yield


def moved(weight, device):
    return PackedWeight(*(t.to(device) for t in weight.packed[:3]), *weight.packed[3:])


def seed(value=5):
    return torch.tensor([value])


# ---- the same as on the CPU --------------------------------------------------------------


@pytest.mark.parametrize("solver", list(Solver), ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_quantized_to_the_same_codes(nbits, axis, solver):
    W = torch.randn(N, K)
    ours = ops.quantize(W, nbits, 64, axis, torch.float16, int(solver))
    theirs = ops.quantize(W.cpu(), nbits, 64, axis, torch.float16, int(solver))
    for found, right in zip(ours, theirs, strict=True):
        assert found.device.type == DEVICE
        assert torch.equal(found.cpu(), right)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("solver", list(Solver), ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_that_is_not_finite(axis, solver, value):
    W = torch.randn(N, K)
    W[17, 9] = value
    expected = f"hqqlora: W[17, 9] is {value}; only finite weights can be quantized"
    with pytest.raises(RuntimeError) as refused:
        ops.quantize(W, 4, 64, axis, torch.float16, int(solver))
    assert str(refused.value) == expected
    dense = torch.nn.Linear(K, N)
    dense.weight.data = W
    with pytest.raises(
        ValueError, match=rf"weight\[17, 9\] is {value}; a weight must be finite"
    ):
        hqqlora.HQQLinear(dense, hqqlora.BaseQuantizeConfig(nbits=4, group_size=64))


def test_the_dropout_mask_is_that_of_the_cpu():
    mask = oracle.dropout_mask(70, 256, 0.3, seed(-7))
    with torch.device("cpu"):
        expected = oracle.dropout_mask(70, 256, 0.3, seed(-7))
    assert torch.equal(mask.cpu(), expected)


@pytest.mark.parametrize("dtype", oracle.FLOATING, ids=str)
@pytest.mark.parametrize("M", [1, 7, 300])
def test_dropout_forward_and_backward(dtype, M):
    p, s = 0.3, seed()
    weight, plain = random_weight(N, K, 64), random_adapter(N, K, R)
    mask = oracle.dropout_mask(M, K, p, s)
    adapter = oracle.Adapter(plain.A, plain.B, plain.scaling, mask)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    y, xa = lora_linear(x, weight, plain, seed=s, p=p)
    adapter.check_forward(x, y, xa, weight)
    adapter.check_backward(dy, x, lora_backward(dy, x, xa, weight, plain, s, p), weight)


# ---- devices -----------------------------------------------------------------------------


def test_tensors_on_two_devices_are_named():
    weight, x = random_weight(N, K, 64), torch.randn(3, K)
    place = weight.packed.W_q.device
    for W, of, found in ((moved(weight, "cpu"), x, "cpu"), (weight.packed, x.cpu(), place)):
        with pytest.raises(RuntimeError) as refused:
            ops.linear(of, *W[:3], None, *W[3:])
        wanted = f"hqqlora: W_q must be on {of.device}, got a tensor on {found}"
        assert str(refused.value) == wanted
    adapter = random_adapter(N, K, R)
    with pytest.raises(RuntimeError, match=r"seed must be on cuda:0, got a tensor on cpu"):
        lora_linear(x, weight, adapter, seed=seed().cpu(), p=0.1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    with torch.device("cuda:1"):
        weight, adapter = random_weight(N, K, 64), random_adapter(N, K, R)
        for M in (3, 300):
            x, dy = torch.randn(M, K), torch.randn(M, N)
            y, xa = lora_linear(x, weight, adapter)
            assert y.device == torch.device("cuda:1")
            adapter.check_forward(x, y, xa, weight)
            gradients = lora_backward(dy, x, xa, weight, adapter)
            adapter.check_backward(dy, x, gradients, weight)
    assert torch.cuda.current_device() == 0


# ---- streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("M", [3, 300])
def test_work_is_ordered_in_the_current_stream(M):
    """x is made late, on a stream of its own; only that stream is waited for."""
    weight, expected = random_weight(N, K, 64), torch.randn(M, K)
    x = torch.zeros(M, K)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(expected)
        y = linear(x, weight)
        x.zero_()
    stream.synchronize()
    oracle.check_linear(expected, y, weight)


def test_nothing_waits():
    """What torch itself does; the library's own calls are not seen by this."""
    weight, adapter = random_weight(N, K, 64), random_adapter(N, K, R)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for M in (3, 300):
            x, dy = torch.randn(K, M).T, torch.randn(M, N)
            _, xa = lora_linear(x, weight, adapter, seed=seed(), p=0.1)
            lora_backward(dy, x, xa, weight, adapter, seed(), 0.1)
            ops.dequantize(*weight.packed, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("M", [3, 300])
def test_captured_into_a_graph(M):
    weight, adapter = random_weight(N, K, 64), random_adapter(N, K, R)
    x, dy = torch.randn(M, K), torch.randn(M, N)

    def step():
        y, xa = lora_linear(x, weight, adapter)
        return y, xa, *lora_backward(dy, x, xa, weight, adapter)

    step()  # what is made once is made now
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    x.copy_(torch.randn(M, K))
    graph.replay()
    for found, right in zip(results, step(), strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("M", [3, 300])
def test_a_graph_reads_the_seed_at_each_replay(M):
    weight, adapter, p = random_weight(N, K, 64), random_adapter(N, K, R), 0.5
    x, dy, s = torch.randn(M, K), torch.randn(M, N), seed(1)

    def step():
        y, xa = lora_linear(x, weight, adapter, seed=s, p=p)
        return y, xa, *lora_backward(dy, x, xa, weight, adapter, s, p)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    masked = []
    for value in (1, 2):
        s.fill_(value)
        graph.replay()
        masked.append(results[1].clone())
        for found, right in zip(results, step(), strict=True):
            assert torch.equal(found, right)
    assert not torch.equal(*masked)


def test_each_replay_of_a_captured_layer_draws_another_mask():
    """And forward and backward of one replay have the same: <dy, y> = <dx, x> where all is
    linear."""
    layer = lora_layer(lora_dropout=0.5).to(DEVICE)
    layer.base_layer.bias = None
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)

    def step():
        y = layer(x)
        return y, torch.autograd.grad(y, x, dy)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    found = []
    for _ in range(3):
        graph.replay()
        found.append(y.detach().clone())
        left, right = (dy * y).sum(), (dx * x).sum()
        assert (left - right).abs() <= 1e-4 * (dy * y).abs().sum()
    assert len({tuple(y.flatten().tolist()) for y in found}) == 3
    torch.manual_seed(3)
    graph.replay()
    again = y.detach().clone()
    torch.manual_seed(3)
    graph.replay()
    assert torch.equal(y, again)


def test_dropout_with_reduce_overhead():
    layer = lora_layer(lora_dropout=0.5).to(DEVICE)
    layer.base_layer.bias = None
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    found = []
    for _ in range(5):  # warm up, record, replay
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        left, right = (dy * y).sum(), (dx * x).sum()
        assert (left - right).abs() <= 1e-4 * (dy * y).abs().sum()
        found.append(tuple(y.flatten().tolist()))
    assert len(set(found)) == 5
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped


# ---- layers ------------------------------------------------------------------------------


def lora_layer(**options):
    config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=64)
    with torch.device("cpu"):
        base = hqqlora.HQQLinear(torch.nn.Linear(K, N), config, compute_dtype=torch.float32)
        return hqqlora.LoRALinear(base, R, init_lora_weights=False, **options)


def test_a_layer_moves_there_and_back():
    layer = lora_layer()
    before = copy.deepcopy(layer.state_dict())
    layer.to(DEVICE)
    assert {p.device.type for p in layer.parameters()} == {DEVICE}
    x = torch.randn(5, K)
    assert layer(x).device == x.device
    layer.merge()
    layer.unmerge()
    layer.to("cpu")
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_training_is_that_of_the_cpu(compiled):
    here = lora_layer()
    there = copy.deepcopy(here).to(DEVICE)
    x = torch.randn(2, 150, K)
    results = []
    for layer in (here, there):
        forward = torch.compile(layer, backend="aot_eager") if compiled else layer
        own = x.to(layer.lora_A.device).requires_grad_()
        loss = forward(own).square().mean()
        loss.backward()
        results.append([loss.detach(), own.grad, layer.lora_A.grad, layer.lora_B.grad])
    for right, found in zip(*results, strict=True):
        assert found.device.type == DEVICE
        torch.testing.assert_close(found.cpu(), right.cpu(), rtol=1e-3, atol=1e-5)


def test_autocast():
    layer = lora_layer().to(DEVICE)
    x = torch.randn(7, K, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert (x.grad.dtype, layer.lora_A.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
