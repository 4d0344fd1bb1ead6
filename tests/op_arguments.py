"""The ops that are called for each layer, and arguments to call them with by name."""

import torch
from oracle import random_adapter, random_weight

import hqqlora.ops  # noqa: F401 (loads them)

ops = torch.ops.hqqlora

ALL = [
    ops.quantize,
    ops.dequantize,
    ops.linear,
    ops.linear_dgrad,
    ops.lora_linear,
    ops.lora_linear_backward,
    ops.lora_project,
    ops.lora_linear_from_xa,
    ops.lora_factor_gradients,
    ops.lora_input_gradients,
]


def forward_arguments(nbits=4, axis=1, dtype=torch.float32, dropout=0.0, M=5):
    """Arguments of lora_linear by name; those of the other ops are among them."""
    N, K, R = 24, 40, 3
    weight, adapter = random_weight(N, K, 8, nbits, axis), random_adapter(N, K, R)
    return {
        "x": torch.randn(2, M, K).to(dtype),
        "dy": torch.randn(2, M, N).to(dtype),
        **weight.packed._asdict(),
        "bias": torch.randn(N),
        "A": adapter.A,
        "B": adapter.B,
        "seed": torch.tensor([5]) if dropout else None,
        "scaling": 0.5,
        "dropout": dropout,
        "xa": torch.randn(2 * M, R),
        "dyb": torch.randn(2 * M, R),
        "needs_dyb": True,
        "needs_dx": True,
        "needs_dA": True,
        "needs_dB": True,
        "dtype": torch.bfloat16,
        "weight": torch.randn(N, K),
        "meta_dtype": torch.float16,
        "planes": False,
    }


def names_of(op):
    return [argument.name for argument in op.default._schema.arguments]


def call(op, arguments):
    """Calls op with those of the arguments that it has."""
    names = names_of(op)
    return op(**{name: value for name, value in arguments.items() if name in names})
