"""PEFT on quantized layers: ``get_peft_model`` and all it leads to, on hqqlora's operators.

`enable` makes PEFT put an `HQQLoraLinear` around every `hqqlora.HQQLinear` that a LoraConfig
means. ``import hqqlora`` sees to it as soon as PEFT is imported; a script needs no line of it.
Importing this package does not import PEFT.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hqqlora.connections import connect_peft as install
from hqqlora.optional_packages import needing

if TYPE_CHECKING:
    from hqqlora.peft.initialization import correct_quantization
    from hqqlora.peft.lora_layer import HQQLoraLinear
    from hqqlora.peft.merging import merge_and_unload, requantization_errors

__all__ = [
    "HQQLoraLinear",
    "correct_quantization",
    "enable",
    "install",
    "merge_and_unload",
    "requantization_errors",
]

# What is only there with PEFT, and where.
_WITH_PEFT = {
    "HQQLoraLinear": "hqqlora.peft.lora_layer",
    "correct_quantization": "hqqlora.peft.initialization",
    "merge_and_unload": "hqqlora.peft.merging",
    "requantization_errors": "hqqlora.peft.merging",
}


def enable() -> None:
    """Connects PEFT to quantized layers. A second call changes nothing.

    Raises:
        ImportError: PEFT is not installed.
    """
    with needing("hqqlora.peft"):
        from hqqlora.peft.connecting import connect

    connect()


def __getattr__(name: str) -> Any:
    if name in _WITH_PEFT:
        # First, as its import connects it, for which these modules must not be half imported.
        with needing(f"hqqlora.peft.{name}"):
            importlib.import_module("peft")
        return getattr(importlib.import_module(_WITH_PEFT[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
