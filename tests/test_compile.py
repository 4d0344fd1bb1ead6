"""torch.compile: one graph, the same numbers, static and dynamic shapes."""

import pytest
import torch
from oracle import random_adapter, random_weight
from torch._dynamo.testing import CompileCounterWithBackend

from hqqlora.autograd import linear, lora_linear

N, K, R = 24, 64, 4


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers():
    """A small model of both products, and its parameters."""
    first, second = random_weight(N, K, 32), random_weight(K, N, 24, 4, 0)
    a, b = random_adapter(N, K, R), random_adapter(K, N, R)
    bias = torch.randn(N)
    parameters = [p.requires_grad_() for p in (bias, a.A, a.B, b.A, b.B)]

    def model(x, p):
        bias, A1, B1, A2, B2 = parameters
        hidden = lora_linear(x, first.packed, bias, A1, B1, 0.5, p).relu()
        return lora_linear(hidden, second.packed, None, A2, B2, 0.5, p) + linear(
            hidden, second.packed
        )

    return model, parameters


def run(model, parameters, x, p):
    """y and all gradients."""
    x = x.clone().requires_grad_()
    torch.manual_seed(11)
    y = model(x, p)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *parameters))]


def compare(backend, dynamic, rows, dropouts):
    model, parameters = layers()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for p in dropouts:
        for M in rows:
            x = torch.randn(2, M, K)
            expected = run(model, parameters, x, p)
            for found, right in zip(run(compiled, parameters, x, p), expected, strict=True):
                torch.testing.assert_close(found, right)
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, 0.0), model(x, 0.0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_traced(backend, dynamic):
    compare(backend, dynamic, (5, 9, 1) if dynamic else (5,), (0.0, 0.3))


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    # the seed of the dropout mask from torch's own generator, as without the compiler
    with torch._inductor.config.patch(fallback_random=True):
        compare("inductor", dynamic, (5, 9) if dynamic else (5,), (0.3,))


def test_one_dynamic_graph_serves_all_sizes():
    model, parameters = layers()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    run(compiled, parameters, torch.randn(2, 5, K), 0.3)
    compilations = counter.frame_count
    for M in (9, 33):
        run(compiled, parameters, torch.randn(2, M, K), 0.3)
    assert counter.frame_count == compilations


def test_autocast_inside_a_graph():
    model, parameters = layers()
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, parameters, x, 0.3)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = run(compiled, parameters, x, 0.3)
    assert found[0].dtype == torch.bfloat16
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_a_mistake_is_reported_while_compiling():
    model, _ = layers()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"x must have a last dimension of in_features = 64"):
        compiled(torch.randn(3, K + 1), 0.0)
