"""LoRA fine-tuning on frozen low-bit HQQ weights.

In a training script of one's own::

    hqqlora.quantize_model(model, hqqlora.BaseQuantizeConfig(nbits=4, group_size=64))
    hqqlora.add_lora(model, r=16, lora_alpha=32)
    optimizer = torch.optim.AdamW(hqqlora.lora_parameters(model), lr=2e-4)
    ...
    hqqlora.save_adapter(model, "my-adapter")  # PEFT's format

Importing this package loads its operators, and neither transformers nor peft.
"""

from hqqlora.adapters import load_adapter, save_adapter
from hqqlora.config import BaseQuantizeConfig
from hqqlora.linear import HQQLinear
from hqqlora.lora import LoRALinear
from hqqlora.model import add_lora, lora_parameters, quantize_model

__version__ = "0.1.0"

__all__ = [
    "BaseQuantizeConfig",
    "HQQLinear",
    "LoRALinear",
    "__version__",
    "add_lora",
    "load_adapter",
    "lora_parameters",
    "quantize_model",
    "save_adapter",
]
