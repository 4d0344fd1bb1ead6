"""Little models of quantized layers with adapters, and what torch.compile makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft_models import fill_adapters, tiny_quantized
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

import hqqlora

ADAPTERS = ("own", "peft", "dora")
WIDTH = 64


def adapted_llama(kind: str, layers: int = 1, dropout: float = 0.0) -> Any:
    """A Llama in 4 bits whose linear layers have adapters, hqqlora's own or PEFT's, in training
    mode."""
    model: Any = tiny_quantized(num_hidden_layers=layers)
    if kind == "own":
        hqqlora.add_lora(model, r=4, lora_alpha=8, lora_dropout=dropout)
    else:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=dropout,
            use_dora=kind == "dora",
            target_modules="all-linear",
        )
        model = get_peft_model(model, config)
    return fill_adapters(model).train()


class Block(nn.Module):
    """``x + down(silu(up(norm(x))))`` with adapters on `up` and `down`."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, dtype=dtype)
        self.up = adapted_layer(WIDTH, 2 * WIDTH, dropout, dtype)
        self.down = adapted_layer(2 * WIDTH, WIDTH, dropout, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def adapted_layer(
    K: int, N: int, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> hqqlora.LoRALinear:
    config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=32)
    base = hqqlora.HQQLinear(nn.Linear(K, N, dtype=dtype), config, compute_dtype=dtype)
    layer = hqqlora.LoRALinear(base, r=4, lora_alpha=8, lora_dropout=dropout)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def gradients(model: nn.Module, call: Callable[[], Tensor], seed: int = 7) -> dict[str, Tensor]:
    """What `call` returns and, after its square's backward, the gradients of all parameters of
    `model` that have any."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    y = call()
    y.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return {"": y.detach(), **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **bound: float) -> None:
    """All of them, by name; not a zero among the expected ones."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert right.isfinite().all(), name
        assert right.count_nonzero() > 0, name
        torch.testing.assert_close(
            found[name], right, msg=lambda m, name=name: f"{name}: {m}", **bound
        )


class Graphs:
    """A backend that runs what it is given as it is, divided into forward and backward as
    inductor divides it, and keeps it."""

    def __init__(self) -> None:
        self.forward: list[GraphModule] = []
        self.backward: list[GraphModule] = []
        self.inference: list[GraphModule] = []
        self.frames = 0

    def __call__(self, graph: GraphModule, inputs: Any) -> Any:
        self.frames += 1
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition

        def keep(where: list[GraphModule]) -> Any:
            def compiler(part: GraphModule, _: Any) -> Any:
                where.append(part)
                return make_boxed_func(part.forward)

            return compiler

        backend = aot_autograd(
            fw_compiler=keep(self.forward),
            bw_compiler=keep(self.backward),
            inference_compiler=keep(self.inference),
            partition_fn=min_cut_rematerialization_partition,
        )
        return backend(graph, inputs)


def ops_of(graph: GraphModule) -> Counter[str]:
    """How often each operator is called: "aten::add.Tensor", "hqqlora::lora_linear"."""
    return Counter(name_of(node) for node in graph.graph.nodes if node.op == "call_function")


def name_of(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.name()
    return str(getattr(target, "__name__", target))


def ours_in(graph: GraphModule) -> dict[str, int]:
    """The calls of hqqlora's operators."""
    return {n: c for n, c in ops_of(graph).items() if n.startswith("hqqlora::")}


def graph_breaks() -> dict[str, int]:
    """Since the counters were cleared."""
    return dict(counters["graph_break"])
