"""Tiny mixtures of experts, quantized, and their dequantized twins."""

from __future__ import annotations

import copy
from typing import Any

import tiny_models
import torch
from torch import Tensor, nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQExperts

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
EXPERTS = "model.layers.0.mlp.experts"


def dense(family: str, **config: Any) -> Any:
    return getattr(tiny_models, f"tiny_{family}")(**config)


def quantized(family: str, nbits: int = 4, axis: int = 1, **config: Any) -> Any:
    settings = BaseQuantizeConfig(nbits=nbits, group_size=32, axis=axis)
    return hqqlora.quantize_model(dense(family, **config), settings, progress=False)


def dequantized(model: Any) -> Any:
    """A dense copy, of transformers' own classes."""
    same = copy.deepcopy(model)
    return same.hf_quantizer.dequantize(same)


def check_same_outputs(
    model: nn.Module, reference: nn.Module, inputs: dict[str, Tensor]
) -> None:
    """Equal up to what float32 loses in a few layers of tens of terms each."""
    with torch.no_grad():
        found, expected = model(**inputs).logits, reference(**inputs).logits
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def experts_of(model: Any) -> HQQExperts:
    found = model.get_submodule(EXPERTS)
    assert isinstance(found, HQQExperts)
    return found
