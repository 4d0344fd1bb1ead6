"""LoRA fine-tuning on frozen low-bit HQQ weights.

In a training script of one's own::

    hqqlora.quantize_model(model, hqqlora.BaseQuantizeConfig(nbits=4, group_size=64))
    hqqlora.add_lora(model, r=16, lora_alpha=32)
    optimizer = torch.optim.AdamW(hqqlora.lora_parameters(model), lr=2e-4)
    ...
    hqqlora.save_adapter(model, "my-adapter")  # PEFT's format

With transformers and PEFT::

    from hqqlora import HqqConfig
    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=HqqConfig(nbits=4, group_size=64)
    )
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))

Importing this package loads its operators. transformers, peft, hqq and gguf are imported by the
names that need them, when those are first used. Whenever a script imports PEFT, PEFT learns to
put its LoRA layers on quantized ones, and transformers to load models quantized by HQQ.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hqqlora import main_interpreter as main_interpreter  # isort: skip (before torch)
from hqqlora import peft as peft
from hqqlora.adapters import load_adapter, save_adapter
from hqqlora.chunked_loss import chunk_loss, unchunk_loss
from hqqlora.config import BaseQuantizeConfig
from hqqlora.connections import connect_peft, connect_transformers
from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import HQQExperts
from hqqlora.linear import HQQLinear
from hqqlora.lora import LoRALinear
from hqqlora.lora_experts import LoRAExpertWeights
from hqqlora.model import add_lora, lora_parameters, quantize_model
from hqqlora.shared_projections import share_projections, unshare_projections

if TYPE_CHECKING:
    from hqqlora.auto_hqq_model import AutoHQQHFModel, HQQModelForCausalLM
    from hqqlora.gguf import export_gguf, export_gguf_adapter, load_gguf
    from hqqlora.hqq_patch import patch_hqq, unpatch_hqq
    from hqqlora.importance import input_importance
    from hqqlora.memory import MemoryReport, memory_report
    from hqqlora.nonfinite import find_nonfinite
    from hqqlora.transformers import HqqConfig

__version__ = "0.1.0"

__all__ = [
    "AutoHQQHFModel",
    "BaseQuantizeConfig",
    "HQQExpertWeights",
    "HQQExperts",
    "HQQLinear",
    "HQQModelForCausalLM",
    "HqqConfig",
    "LoRAExpertWeights",
    "LoRALinear",
    "MemoryReport",
    "__version__",
    "add_lora",
    "chunk_loss",
    "export_gguf",
    "export_gguf_adapter",
    "find_nonfinite",
    "input_importance",
    "load_adapter",
    "load_gguf",
    "lora_parameters",
    "memory_report",
    "patch_hqq",
    "quantize_model",
    "save_adapter",
    "share_projections",
    "unchunk_loss",
    "unpatch_hqq",
    "unshare_projections",
]

# Where the names come from that need an optional package, or that few scripts need.
_ON_DEMAND = {
    "AutoHQQHFModel": "hqqlora.auto_hqq_model",
    "HQQModelForCausalLM": "hqqlora.auto_hqq_model",
    "HqqConfig": "hqqlora.transformers",
    "MemoryReport": "hqqlora.memory",
    "export_gguf": "hqqlora.gguf",
    "export_gguf_adapter": "hqqlora.gguf",
    "find_nonfinite": "hqqlora.nonfinite",
    "input_importance": "hqqlora.importance",
    "load_gguf": "hqqlora.gguf",
    "memory_report": "hqqlora.memory",
    "patch_hqq": "hqqlora.hqq_patch",
    "unpatch_hqq": "hqqlora.hqq_patch",
}

connect_peft()
connect_transformers()


def __getattr__(name: str) -> object:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module 'hqqlora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ON_DEMAND[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
