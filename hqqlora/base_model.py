"""The model that an adapter's package has wrapped."""

from __future__ import annotations

from typing import Any


def without_peft(model: Any) -> Any:
    """The transformers model inside PEFT's, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
