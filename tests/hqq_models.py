"""Little models that the hqq package has quantized, and what makes two of them equal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hqq.core.quantize as hqq
import torch
import transformers
from hqq.models.hf.base import AutoHQQHFModel as HqqsModel
from torch import nn

from hqqlora import AutoHQQHFModel, HQQLinear

TAGS = [
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
]
BITS_OF_TAGS = dict(zip(TAGS, [8, 4, 3, 2, 1, 4, 3], strict=True))
IDS = torch.arange(12)[None]


def dense_llama(**config: Any) -> Any:
    shape = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "attention_bias": True,
    }
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **config}))


def no_cleanup() -> None:
    """hqq collects garbage some six times a model: most of what the tests would take."""


quickly = mock.patch("hqq.models.base.cleanup", new=no_cleanup)


@quickly
def quantized_by_hqq(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, model: Any = None
) -> Any:
    model = dense_llama() if model is None else model
    return HqqsModel.quantize_model(model, config, compute_dtype=dtype, device="cpu")


def by_hqq(
    folder: Path, dtype: torch.dtype = torch.float32, model: Any = None, **config: Any
) -> Any:
    """A model quantized and saved by hqq."""
    settings = hqq.BaseQuantizeConfig(**{"group_size": 32, **config})
    quantized = quantized_by_hqq(settings, dtype, model)
    HqqsModel.save_quantized(quantized, str(folder))
    return quantized


def by_hqq_in_all_bits(folder: Path, axis: int, view_as_float: bool = False) -> Any:
    """As `by_hqq`, with layers of 8, 4, 3, 2 and 1 bits."""
    config = {
        tag: hqq.BaseQuantizeConfig(
            nbits=nbits, group_size=16, axis=axis, view_as_float=view_as_float
        )
        for tag, nbits in BITS_OF_TAGS.items()
    }
    quantized = quantized_by_hqq(config)
    HqqsModel.save_quantized(quantized, str(folder))
    return quantized


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return AutoHQQHFModel.from_quantized(folder, compute_dtype=dtype, device="cpu", **options)


@quickly
def loaded_by_hqq(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return HqqsModel.from_quantized(str(folder), compute_dtype=dtype, device="cpu")


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites the entries of a qmodel.pt."""
    states = torch.load(folder / "qmodel.pt", weights_only=True)
    edit(states)
    torch.save(states, folder / "qmodel.pt")


def quantized_layers(model: nn.Module, kind: type) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module) is kind}


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """The quantized layers have the same dequantized bits, and everything else the same."""
    mine, other = quantized_layers(ours, HQQLinear), quantized_layers(theirs, hqq.HQQLinear)
    assert mine.keys() == other.keys() != set()
    for name, layer in mine.items():
        assert torch.equal(layer.dequantize(), other[name].dequantize())
        assert (
            torch.equal(layer.bias, other[name].bias)
            if layer.bias is not None
            else (other[name].bias is None)
        )
    rest = {name: p for name, p in theirs.named_parameters() if not name.endswith("W_q")}
    assert len(rest) > 3
    for name, parameter in rest.items():
        assert torch.equal(ours.get_parameter(name), parameter)
