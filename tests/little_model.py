"""A little language model of plain torch modules, quantized in place."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import quantized_names
from torch import Tensor, nn

from hqqlora import BaseQuantizeConfig, quantize_model

FOUR_BITS = BaseQuantizeConfig(nbits=4, group_size=32)
TWO_BITS = BaseQuantizeConfig(nbits=2, group_size=16)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        return self.norm(x + self.down_proj(torch.relu(self.up_proj(x))))


class Model(nn.Module):
    """A little language model; with `tied`, its output layer is its embedding."""

    def __init__(self, layers: int = 2, width: int = 32, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.lm_head = nn.Linear(width, 16, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TOKENS = torch.arange(8).reshape(2, 4)


def bits(model: nn.Module) -> dict[str, int]:
    return {name: model.get_submodule(name).nbits for name in quantized_names(model)}  # type: ignore[misc]


def quiet(model: nn.Module, config: dict[str, Any], **options: Any) -> nn.Module:
    return quantize_model(model, config, progress=False, **options)
