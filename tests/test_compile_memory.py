"""torch.compile with recomputation: the same masks and gradients, whatever is kept."""

import pytest
import torch
from compiled_models import (
    Block,
    Graphs,
    adapted_layer,
    assert_same,
    gradients,
    ops_of,
    ours_in,
)
from torch import nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def blocks_and_input(dropout):
    return nn.Sequential(Block(dropout), Block(dropout)), torch.randn(2, 5, 64)


@pytest.mark.parametrize("budget", [0.05, 0.4])
def test_a_memory_budget_recomputes_products_but_draws_no_mask_again(budget):
    model, x = blocks_and_input(0.3)
    expected = gradients(model, lambda: model(x))
    graphs = Graphs()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        assert_same(gradients(model, lambda: compiled(x)), expected)
    (backward,) = graphs.backward
    calls = ours_in(backward)
    assert calls["hqqlora::lora_linear_backward"] == 4
    assert calls["hqqlora::lora_linear"] >= 1
    assert not [name for name in ops_of(backward) if "rand" in name]


def test_inductors_own_random_numbers_give_forward_and_backward_one_mask():
    """Without a bias the layers are linear: <dy, y> = <dx, x>, if both have the same mask."""
    model = nn.Sequential(adapted_layer(64, 64, 0.5), adapted_layer(64, 64, 0.5))
    for layer in model:
        layer.base_layer.bias = None
        nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 64, requires_grad=True)
    with torch._functorch.config.patch(activation_memory_budget=0.2):
        y = torch.compile(model, fullgraph=True)(x)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
    left, right = (dy * y).sum(), (dx * x).sum()
    assert (left - right).abs() <= 1e-5 * (dy * y).abs().sum()


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpointing(where):
    model, x = blocks_and_input(0.3)
    expected = gradients(model, lambda: model(x))
    graphs = Graphs()

    def run(blocks):
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False)
        return y

    if where == "inside":
        step = torch.compile(lambda: run(model), backend=graphs, fullgraph=True)
    else:
        parts = [torch.compile(block, backend=graphs, fullgraph=True) for block in model]

        def step():
            return run(parts)

    assert_same(gradients(model, step), expected)
    recomputed = sum(ours_in(g).get("hqqlora::lora_linear", 0) for g in graphs.backward)
    assert recomputed == (4 if where == "inside" else 0)


def test_compiled_autograd_takes_the_backward_as_one_graph():
    model, x = blocks_and_input(0.3)
    expected = gradients(model, lambda: model(x))
    graphs = Graphs()
    with compiled_autograd._enable(torch.compile(backend=graphs, fullgraph=True)):
        assert_same(gradients(model, lambda: model(x)), expected)
    (backward,) = graphs.inference
    assert ours_in(backward) == {"hqqlora::lora_linear_backward": 4}
