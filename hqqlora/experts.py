"""Mixtures of experts: what stands in the place of a transformers experts module, whose weights
are 3-D parameters, once some of them are quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqqlora.autograd import grouped_lora_linear
from hqqlora.config import QuantSettings
from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.module_names import full_name

# The weights of an experts module that transformers' `use_experts_implementation` describes.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class HQQExperts(nn.Module):
    """A transformers experts module, such as MixtralExperts, with quantized projections.

    Takes over the parameters, buffers, modules and settings of the module it replaces. A
    projection is an `HQQExpertWeights` (or has an adapter around it) once it is quantized, and
    the dense parameter before. Each product works on the rows routed to an expert alone.
    """

    # Of the module that it stands for.
    is_transposed: bool
    act_fn: nn.Module
    post_expert_norm: nn.Module

    def __init__(self, dense: nn.Module) -> None:
        """`dense` is a module that `is_experts`; its tensors are shared until replaced."""
        super().__init__()
        own = vars(self)
        settings = {key: value for key, value in vars(dense).items() if key not in own}
        own.update(settings)
        self.training = dense.training
        self._parameters.update(dense._parameters)
        self._buffers.update(dense._buffers)
        self._non_persistent_buffers_set |= dense._non_persistent_buffers_set
        self._modules.update(dense._modules)
        self.dense_class: type[nn.Module] = type(dense)
        # (A, B, scaling) of a projection, as long as somebody else has an adapter for it.
        self.lent_adapters: dict[str, tuple[Tensor, Tensor, float]] = {}

    def as_dense(self) -> nn.Module:
        """A module of the class that this one stands for, with the same tensors."""
        dense = self.dense_class.__new__(self.dense_class)
        nn.Module.__init__(dense)
        settings = {key: value for key, value in vars(self).items() if key not in vars(dense)}
        del settings["dense_class"], settings["lent_adapters"]
        vars(dense).update(settings)
        dense.training = self.training
        dense._parameters.update(self._parameters)
        dense._buffers.update(self._buffers)
        dense._non_persistent_buffers_set |= self._non_persistent_buffers_set
        dense._modules.update(self._modules)
        return dense

    def put(self, key: str, weights: nn.Module | nn.Parameter) -> None:
        """Puts `weights` in the place of the projection `key`."""
        self._parameters.pop(key, None)
        self._modules.pop(key, None)
        setattr(self, key, weights)
        # In one order, in whichever they came.
        places = {name: place for place, name in enumerate(PROJECTIONS)}
        for child in sorted(self._modules, key=lambda name: places.get(name, len(places))):
            self._modules[child] = self._modules.pop(child)

    @property
    def first_projection(self) -> str:
        """The projection before the activation."""
        return "gate_up_proj" if hasattr(self, "gate_up_proj") else "up_proj"

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """As transformers' "grouped_mm" has it.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k], the experts of each token.
            top_k_weights: [tokens, k], the share that each has in the result.

        Returns the weighted sum over each token's experts, [tokens, hidden].
        """
        tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        first = self._weight_of(self.first_projection)
        ends = torch.arange(first.size(0) + 1, dtype=experts.dtype, device=experts.device)
        offsets = torch.searchsorted(experts, ends).cpu()
        rows = hidden_states.index_select(0, order // k)

        rows = self._project(self.first_projection, rows, offsets, experts)
        rows = self._activate(rows)
        rows = self._project("down_proj", rows, offsets, experts)
        if getattr(self, "has_post_expert_norm", False):
            rows = self.post_expert_norm(rows)

        rows = rows * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(-1)
        unsorted = rows.index_select(0, torch.argsort(order))
        total = unsorted.view(tokens, k, rows.size(-1)).sum(dim=1)
        return total.to(hidden_states.dtype)

    def _weight_of(self, key: str) -> Tensor:
        """The parameter, or a placeholder of its shape."""
        projection = getattr(self, key)
        weight: Tensor = projection if isinstance(projection, Tensor) else projection.weight
        return weight

    def _project(self, key: str, rows: Tensor, offsets: Tensor, experts: Tensor) -> Tensor:
        projection = getattr(self, key)
        y: Tensor
        if key in self.lent_adapters:
            y = grouped_lora_linear(rows, projection.packed, offsets, *self.lent_adapters[key])
        elif isinstance(projection, nn.Module):
            y = projection(rows, offsets)
        else:
            y = self._dense_product(projection, rows, offsets)
        bias = self._parameters.get(f"{key}_bias")
        return y if bias is None else y + bias.index_select(0, experts).to(y.dtype)

    def _dense_product(self, weight: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        ends = offsets.tolist()
        products = [
            F.linear(rows[begin:end], of.T if self.is_transposed else of)
            for of, begin, end in zip(weight, ends, ends[1:], strict=False)
            if end > begin
        ]
        return torch.cat(products) if products else rows[:, :0]

    def _activate(self, rows: Tensor) -> Tensor:
        if self.first_projection == "up_proj":
            activated: Tensor = self.act_fn(rows)
            return activated
        own = getattr(self.dense_class, "_apply_gate", None)
        if own is not None:
            gated: Tensor = own(self, rows)
            return gated
        gate, up = rows.chunk(2, dim=-1)
        gated = self.act_fn(gate) * up
        return gated


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is a transformers experts module that `HQQExperts` can stand for: it
    says of itself how its 3-D parameters are laid out."""
    if isinstance(module, HQQExperts):
        return True
    weights = [key for key in PROJECTIONS if _is_stack(getattr(module, key, None))]
    return (
        isinstance(getattr(module, "is_transposed", None), bool)
        and isinstance(getattr(module, "has_bias", None), bool)
        and "down_proj" in weights
        and len(weights) == 2
    )


