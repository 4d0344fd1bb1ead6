"""Experts of a mixture on this CPU: the grouped operation against a loop over the experts with
the operation of one weight, and against transformers' dense experts in the same dtype.

    python benchmarks/experts.py

Forward + backward of one experts module, top-2 of 8, the gradient to the tokens alone. The
contenders take turns; ratios are of medians of rounds, above 1: the grouped one is faster.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import hqqlora
from hqqlora.autograd import linear
from hqqlora.ops import PackedWeight


class Loop(nn.Module):
    """An `HQQExpertWeights` whose product goes expert by expert."""

    def __init__(self, weights: hqqlora.HQQExpertWeights) -> None:
        """Shares the weights."""
        super().__init__()
        self.experts = [weights.expert(e) for e in range(weights.num_experts)]
        self.weight = weights.weight

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """As `HQQExpertWeights`."""
        ends = offsets.tolist()
        parts: list[Tensor] = []
        for expert, begin, end in zip(self.experts, ends, ends[1:], strict=False):
            if end > begin:
                parts.append(linear(x[begin:end], PackedWeight(*expert)))
        return torch.cat(parts)


def dense_experts(experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> Any:
    """transformers' MixtralExperts, random."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = SimpleNamespace(
        num_local_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        hidden_act="silu",
        _experts_implementation="grouped_mm",
    )
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module.to(dtype).requires_grad_(False)


def contenders(dtype: torch.dtype, options: argparse.Namespace) -> dict[str, nn.Module]:
    """The same experts in each way."""
    dense = dense_experts(options.experts, options.hidden, options.intermediate, dtype)
    model = nn.ModuleDict({"experts": copy.deepcopy(dense)})
    config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=64)
    hqqlora.quantize_model(model, config, progress=False)
    grouped = model["experts"]
    loop = copy.deepcopy(grouped)
    for key in ("gate_up_proj", "down_proj"):
        loop.put(key, Loop(getattr(loop, key)))
    eager = copy.deepcopy(dense)
    eager.config._experts_implementation = "eager"
    return {"grouped": grouped, "loop": loop, "dense grouped_mm": dense, "dense eager": eager}


def step(module: nn.Module, x: Tensor, index: Tensor, share: Tensor) -> float:
    """Seconds of one forward and backward."""
    x.grad = None
    begin = time.perf_counter()
    module(x, index, share).sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {vars(options)}")
    for dtype in (torch.bfloat16, torch.float32):
        modules = contenders(dtype, options)
        for tokens in options.tokens:
            torch.manual_seed(0)
            x = torch.randn(tokens, options.hidden, dtype=dtype, requires_grad=True)
            share, index = torch.rand(tokens, options.experts).topk(2)
            times: dict[str, list[float]] = {name: [] for name in modules}
            for _ in range(options.rounds):
                for name, module in modules.items():
                    times[name].append(step(module, x, index, share.to(dtype)))
            medians = {name: statistics.median(of[2:]) for name, of in times.items()}
            ours = medians["grouped"]
            ratios = ", ".join(
                f"{name} {median / ours:.2f}" for name, median in medians.items()
            )
            print(f"{str(dtype)[6:]:9} {tokens:5} tokens  {ours * 1e3:8.2f} ms   {ratios}")


if __name__ == "__main__":
    main()
