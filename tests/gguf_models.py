"""Little models to write as GGUF, dense, quantized or with an adapter, and files read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf_files import VOCABULARY
from torch import nn

from hqqlora import BaseQuantizeConfig, HQQLinear, lora_parameters, quantize_model
from hqqlora.gguf import load_gguf

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def dense(model_type: str = "llama", **config: Any) -> Any:
    """Random, of two layers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **config})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def quantized(
    model: Any = None, dtype: torch.dtype | None = torch.float32, **config: Any
) -> Any:
    """`model`, or `dense()`; `dtype` is that of scales and zeros, `config` the format."""
    model = dense() if model is None else model
    return quantize_model(model, BaseQuantizeConfig(**config), meta_dtype=dtype, progress=False)


def trained(model: Any) -> Any:
    """With numbers in its adapters: they start at nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.3)
    return model


def load(path: Path, **arguments: Any) -> Any:
    return load_gguf(path, progress=False, **arguments)


def quantized_layers(model: nn.Module) -> dict[str, HQQLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, HQQLinear)}


def assert_near_q8(layer: HQQLinear, again: HQQLinear) -> None:
    """Half a step of each block's 255, and what d loses as an fp16."""
    blocks = layer.dequantize().reshape(-1, 32)
    bound = 1.01 * blocks.abs().amax(dim=1, keepdim=True) * (0.5 / 127 + 2.0**-11)
    assert ((again.dequantize().reshape(-1, 32) - blocks).abs() <= bound).all()
    assert again.nbits == 8
