"""Connects PEFT and transformers when they are imported, whether before hqqlora or after it.

Whoever imports one of them wants it, and perhaps no quantized layer: that must not fail.
"""

from __future__ import annotations

import importlib
import sys
import warnings

from hqqlora.import_hook import when_imported


def connect_peft() -> None:
    """Makes PEFT, now or once it is imported, put its LoRA on quantized layers."""
    when_imported("peft", _enable_peft)


def connect_transformers() -> None:
    """Makes transformers, now or once it is imported, load models quantized by HQQ."""
    # (what defines `from_pretrained`: before it, no model is loaded)
    when_imported("transformers.modeling_utils", _register_quantizer)


def _enable_peft() -> None:
    from hqqlora.peft import enable

    try:
        enable()
    except (ImportError, AttributeError) as error:
        _warn("peft", "which will take quantized layers for dense ones and fail on them", error)


def _register_quantizer() -> None:
    transformers = sys.modules["transformers"]
    if int(transformers.__version__.partition(".")[0]) < 5:
        return  # which has an HQQ of its own
    try:
        importlib.import_module("hqqlora.transformers")
    except (ImportError, AttributeError) as error:
        _warn("transformers", "which will not load models quantized by HQQ", error)


def _warn(package: str, consequence: str, error: Exception) -> None:
    version = getattr(sys.modules.get(package), "__version__", "of unknown version")
    warnings.warn(
        f"hqqlora cannot connect to {package} {version}, {consequence}: {error}", stacklevel=2
    )
