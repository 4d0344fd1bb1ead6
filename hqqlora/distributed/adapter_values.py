"""What adapters begin with that were made without data: the same numbers on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hqqlora.lora import LoRALinear


@dataclass(frozen=True)
class NewAdapter:
    """The parameters of one adapter: the names in the model, and who has them under which
    attribute. `reset` initialises them."""

    parameters: dict[str, tuple[nn.Module, str]]
    reset: Callable[[Any], None]

    @torch.no_grad()
    def values(self, init_lora_weights: bool | str) -> dict[str, Tensor]:
        """Name -> the whole initial value, on the CPU."""
        held = {name: owner._parameters[a] for name, (owner, a) in self.parameters.items()}
        drawn: dict[str, Tensor] = {}
        try:
            for name, (owner, attribute) in self.parameters.items():
                like = held[name]
                assert like is not None
                drawn[name] = torch.empty(like.shape, dtype=like.dtype)
                owner._parameters[attribute] = nn.Parameter(drawn[name])
            self.reset(init_lora_weights)
        finally:
            for name, (owner, attribute) in self.parameters.items():
                owner._parameters[attribute] = held[name]
        return drawn


def new_adapters(model: nn.Module, names: Iterable[str]) -> list[NewAdapter]:
    """The adapters that the parameters `names` of `model` belong to, in the model's order.

    Raises:
        ValueError: one belongs to none that is known here; names it.
    """
    wanted = set(names)
    found: list[NewAdapter] = []
    for module_name, module in model.named_modules():
        for adapter in _adapters_of(module, module_name):
            parameters = {n: p for n, p in adapter.parameters.items() if n in wanted}
            wanted -= parameters.keys()
            if parameters:
                found.append(NewAdapter(parameters, adapter.reset))
    if wanted:
        raise ValueError(
            f"{', '.join(sorted(wanted))}: neither in the checkpoint nor a LoRA factor that "
            f"can be initialised here; add it after the model has data"
        )
    return found


def _adapters_of(module: nn.Module, name: str) -> Iterator[NewAdapter]:
    if isinstance(module, LoRALinear):
        own: dict[str, tuple[nn.Module, str]] = {
            f"{name}.{a}": (module, a) for a, _ in module.named_parameters(recurse=False)
        }
        yield NewAdapter(own, module.reset_lora_parameters)
        return
    if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
        return
    layer: Any = module  # PEFT's
    for adapter in layer.lora_A:
        owned: dict[str, tuple[nn.Module, str]] = {}
        for factor in ("lora_A", "lora_B"):
            linear = getattr(layer, factor)[adapter]
            for attribute, _ in linear.named_parameters(recurse=False):
                owned[f"{name}.{factor}.{adapter}.{attribute}"] = (linear, attribute)

        def reset(init: Any, adapter: str = adapter) -> None:
            layer.reset_lora_parameters(adapter, init)

        yield NewAdapter(owned, reset)


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """The CPU's random numbers are those of the first rank of the mesh that shares `model`;
    afterwards each rank goes on with its own."""
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    with torch.random.fork_rng(devices=[]):
        if mesh is not None:
            state = torch.get_rng_state().to(mesh.device_type)
            for dim in range(mesh.ndim):
                dist.broadcast(state, group=mesh.get_group(dim), group_src=0)
            torch.set_rng_state(state.cpu())
        yield
