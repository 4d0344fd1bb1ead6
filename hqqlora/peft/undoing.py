"""What keeps a failure from leaving a model half adapted: checks beforehand, and a way back."""

from __future__ import annotations

from typing import Any

from torch import nn

from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.linear import HQQLinear


class Snapshot:
    """What putting adapters into a model changes of it: which modules it consists of, which
    parameters are trained, and (PiSSA) the codes. Holds references, copies nothing."""

    def __init__(self, model: nn.Module) -> None:
        """Takes note of `model`."""
        self._model = model
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        self._codes = [
            (layer, layer.W_q.data, layer.scale.data, layer.zero.data)
            for layer in model.modules()
            if isinstance(layer, HQQExpertWeights)
            or (isinstance(layer, HQQLinear) and layer.is_initialized())
        ]
        self._had_peft_config = hasattr(model, "peft_config")

    @property
    def is_quantized(self) -> bool:
        """Whether the model has quantized layers, and so is ours to care for."""
        return bool(self._codes)

    def restore_codes(self) -> None:
        """Brings the codes back."""
        for layer, *before in self._codes:
            layer.W_q.data, layer.scale.data, layer.zero.data = before

    def restore(self) -> None:
        """Brings everything back."""
        for module, children in self._children:
            module._modules.clear()
            module._modules.update(children)
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        if not self._had_peft_config and hasattr(self._model, "peft_config"):
            del self._model.peft_config
        self.restore_codes()


def check_all_used(keys: Any, where: object) -> None:
    """ValueError if an adapter's file had values that found no place: `keys` is what torch's
    load_state_dict returns."""
    unused = sorted(key for key in getattr(keys, "unexpected_keys", ()) if "lora_" in key)
    if unused:
        name = unused[0].removeprefix("base_model.model.").partition(".lora_")[0]
        raise ValueError(
            f"{where}: the adapter has values for {name!r} ({len(unused)} tensors in all), "
            f"where the model has no adapted layer: it was trained on another base"
        )


def check_modules_to_save(model: nn.Module, config: Any) -> None:
    """ValueError if PEFT's `modules_to_save` means a quantized layer: it cannot be trained."""
    wanted = getattr(config, "modules_to_save", None) or ()
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear) and name.endswith(tuple(wanted)):
            raise ValueError(
                f"modules_to_save means {name}, which is quantized to {module.nbits} bits and "
                f"cannot be trained: give it an adapter, or leave it dense (skip_modules)"
            )
