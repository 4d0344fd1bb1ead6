"""The quantizer that transformers calls, for loading dense and quantized checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import dequantize_experts, expert_parameters
from hqqlora.linear import HQQLinear
from hqqlora.module_names import linear_tag
from hqqlora.ops.weight import SLOTS_PER_WORD, word_dtype
from hqqlora.peft import install
from hqqlora.planes import planes_serve
from hqqlora.state_encoding import check_dtype
from hqqlora.transformers.checkpoint_names import keep_parts_apart
from hqqlora.transformers.config import HqqConfig, is_per_key
from hqqlora.transformers.integer_codes import refuse_converted
from hqqlora.transformers.layer_plan import layers_to_quantize
from hqqlora.transformers.load_quantized import prepare_quantized, restore_words
from hqqlora.transformers.module_dtypes import ModuleDtypes
from hqqlora.transformers.quantize_on_load import LayersToQuantize, QuantizeWeight


class HqqQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' quantizer for the method "hqq".

    A dense checkpoint is quantized while it is loaded, each weight as it comes; of a quantized
    one the layers are built as its own metadata say, before its tensors are loaded.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        """quantization_config: our HqqConfig, transformers' own, or a dict of either."""
        super().__init__(HqqConfig.of(quantization_config), **kwargs)
        # The model keeps its configuration, and need not keep this.
        self._importance = self.quantization_config.importance or {}
        self.quantization_config.importance = None
        self._layers = LayersToQuantize({})

    # ---- before loading -------------------------------------------------------------

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        checkpoint_files: Sequence[str] | None = None,
        **unused: Any,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        check_dtype("dtype", dtype)
        if self.pre_quantized:
            prepare_quantized(model, self.quantization_config, dtype, checkpoint_files)
        else:
            plan = layers_to_quantize(model, self.quantization_config, dtype)
            self._layers = LayersToQuantize(plan, self._importance)
        self.mark(model)

    def mark(self, model: Any) -> None:
        """Sets what others ask a model for."""
        # Not "hqq": for that, transformers' `to` and `cuda` import the package hqq.
        model.quantization_method = "hqqlora"
        model.hqq_quantized = True  # PEFT's

    def param_needs_quantization(self, model: Any, param_name: str, **unused: Any) -> bool:
        """Whether `param_name` is a weight that is to be quantized."""
        return self._layers.name_of(param_name) is not None

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element of `param` takes once it is loaded, for device maps (3 bits: in
        hqq's words, before they are put into planes)."""
        name = self._layers.name_of(param_name)
        if name is None:
            return float(param.element_size())
        settings = self._layers.plan[name]
        # (a transposed stack's group size is that of its rows or columns only if it is None)
        group_size = settings.group_size_for(param.size(-2), param.size(-1), name)
        words = word_dtype(settings.nbits).itemsize / SLOTS_PER_WORD[settings.nbits]
        return words + 2 * param.element_size() / group_size

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Leaves room for the dense weight that is being quantized."""
        if self.pre_quantized:
            return max_memory
        return {
            device: size * 0.9 if isinstance(size, (int, float)) else size
            for device, size in max_memory.items()
        }

    # ---- while loading --------------------------------------------------------------

    def get_quantize_ops(self) -> QuantizeWeight:
        """The operation for one weight."""
        return QuantizeWeight(self._layers)

    # ---- after loading --------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **unused: Any) -> Any:
        if not self.pre_quantized:
            quantized = self._layers.done
            self._layers.finish(model)
            self._name_tags(model, list(quantized))
            self._layers = LayersToQuantize({})
        else:
            refuse_converted(model)
            restore_words(model)
        for layer in model.modules():
            if isinstance(layer, (HQQLinear, HQQExpertWeights)):
                layer.requires_grad_(False)  # the loader has its own mind about that
                if not layer.W_q.is_meta:  # what is offloaded stays in words
                    layer.repack(planes_serve(layer.device))
        keep_parts_apart(model)
        install()  # PEFT's layers for ours
        return model

    def _name_tags(self, model: Any, names: Sequence[str]) -> None:
        """Writes out, tag by tag, what patterns have meant: that is what other readers of
        ``config.json`` understand. Where layers of one tag differ, the patterns stay."""
        if not is_per_key(self.quantization_config.quant_config):
            return
        of_tag: dict[str, Any] = {}
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, HQQExpertWeights)):
                continue
            settings = None
            if isinstance(module, (HQQLinear, HQQExpertWeights)):
                settings = module.metadata.settings.to_config()
            if of_tag.setdefault(linear_tag(name), settings) != settings:
                return
        for name, _, _ in expert_parameters(model):
            if of_tag.setdefault(linear_tag(name), None) is not None:
                return
        quantized = {tag: settings for tag, settings in of_tag.items() if settings}
        self.quantization_config.quant_config = quantized

    # ---- saving, and the way back ---------------------------------------------------

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state_dict with hqq's nineteen keys a layer."""
        state: dict[str, Tensor] = model.state_dict()
        for name, layer in model.named_modules():
            if f"{name}.W_q" not in state:
                continue
            if isinstance(layer, HQQLinear):
                state[f"{name}.W_q"] = layer.stored("W_q", state[f"{name}.W_q"])
            if isinstance(layer, (HQQLinear, HQQExpertWeights)):
                for key, value in layer.metadata.encoded().items():
                    state[f"{name}.{key}"] = value
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # A string is what stands in a saved model's configuration.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dtypes = None if wanted is None else ModuleDtypes(model, wanted)
        layers = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, (HQQLinear, HQQExpertWeights))
        ]
        for name, layer in layers:
            if layer.W_q.is_meta:
                raise RuntimeError(f"{name} is offloaded and cannot be dequantized")
        for name, layer in layers:
            of_layer = dtypes.of(name) if dtypes else layer.compute_dtype
            if isinstance(layer, HQQExpertWeights):
                dequantize_experts(model, name, of_layer)
            else:
                model.set_submodule(name, _dense(layer, of_layer))
        del model.hqq_quantized
        return model

    # ---- what transformers asks -----------------------------------------------------

    def is_serializable(self, *unused: Any) -> bool:
        """Yes: `save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes, with adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """No: the quantized weights themselves are frozen."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def _dense(layer: HQQLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(
        layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
    )
    dense.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    hook = getattr(layer, "_hf_hook", None)  # accelerate's, which moves inputs
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(layer)
        add_hook_to_module(dense, hook)
    return dense.train(layer.training)
