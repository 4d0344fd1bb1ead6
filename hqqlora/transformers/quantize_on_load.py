"""Quantizing a dense checkpoint while transformers loads it, one weight after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from hqqlora.config import QuantSettings
from hqqlora.experts import as_experts, is_projection, quantized_projection
from hqqlora.linear import HQQLinear
from hqqlora.module_names import linear_tag
from hqqlora.quantizing import quantize_weight


class LayersToQuantize:
    """The plan, and how far it has got."""

    def __init__(
        self, plan: dict[str, QuantSettings], importance: Mapping[str, Tensor] | None = None
    ) -> None:
        """Starts with nothing done. importance: see `HqqConfig`."""
        self.plan = plan
        self._importance = importance or {}
        self.done: dict[str, QuantSettings] = {}
        # Layers whose weight in the checkpoint has another shape.
        self.mismatched: dict[str, torch.Size] = {}
        # transformers' own set of what is missing so far.
        self.missing_keys: set[str] | None = None

    def name_of(self, parameter: str) -> str | None:
        """The planned layer, or projection of experts, that `parameter` is the weight of."""
        if parameter in self.plan:
            return parameter
        layer = parameter.removesuffix(".weight")
        return layer if layer in self.plan and layer != parameter else None

    def quantize(self, model: nn.Module, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Puts an `HQQLinear` without data in the place of the linear layer `name`, or an
        `HQQExpertWeights` in that of experts, and returns the tensors that it needs, under
        their full names.

        Raises:
            ValueError, TypeError: the weight cannot be quantized; names the layer, which stays.
        """
        if is_projection(model, name):
            tensors = self._quantize_experts(model, name, weight)
        else:
            tensors = self._quantize_linear(model, name, weight)
        self.done[name] = self.plan.pop(name)
        keys = (f"{name}.{key}" for key in ("W_q", "scale", "zero"))
        return dict(zip(keys, tensors, strict=True))

    def _quantize_experts(
        self, model: nn.Module, name: str, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        prefix, _, key = name.rpartition(".")
        module = model.get_submodule(prefix)
        try:
            layer = quantized_projection(module, weight, self.plan[name].to_config())
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        layer.repack(planes=False)  # as linear layers, until all is loaded
        tensors = (layer.W_q.data, layer.scale.data, layer.zero.data)
        layer.state_dict_metadata = False
        as_experts(model, prefix).put(key, layer.to("meta"))
        return tensors

    def _quantize_linear(
        self, model: nn.Module, name: str, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.plan[name]
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        try:
            layer = HQQLinear(
                dense,
                settings.to_config(),
                compute_dtype=weight.dtype,
                device="meta",
                initialize=False,
            )
            # In words, until accelerate has put aside what it offloads, by the state_dict.
            layer.repack(planes=False)
            importance = self._importance.get(name)
            tensors = quantize_weight(weight, settings, weight.dtype, importance)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        layer.state_dict_metadata = False
        layer._parameters["bias"] = dense.bias  # which may be loaded already, or not
        model.set_submodule(name, layer)
        return tensors

    def finish(self, model: nn.Module) -> None:
        """Quantizes what has been loaded without coming by, as parts of a fused weight may.
        Layers that the checkpoint has not, such as a new classifier, stay dense.

        Raises:
            ValueError: the checkpoint has not one of the layers, or not all layers of a kind.
        """
        self._check_shapes(model)
        missing = self.missing_keys
        kinds = {linear_tag(name): name for name in self.done}
        for name in list(self.plan):
            if missing is not None and not {name, f"{name}.weight"} & missing:
                self._quantize_loaded(model, name)
            elif (kind := linear_tag(name)) in kinds:
                raise ValueError(
                    f"{name}: the checkpoint has no such weight, but it has {kinds[kind]}"
                )
        if not self.done:
            raise ValueError(
                f"the checkpoint has no weight of the layers to quantize, such as "
                f"{next(iter(self.plan))}"
            )
        self.plan, self.missing_keys = {}, None

    def _check_shapes(self, model: nn.Module) -> None:
        """transformers raises, or with ignore_mismatched_sizes makes a new weight; its first
        versions put the wrong one into the model."""
        for name, shape in self.mismatched.items():
            if is_projection(model, name):
                continue  # of experts: not in the first versions
            dense = model.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            expected = (dense.out_features, dense.in_features)
            if tuple(dense.weight.shape) != expected:
                raise ValueError(
                    f"{name}: the checkpoint's weight is {list(shape)}, the model's "
                    f"{list(expected)}"
                )

    def _quantize_loaded(self, model: nn.Module, name: str) -> None:
        weight = _weight(model, name)
        if weight.is_meta:
            raise ValueError(f"{name}: a weight that is loaded in parts cannot be offloaded")
        for key, tensor in self.quantize(model, name, weight.detach()).items():
            layer = model.get_submodule(name)
            layer._parameters[key.rpartition(".")[2]] = nn.Parameter(tensor, False)


class QuantizeWeight(ConversionOps):  # type: ignore[misc]
    """transformers' operation for a weight that is to be quantized: the weight goes in, W_q,
    scale and zero come out, and the loader puts them where the device map says."""

    def __init__(self, layers: LayersToQuantize) -> None:
        """`layers` is shared by all operations of one load."""
        self._layers = layers

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *arguments: Any,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **unused: Any,
    ) -> dict[str, Tensor]:
        """Quantizes what is planned in `input_dict`, weights under their full names, and hands
        on the rest: what a fused weight is split into need not all be ours."""
        layers = self._layers
        result: dict[str, Tensor] = {}
        for key in list(input_dict):
            # Taken out, so that nobody holds the dense weight any longer than needed.
            weight = input_dict.pop(key)
            weight = weight[0] if isinstance(weight, list) else weight
            name = layers.name_of(key)
            if name is not None and weight.shape != _weight(model, name).shape:
                del layers.plan[name]
                layers.mismatched[name] = weight.shape
                name = None
            if name is None:
                result[key] = weight
                continue
            layers.missing_keys = missing_keys
            try:
                result.update(layers.quantize(model, name, weight))
            except (TypeError, ValueError) as error:
                return _Failure(error)
            if missing_keys is not None:
                missing_keys.discard(key)
        return result


def _weight(model: nn.Module, name: str) -> Tensor:
    """The dense weight of the layer `name`, or the parameter of that name."""
    owner = name if not is_projection(model, name) else name.rpartition(".")[0]
    key = "weight" if owner == name else name.rpartition(".")[2]
    weight = getattr(model.get_submodule(owner), key)
    assert isinstance(weight, Tensor)
    return weight


class _Failure(dict[str, Tensor]):
    """A result that raises when it is read. What `convert` raises itself, the loader would
    collect for a report after loading all the rest."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def items(self) -> NoReturn:
        raise self._error
