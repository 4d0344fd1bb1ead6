"""Making a model that was not quantized by `from_pretrained` one that transformers takes for
quantized, so that `save_pretrained` writes a checkpoint that loads."""

from __future__ import annotations

from typing import Any

from torch import nn

from hqqlora.config import QuantSettings
from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import expert_parameters
from hqqlora.linear import HQQLinear
from hqqlora.module_names import linear_tag
from hqqlora.transformers.config import HqqConfig
from hqqlora.transformers.quantizer import HqqQuantizer


def mark_quantized(model: Any) -> HqqConfig:
    """Gives a transformers model with `HQQLinear` layers, as `hqqlora.quantize_model` makes
    them, what `from_pretrained` would have given it: `save_pretrained`, `dequantize`, Trainer
    and PEFT then work. Returns the configuration that says how its layers are quantized.

    Raises:
        ValueError: no layer is quantized.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (HQQLinear, HQQExpertWeights))
    }
    if not layers:
        raise ValueError(f"no layer of {type(model).__name__} is quantized")
    config = _configuration_of(model, layers)
    for layer in layers.values():
        layer.state_dict_metadata = False  # the quantizer adds it when the model is saved
    quantizer = HqqQuantizer(config, pre_quantized=True)
    quantizer.mark(model)
    model.is_quantized = True
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return config


def _configuration_of(
    model: nn.Module, layers: dict[str, HQQLinear | HQQExpertWeights]
) -> HqqConfig:
    """One configuration for all layers, or one for each of their tags."""
    dense = {
        linear_tag(name)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name not in layers
    }
    dense.update(linear_tag(name) for name, *_ in expert_parameters(model))
    of_tag: dict[str, QuantSettings] = {}
    for name, layer in layers.items():
        of_tag.setdefault(linear_tag(name), layer.metadata.settings)
    config = HqqConfig(skip_modules=sorted(dense - of_tag.keys()))
    settings = set(of_tag.values())
    if len(settings) == 1:
        config.quant_config = settings.pop().to_config()
    else:
        config.quant_config = {tag: of.to_config() for tag, of in of_tag.items()}
    return config
