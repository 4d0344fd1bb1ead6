"""A quantized Llama with adapters under torch.compile: one graph, one code for all lengths."""

import pytest
import torch
from compiled_models import (
    ADAPTERS,
    Block,
    Graphs,
    adapted_llama,
    assert_same,
    gradients,
    graph_breaks,
    name_of,
    ours_in,
)
from peft_models import token_ids
from torch._dynamo.utils import counters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_llama_is_one_graph_for_all_lengths(kind):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = adapted_llama(kind, dropout=0.0 if kind == "dora" else 0.1)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)

    def logits(forward, ids):
        return forward(input_ids=ids, use_cache=False).logits

    # own: from a fixed length to any, as torch does by itself; the others: any at once
    lengths = (12, 9, 17, 33) if kind == "own" else (12, 33)
    for length in lengths:
        ids = token_ids(length=length)
        expected = gradients(model, lambda ids=ids: logits(model, ids))
        if kind != "own":
            torch._dynamo.mark_dynamic(ids, 1, min=2, max=64)
        assert_same(gradients(model, lambda ids=ids: logits(compiled, ids)), expected)
    assert graphs.frames == (2 if kind == "own" else 1)
    assert graph_breaks() == {}
    for forward, backward in zip(graphs.forward, graphs.backward, strict=True):
        assert ours_in(forward)["hqqlora::lora_linear"] == 7
        assert ours_in(backward) == {"hqqlora::lora_linear_backward": 7}
        assert "hqqlora::dequantize" not in ours_in(forward)


def test_blocks_of_one_shape_share_one_compilation():
    blocks = [Block() for _ in range(3)]
    graphs = Graphs()
    for block in blocks:
        block.compile(backend=graphs, fullgraph=True)
    x = torch.randn(2, 5, 64, requires_grad=True)
    for block in blocks:
        x = block(x)
    assert graphs.frames == 1


def test_what_stands_around_a_product_is_the_compilers_to_fuse():
    block = Block(dtype=torch.bfloat16)
    graphs = Graphs()
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    torch.compile(block, backend=graphs, fullgraph=True)(x)
    (forward,) = graphs.forward
    products = [n for n in forward.graph.nodes if name_of(n) == "hqqlora::lora_linear"]
    assert len(products) == 2
    names = [name_of(n) for n in forward.graph.nodes if n.op == "call_function"]
    assert "aten::silu" in names
    assert "aten::add.Tensor" in names
    assert not {"aten::clone", "aten::contiguous", "aten::copy_"} & set(names)
    for product in products:  # A, B and bias as they lie
        W_q, scale, zero, bias, A, B = product.args[1:7]
        assert {n.op for n in (W_q, scale, zero, bias, A, B)} == {"placeholder"}


def test_mode_reduce_overhead_runs_where_there_is_no_gpu():
    block = Block()
    x = torch.randn(2, 5, 64)
    expected = gradients(block, lambda: block(x))
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        assert_same(gradients(block, lambda: compiled(x)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["linear", "linear_dgrad", "lora_linear", "lora_linear_backward"]
)
def test_products_carry_no_tag_that_keeps_them_out_of_a_captured_graph(name):
    tags = getattr(torch.ops.hqqlora, name).default.tags
    barred = {
        torch.Tag.cudagraph_unsafe,
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
    }
    assert not barred & set(tags)