def _is_stack(weight: object) -> bool:
    return isinstance(weight, nn.Parameter) and weight.dim() == 3


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """The dense projections of experts modules in `model` that can be quantized: full name, the
    module, the parameter. A module that is there under several names comes under each."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not is_experts(module):
            continue
        for key in PROJECTIONS:
            parameter = module._parameters.get(key)
            if parameter is not None:
                yield full_name(prefix, key), module, parameter


def matrix_shape(module: nn.Module, parameter: Tensor) -> tuple[int, int]:
    """(out_features, in_features) of each matrix of `parameter`, a projection of `module`."""
    first, second = parameter.shape[1:]
    return (second, first) if module.is_transposed else (first, second)


def settings_for_experts(settings: QuantSettings) -> QuantSettings:
    """`settings`, as they are for experts: view_as_float has no meaning there."""
    return replace(settings, view_as_float=False)


def as_experts(model: nn.Module, name: str) -> HQQExperts:
    """The experts module `name` of `model`, as an `HQQExperts`: replaced by one, under all its
    names, if it is not yet."""
    module = model.get_submodule(name)
    if isinstance(module, HQQExperts):
        return module
    replacement = HQQExperts(module)
    for place, found in list(model.named_modules(remove_duplicate=False)):
        if found is module:
            model.set_submodule(place, replacement)
    return replacement


def is_projection(model: nn.Module, name: str) -> bool:
    """Whether `name` is a parameter of a module, rather than a module."""
    parent, _, key = name.rpartition(".")
    return model.get_submodule(parent)._parameters.get(key) is not None


def quantized_projection(
    module: nn.Module, weight: Tensor, *arguments: Any, **options: Any
) -> HQQExpertWeights:
    """`weight`, a dense projection of the experts `module`, quantized; the other arguments are
    those of `HQQExpertWeights.from_weights`."""
    dense = weight.transpose(1, 2) if module.is_transposed else weight
    weights = HQQExpertWeights.from_weights(dense, *arguments, **options)
    return weights.train(module.training)


def quantize_experts(
    model: nn.Module,
    name: str,
    quant_config: Mapping[str, Any],
    *arguments: Any,
    **options: Any,
) -> None:
    """Quantizes the projection `name` of an experts module of `model` (see
    `expert_parameters`); the other arguments are those of `HQQExpertWeights.from_weights`.

    Raises ValueError if the group size does not fit or an element is not finite.
    """
    prefix, _, key = name.rpartition(".")
    module = model.get_submodule(prefix)
    weight = module._parameters[key]
    assert weight is not None
    weights = quantized_projection(module, weight.detach(), quant_config, *arguments, **options)
    as_experts(model, prefix).put(key, weights)
    # Whoever holds the module that was should not hold the dense weight.
    module._parameters.pop(key, None)


def dequantize_experts(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Puts a dense parameter in the place of the quantized projection `name` of `model`; once
    all of an experts module are dense, also the module it was."""
    prefix, _, key = name.rpartition(".")
    experts = model.get_submodule(prefix)
    weights = getattr(experts, key)
    assert isinstance(experts, HQQExperts)
    assert isinstance(weights, HQQExpertWeights)
    dense = weights.dequantize(dtype)
    if experts.is_transposed:
        dense = dense.transpose(1, 2).contiguous()
    experts.put(key, nn.Parameter(dense, requires_grad=False))
    if any(key in experts._modules for key in PROJECTIONS):
        return
    original = experts.as_dense()
    for place, found in list(model.named_modules(remove_duplicate=False)):
        if found is experts:
            model.set_submodule(place, original)
