"""What PEFT puts around quantized experts that `LoraConfig(target_parameters=...)` means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft.tuners.lora.layer as lora_layer
import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.experts import PROJECTIONS, HQQExperts


# PEFT knows the class by its name, where it asks what may be wrapped once more.
class ParamWrapper(lora_layer.ParamWrapper):  # type: ignore[misc]
    """PEFT's LoRA of a 3-D parameter, with the base's product and the adapter's in one
    operation on the rows of each expert: no update as large as the weights is ever made.

    Its parameters, their names and values are those of PEFT's own, and so are its files.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments as PEFT passes them."""
        self._codes: tuple[Tensor, ...] | None = None
        super().__init__(*args, **kwargs)

    @property
    def weights(self) -> HQQExpertWeights:
        """The quantized projection."""
        found = self.get_base_layer()._modules[self.parameter_name]
        assert isinstance(found, HQQExpertWeights)
        return found

    def get_param(self) -> Tensor:
        """A placeholder of the dense parameter's shape, dtype and device."""
        experts = self.get_base_layer()
        found = getattr(experts, self.parameter_name)
        return placeholder(experts, found) if isinstance(found, HQQExpertWeights) else found

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A [E, r, in_features] and B [E, out_features, r] of an adapter; views."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return (
            A.reshape(self.num_experts, -1, A.shape[-1]),
            B.reshape(B.shape[0], -1, self.num_experts).permute(2, 0, 1),
        )

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Lends the active adapters to the experts for one forward pass."""
        names = [name for name in active_adapters if name in self.lora_A]
        if not names:
            yield
            return
        factors = [(*self.factors(name), self.scaling[name]) for name in names]
        if len(factors) > 1:  # several are one of the sum of their ranks
            A = torch.cat([A for A, _, _ in factors], dim=1)
            B = torch.cat([B * scaling for _, B, scaling in factors], dim=2)
            factors = [(A, B, 1.0)]
        adapters = self.get_base_layer().lent_adapters
        adapters[self.parameter_name] = factors[0]
        try:
            yield
        finally:
            del adapters[self.parameter_name]

    # ---- merging --------------------------------------------------------------------

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """``scaling * B_e A_e`` [E, out_features, in_features], float32."""
        A, B = self.factors(adapter_name)
        delta: Tensor = B.float() @ A.float() * self.scaling[adapter_name]
        return delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantizes weights + adapters (None: the active ones), with the weights' own
        configuration. The sum always starts from the codes of before the first merge.

        Raises ValueError if it is not finite; nothing is changed.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        weights = self.weights
        before = (weights.W_q.data, weights.scale.data, weights.zero.data)
        self._put(self._codes or before)
        dense = weights.dequantize(torch.float32)
        for name in (*self.merged_adapters, *names):
            dense += self.get_delta_weight(name)
        self._put(before)
        weights.requantize(dense)
        self._codes = self._codes or before
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Brings the weights back as they were before the first merge, bit for bit."""
        if self._codes is None:
            super().unmerge()  # which warns
            return
        self._put(self._codes)
        self._codes = None
        self.merged_adapters.clear()

    def _put(self, codes: tuple[Tensor, ...]) -> None:
        """Puts W_q, scale and zero into the weights."""
        weights = self.weights
        moved = [part.to(weights.device) for part in codes]
        weights.W_q.data, weights.scale.data, weights.zero.data = moved


def placeholder(experts: nn.Module, weights: HQQExpertWeights) -> Tensor:
    """NaN in the shape of the parameter that `weights` stands for."""
    weight = weights.weight
    return weight.transpose(1, 2) if experts.is_transposed else weight


@contextmanager
def as_parameters(model: nn.Module) -> Iterator[None]:
    """Shows PEFT quantized experts as it knows them, for as long as it looks for targets: with
    3-D parameters, placeholders, in the place of modules, which `target_modules` would mean."""
    shown: list[tuple[HQQExperts, str, HQQExpertWeights]] = []
    for experts in [m for m in model.modules() if isinstance(m, HQQExperts)]:
        for key in PROJECTIONS:
            weights = experts._modules.get(key)
            if isinstance(weights, HQQExpertWeights):
                shown.append((experts, key, weights))
    try:
        for experts, key, weights in shown:
            del experts._modules[key]
            parameter = nn.Parameter(placeholder(experts, weights), requires_grad=False)
            parameter.stands_for_codes = True  # type: ignore[attr-defined]
            experts._parameters[key] = parameter
        yield
    finally:
        for experts, key, weights in shown:
            experts.put(key, weights)


def is_shown(parameter: object) -> bool:
    """Whether `parameter` is one of the placeholders of `as_parameters`."""
    return getattr(parameter, "stands_for_codes", False)
