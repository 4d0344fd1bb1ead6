"""How PEFT names the adapters of 3-D parameters in its files, and the way back.

PEFT wraps an experts module once for each parameter that has an adapter, in the order in which
the module has them; the last wrapper is the outermost. So with both projections adapted::

    ...experts.base_layer.lora_A.weight    of gate_up_proj
    ...experts.lora_A.weight               of down_proj

and `target_parameters` in the configuration says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hqqlora.experts import PROJECTIONS, HQQExperts
from hqqlora.lora_experts import LoRAExpertWeights
from hqqlora.module_names import unwrapped

WRAPPED = ".base_layer"


def peft_names(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Names of adapted modules -> PEFT's names for them, which are others for experts."""
    names = {name: name for name in layers}
    for owner, keys in _by_owner(
        name for name, layer in layers.items() if isinstance(layer, LoRAExpertWeights)
    ).items():
        for depth, key in enumerate(reversed(keys)):
            names[f"{owner}.{key}"] = owner + WRAPPED * depth
    return names


def own_names(
    model: nn.Module, stored: Iterable[str], config: Mapping[str, Any]
) -> dict[str, str]:
    """The names in a PEFT file -> those of the modules of `model` that they are for."""
    experts = {
        unwrapped(name): module
        for name, module in model.named_modules()
        if isinstance(module, HQQExperts)
    }
    targets = tuple(config.get("target_parameters") or ())
    names = {}
    for name in stored:
        owner = name
        while owner.endswith(WRAPPED):
            owner = owner.removesuffix(WRAPPED)
        names[name] = name
        if owner not in experts:
            continue
        full = [f"{owner}.{key}" for key in PROJECTIONS]
        keys = [key for key in full if key in targets or key.endswith(_dotted(targets))]
        depth = (len(name) - len(owner)) // len(WRAPPED)
        if depth >= len(keys):
            raise ValueError(
                f"{name}: target_parameters={list(targets)} means {len(keys)} parameters of "
                f"{owner}, too few for the adapters in the file"
            )
        names[name] = keys[-1 - depth]
    if targets and names == {name: name for name in names}:
        raise ValueError(
            f"target_parameters={list(targets)} means no quantized experts of the model that "
            f"the file has an adapter for"
        )
    return names


def target_parameters(layers: Mapping[str, nn.Module]) -> list[str]:
    """PEFT's `target_parameters` for the adapted experts among `layers`."""
    names = [name for name, layer in layers.items() if isinstance(layer, LoRAExpertWeights)]
    tails = {name: ".".join(name.split(".")[-2:]) for name in names}
    owners = _by_owner(names)
    # Short names, if each experts module has the same adapted.
    if len({tuple(keys) for keys in owners.values()}) > 1:
        return sorted(names)
    return sorted(set(tails.values()))


def _dotted(targets: Iterable[str]) -> tuple[str, ...]:
    return tuple("." + target for target in targets)


def _by_owner(names: Iterable[str]) -> dict[str, list[str]]:
    """Experts module -> its adapted projections, in its order."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        owners.setdefault(owner, []).append(key)
    return {owner: sorted(keys, key=PROJECTIONS.index) for owner, keys in owners.items()}
