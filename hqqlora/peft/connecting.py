"""What is changed in PEFT, all of it in one place: a few functions, which others may have
wrapped too; each asks what was there before."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import peft
import peft.tuners.lora.model as lora_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import HQQExperts
from hqqlora.linear import HQQLinear
from hqqlora.peft.experts_layer import ParamWrapper, as_parameters, is_shown
from hqqlora.peft.lora_layer import HQQLoraLinear
from hqqlora.peft.undoing import Snapshot, check_all_used, check_modules_to_save

Function = Callable[..., Any]

RESOLVE = "resolve_quantization_backend"


def connect() -> None:
    """Makes the changes that are not made yet."""
    _wrap(lora_model, "dispatch_hqq", _with_our_layer)
    _wrap(BaseTuner, "inject_adapter", _putting_all_in_or_none)
    _wrap(BaseTuner, "_check_merge_allowed", _refusing_lost_merges)
    for model_class in (peft.PeftModel, peft.PeftMixedModel):
        _wrap(model_class, "get_nb_trainable_parameters", _counting_weights)
    _wrap(peft.PeftModel, "from_pretrained", _leaving_the_base_as_it_was)
    _wrap(peft.PeftModel, "load_adapter", _refusing_adapters_of_other_bases)
    resolve = getattr(peft.utils, RESOLVE, None)
    if resolve is None:  # before PEFT 0.20, LoRA alone knew of quantized layers
        return
    # It has been imported by name, into every tuner that uses it.
    for name, module in list(sys.modules.items()):
        if (name + ".").startswith("peft.") and vars(module).get(RESOLVE) is resolve:
            _wrap(module, RESOLVE, _with_our_backend)


def _wrap(owner: Any, name: str, wrapper: Callable[[Function], Function]) -> None:
    """Replaces a function, method or class method by ``wrapper(function)``, once."""
    before: Any = inspect.getattr_static(owner, name)
    of_class = isinstance(before, classmethod)
    function: Function = before.__func__ if of_class else before
    if getattr(function, "_hqqlora_wrapper", None) is wrapper:
        return
    after = functools.wraps(function)(wrapper(function))
    after._hqqlora_wrapper = wrapper  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(after) if of_class else after)


def _with_our_layer(before: Function) -> Function:
    """LoRA's choice of a layer class: `HQQLoraLinear` for an `HQQLinear`, our `ParamWrapper`
    for a projection of `HQQExperts`."""

    def dispatch_hqq(target: nn.Module, adapter_name: str, **keywords: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        parameter = keywords.get("parameter_name")
        if isinstance(base, HQQExperts) and is_shown(base._parameters.get(parameter or "")):
            return ParamWrapper(target, adapter_name, **keywords)
        if not isinstance(base, HQQLinear):
            return before(target, adapter_name, **keywords)
        base.check_whole()
        config = keywords.pop("lora_config", None)  # what PEFT before 0.19 calls it
        if getattr(keywords.get("config", config), "fan_in_fan_out", False):
            raise ValueError(
                f"{keywords.get('target_name') or 'layer'}: fan_in_fan_out is for layers that "
                f"store their weight transposed; an HQQLinear does not"
            )
        return HQQLoraLinear(target, adapter_name, **keywords)

    return dispatch_hqq


def _with_our_backend(before: Function) -> Function:
    """How other tuners read and write a base's weight."""

    from hqqlora.peft.other_tuners import backend_for

    def resolve_quantization_backend(base_layer: nn.Module, **keywords: Any) -> Any:
        return backend_for(base_layer) or before(base_layer, **keywords)

    return resolve_quantization_backend


def _refusing_lost_merges(before: Function) -> Function:
    """PEFT's check whether a model's adapters can be merged: not by tuners that write to
    ``base_layer.weight``, where an `HQQLinear` has a placeholder."""

    def _check_merge_allowed(self: Any) -> None:
        before(self)
        for name, module in self.named_modules():
            if (
                isinstance(module, BaseTunerLayer)
                and isinstance(getattr(module, "base_layer", None), HQQLinear)
                and not isinstance(module, HQQLoraLinear)
                and getattr(module, "quantization_backend", None) is None
            ):
                tuner = type(module).__module__.split(".")[-2]
                raise ValueError(
                    f"{name}: PEFT cannot merge a {tuner} adapter into a quantized layer; "
                    f"hqqlora.peft.merge_and_unload(model, dequantize=True) merges it into a "
                    f"dense one"
                )

    return _check_merge_allowed


def _counting_weights(before: Function) -> Function:
    """PEFT's count of parameters, with a quantized weight as the number of weights that it is,
    rather than of the words, scales and zeros that it is kept in."""

    def get_nb_trainable_parameters(self: nn.Module) -> tuple[int, int]:
        trainable, total = before(self)
        for layer in self.modules():
            if isinstance(layer, HQQLinear) and layer.is_initialized():
                total += layer.in_features * layer.out_features
                total -= layer.W_q.numel() + layer.scale.numel() + layer.zero.numel()
            elif isinstance(layer, HQQExpertWeights):
                total += layer.weight.numel()
                total -= layer.W_q.numel() + layer.scale.numel() + layer.zero.numel()
        return trainable, total

    return get_nb_trainable_parameters


def _putting_all_in_or_none(before: Function) -> Function:
    """How a tuner puts a new adapter into a model, layer after layer. If that fails for the
    first one, the model is as it was."""

    def inject_adapter(
        self: Any, model: nn.Module, adapter_name: str, *arguments: Any, **keywords: Any
    ) -> Any:
        snapshot = Snapshot(model)
        if not snapshot.is_quantized:
            return before(self, model, adapter_name, *arguments, **keywords)
        check_modules_to_save(model, self.peft_config[adapter_name])
        is_first = not any(isinstance(m, BaseTunerLayer) for m in model.modules())
        try:
            with as_parameters(model):
                return before(self, model, adapter_name, *arguments, **keywords)
        except BaseException:
            if is_first:
                snapshot.restore()
            raise

    return inject_adapter


def _leaving_the_base_as_it_was(before: Function) -> Function:
    """``PeftModel.from_pretrained``, which puts adapters in before it reads their values."""

    def from_pretrained(cls: Any, model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        snapshot = Snapshot(model)
        try:
            return before(cls, model, *arguments, **keywords)
        except BaseException:
            if snapshot.is_quantized:
                snapshot.restore()
            raise

    return from_pretrained


def _refusing_adapters_of_other_bases(before: Function) -> Function:
    """``PeftModel.load_adapter``, which passes over values that find no place; a new adapter
    that cannot be loaded is taken out again."""

    def load_adapter(
        self: Any, model_id: Any, adapter_name: str, *arguments: Any, **keywords: Any
    ) -> Any:
        snapshot = Snapshot(self)
        if not snapshot.is_quantized:
            return before(self, model_id, adapter_name, *arguments, **keywords)
        is_new = adapter_name not in self.peft_config
        try:
            keys = before(self, model_id, adapter_name, *arguments, **keywords)
            check_all_used(keys, model_id)
        except BaseException:
            if is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
                snapshot.restore_codes()
            raise
        return keys

    return load_adapter
