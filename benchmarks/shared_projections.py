"""`hqqlora.share_projections`: a step with it against one without, adapters on 4 bits.

    qkv        q, k and v on one x, forward and backward, of given N and K
    gate_up    gate and up
    llama      a whole training step of a random Llama with hqqlora's own adapters

The two take turns, each on weights of its own; the ratio is separate / shared in the same
round, above 1: sharing is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import report
import torch
from timing import Times, take_turns
from torch import nn

import hqqlora

# N of the layers, and K: of SmolLM2-135M, and of Llama 3 8B.
LAYERS = {
    "qkv 576": ((576, 192, 192), 576),
    "gate_up 576": ((1536, 1536), 576),
    "qkv 4096": ((4096, 1024, 1024), 4096),
    "gate_up 4096": ((14336, 14336), 4096),
}
NAMES = ("q_proj", "k_proj", "v_proj")
ROWS = (16, 512, 2048)
DTYPE = torch.bfloat16


class Siblings(nn.Module):
    """Layers with adapters that take one x."""

    def __init__(self, widths: tuple[int, ...], K: int, rank: int) -> None:
        super().__init__()
        config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=64, optimize=False)
        for name, N in zip(NAMES, widths, strict=False):
            dense = nn.Linear(K, N, bias=False, dtype=DTYPE)
            base = hqqlora.HQQLinear(dense, config, compute_dtype=DTYPE)
            layer = hqqlora.LoRALinear(base, rank, init_lora_weights=False)
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.children()]


def compare(model: nn.Module, step: Callable[[nn.Module], None], seconds: float) -> Times:
    """Times of `step` on the model, and on a copy that shares."""
    shared = hqqlora.share_projections(copy.deepcopy(model))
    return take_turns(
        {"separate": lambda _: step(model), "shared": lambda _: step(shared)}, seconds
    )


def step_of_siblings(M: int, K: int, widths: tuple[int, ...]) -> Callable[[nn.Module], None]:
    x = torch.randn(M, K).to(DTYPE).requires_grad_()
    dys = [torch.randn(M, N).to(DTYPE) for N in widths]

    def step(model: nn.Module) -> None:
        torch.autograd.backward(model(x), dys)
        x.grad = None
        model.zero_grad(set_to_none=True)

    return step


def random_llama(blocks: int, rank: int) -> nn.Module:
    """Of SmolLM2-135M's widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model: Any = LlamaForCausalLM(config).to(DTYPE)
    quant = hqqlora.BaseQuantizeConfig(nbits=4, group_size=64, optimize=False)
    hqqlora.quantize_model(model, quant, progress=False)
    return hqqlora.add_lora(model, r=rank, lora_alpha=2 * rank).train()


def llama_step(ids: torch.Tensor) -> Callable[[nn.Module], None]:
    def step(model: nn.Module) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def measure(layers=tuple(LAYERS), rows=ROWS, rank=16, seconds=1.0, blocks=4):
    """All figures; prints one table."""
    lines, results = [], []

    def add(name: str, M: int, times: Times) -> None:
        ratio = times.ratio("separate", "shared")
        both = [report.milliseconds(times.median(who)) for who in ("separate", "shared")]
        lines.append([name, str(M), *both, f"{ratio:.3f}"])
        results.append(
            {"name": name, "M": M, "rank": rank, "seconds": times.summary(), "ratio": ratio}
        )

    for name in layers:
        widths, K = LAYERS[name]
        model = Siblings(widths, K, rank)
        for M in rows:
            add(name, M, compare(model, step_of_siblings(M, K, widths), seconds))
    if blocks:
        ids = torch.randint(0, 1024, (4, 256))
        times = compare(random_llama(blocks, rank), llama_step(ids), 3 * seconds)
        add(f"llama, {blocks} blocks", ids.numel(), times)
    print(f"\n### share_projections: rank {rank} (fp32) on 4 bits, forward + backward, bf16\n")
    report.table(lines, ["layers", "M", "separate ms", "shared ms", "separate / shared"])
    return results


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--layers", nargs="+", default=tuple(LAYERS), choices=tuple(LAYERS))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4, help="of the Llama; 0: none")
    a = parser.parse_args()
    description = report.start(a)
    results = measure(a.layers, a.rows, a.rank, a.seconds or 1.0, a.blocks)
    report.finish(a.json, description, {"shared_projections": results})


if __name__ == "__main__":
    main()
