"""The trained parameters of a quantized layer's adapters, and along what they are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hqqlora.linear import HQQLinear
from hqqlora.lora import LoRALinear


@dataclass(frozen=True)
class Factor:
    """One parameter: A, B or a bias behind B.

    `dim` is the dimension that is cut along, None if every rank has all of it. `scaling` tells
    how much of a bias is added at present: 0 if its adapter does not take part.
    """

    owner: nn.Module
    name: str
    dim: int | None
    is_bias: bool = False
    scaling: Callable[[], float] = lambda: 0.0

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that stands there now."""
        found = self.owner._parameters[self.name]
        assert found is not None
        return found

    def put(self, tensor: Tensor | None) -> None:
        """Puts another tensor in its place, be it no parameter."""
        self.owner._parameters[self.name] = tensor  # type: ignore[assignment]


def factors_of(layer: nn.Module, dim: int) -> list[Factor]:
    """The factors of a layer whose weight [N, K] is cut along `dim`.

    Raises:
        ValueError: the layer is of another class, merged, or has an adapter that is not a plain
            LoRA (or, where dim is 0, DoRA).
    """
    if isinstance(layer, HQQLinear):
        return []
    if isinstance(layer, LoRALinear):
        return _of_lora_linear(layer, dim)
    if type(layer).__name__ == "HQQLoraLinear":
        return _of_peft_layer(layer, dim)
    raise ValueError(
        f"a {type(layer).__name__} around a quantized layer cannot be made tensor-parallel"
    )


def _of_lora_linear(layer: LoRALinear, dim: int) -> list[Factor]:
    _refuse_merged(layer.merged)

    def scaling() -> float:
        return layer.scaling if layer.enabled else 0.0

    factors = [
        Factor(layer, "lora_A", None if dim == 0 else 1),
        Factor(layer, "lora_B", 0 if dim == 0 else None),
    ]
    if layer.lora_bias is not None:
        factors.append(Factor(layer, "lora_bias", 0 if dim == 0 else None, True, scaling))
    return factors


def _of_peft_layer(layer: Any, dim: int) -> list[Factor]:
    _refuse_merged(layer.merged)
    factors = []
    for name in layer.lora_A:
        variant = layer.lora_variant.get(name)
        if variant is not None and not (dim == 0 and name in layer.lora_magnitude_vector):
            raise ValueError(
                f"the adapter {name!r} is no plain LoRA ({type(variant).__name__}): row-wise "
                f"parallelism needs one, column-wise one or DoRA"
            )

        def scaling(name: str = name) -> float:
            used = not layer.disable_adapters and name in layer.active_adapters
            return float(layer.scaling[name]) if used else 0.0

        factors.append(Factor(layer.lora_A[name], "weight", None if dim == 0 else 1))
        factors.append(Factor(layer.lora_B[name], "weight", 0 if dim == 0 else None))
        if layer.lora_B[name].bias is not None:
            cut = 0 if dim == 0 else None
            factors.append(Factor(layer.lora_B[name], "bias", cut, True, scaling))
        if variant is not None:
            factors.append(Factor(layer.lora_magnitude_vector[name], "weight", 0))
    return factors


def _refuse_merged(merged: bool) -> None:
    if merged:
        raise ValueError("a merged adapter cannot be made tensor-parallel: unmerge it first")
