"""Names in checkpoints and names in models: where transformers renames, splits and fuses."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import expert_parameters
from hqqlora.linear import HQQLinear
from hqqlora.state_encoding import TENSOR_KEYS


class ModelNames:
    """From a checkpoint's names to a model's, as transformers itself maps them."""

    def __init__(self, model: Any) -> None:
        """Asks transformers for the renamings of `model`, which is still dense."""
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()
        self._known = {n for n, m in model.named_modules() if type(m) is nn.Linear}
        self._known.update(name for name, *_ in expert_parameters(model))

    def key(self, stored: str) -> str:
        """The model's name for the checkpoint's tensor `stored`."""
        renamed, _ = rename_source_key(
            stored, self._renamings, self._converters, self._prefix, self._state
        )
        return str(renamed)

    def is_converted(self, stored: str) -> bool:
        """Whether transformers splits, fuses or reorders the checkpoint's tensor `stored`."""
        return self.conversion_of(stored)[0] is not None

    def conversion_of(self, stored: str) -> tuple[Any, str]:
        """The conversion that transformers applies to the checkpoint's tensor `stored` (None:
        it renames at most), and the one of its patterns that means the tensor."""
        _, pattern = rename_source_key(
            stored, self._renamings, self._converters, self._prefix, self._state
        )
        # (of several with one pattern the last, as transformers has it)
        of_pattern = {key: c for c in self._converters for key in c.source_patterns}
        return of_pattern.get(pattern), pattern or ""

    def loads_as(self, stored: str, name: str) -> bool:
        """Whether the codes of a quantized layer that the checkpoint calls `stored` are loaded
        as those of the layer `name`."""
        key = f"{name}.W_q"
        renamed, _ = rename_source_key(
            f"{stored}.W_q", self._renamings, self._converters, self._prefix, {key: True}
        )
        return str(renamed) == key

    def of(self, stored: str) -> str | None:
        """The name of the model's linear layer, or projection of experts, that the checkpoint
        calls `stored`."""
        for key in (self.key(f"{stored}.weight"), f"{stored}.weight"):
            name = key.removesuffix(".weight")
            if name in self._known:
                return name
        return None


def keep_parts_apart(model: Any) -> None:
    """Has `save_pretrained` not fuse again what `from_pretrained` has split (q, k and v of one
    weight, say) where it would fuse quantized layers: codes cannot be put together like
    weights. They are saved, and load, under the names that the model has for them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = _conversions_of_new(model)
    keys = _quantized_keys(model)
    apart = [c for c in conversions if not _fuses(c, keys)]
    if len(apart) < len(conversions):
        model._weight_conversions = apart


def _conversions_of_new(model: Any) -> list[Any]:
    """What transformers applies when it saves a model that it has not loaded."""
    prefix_change = getattr(core_model_loading, "PrefixChange", ())
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    return [c for c in conversions if not isinstance(c, prefix_change)]


def _quantized_keys(model: nn.Module) -> list[str]:
    """What quantized layers have; also the weight that they have not, without which the other
    parts of a fused weight are not whole."""
    return [
        f"{name}.{key}"
        for name, layer in model.named_modules()
        if isinstance(layer, (HQQLinear, HQQExpertWeights))
        for key in ("weight", *TENSOR_KEYS)
    ]


def _fuses(conversion: Any, keys: list[str]) -> bool:
    if not isinstance(conversion, WeightConverter):
        return False
    try:
        saving = conversion.reverse_transform()
    except NotImplementedError:  # then it is transformers that cannot save
        return False
    return any(saving.rename_source_key(key)[1] is not None for key in keys)
