"""What GGUF's model architectures and transformers' models call the same things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqqlora.gguf.container import GGUFFile, import_gguf
from hqqlora.module_names import unwrapped


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures."""

    name: str
    model_types: tuple[str, ...]
    """transformers' model types that are stored as this."""
    interleaves_heads: bool
    """Whether the rows of q and k are stored in another order: transformers rotates the two
    halves of a head against each other, llama.cpp, for this architecture, neighbours."""


ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), True),
    Architecture("qwen2", ("qwen2",), False),
    Architecture("qwen3", ("qwen3",), False),
)


def architecture_of_file(file: GGUFFile) -> Architecture:
    """The architecture a file says it is of.

    Raises:
        ValueError: it holds no model, or one of another architecture.
    """
    kind = file.value("general.type", "model")
    if kind != "model":
        raise ValueError(f"{file.path} holds a GGUF {kind!r}, not a model")
    name = file.value("general.architecture")
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    raise ValueError(
        f"{file.path} is of architecture {name!r}; supported are "
        f"{', '.join(a.name for a in ARCHITECTURES)}"
    )


def architecture_of_config(config: Any) -> Architecture:
    """The architecture that a transformers model with this configuration is stored as.

    Raises:
        ValueError: there is none.
    """
    model_type = getattr(config, "model_type", None)
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(t for a in ARCHITECTURES for t in a.model_types)
    raise ValueError(f"a {model_type!r} model cannot be stored as GGUF; supported are {known}")


def tensor_names(architecture: Architecture, layers: int) -> Callable[[str], str | None]:
    """A function from the name of a module's parameter to GGUF's name; None if it has none."""
    gguf = import_gguf()
    (arch,) = (a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture.name)
    names = gguf.get_tensor_name_map(arch, layers)

    def translate(parameter: str) -> str | None:
        module, _, kind = plain_name(parameter).rpartition(".")
        name = names.get_name(module) if kind in ("weight", "bias") else None
        return None if name is None else f"{name}.{kind}"

    return translate


def plain_name(name: str) -> str:
    """A module's name without the wrappers that adapters, compilation and so on put around it
    or its parents."""
    return ".".join(part for part in unwrapped(name).split(".") if part != "base_layer")


def row_order(
    architecture: Architecture, tensor: str, config: Any
) -> Callable[[Tensor], Tensor] | None:
    """How transformers orders the rows [N, ...] of the tensor that GGUF calls `tensor`; None if
    as GGUF does. `stored_order` is the way back."""
    heads = _interleaved_heads(architecture, tensor, config)
    if heads is None:
        return None
    return lambda rows: _transposed(rows, heads, (-1, 2))


def stored_order(
    architecture: Architecture, tensor: str, config: Any
) -> Callable[[Tensor], Tensor] | None:
    """How GGUF orders the rows of a tensor of transformers' model."""
    heads = _interleaved_heads(architecture, tensor, config)
    if heads is None:
        return None
    return lambda rows: _transposed(rows, heads, (2, -1))


def _interleaved_heads(architecture: Architecture, tensor: str, config: Any) -> int | None:
    role = tensor.split(".")[-2]
    if not architecture.interleaves_heads or role not in ("attn_q", "attn_k"):
        return None
    heads: int = config.num_attention_heads if role == "attn_q" else config.num_key_value_heads
    return heads


def _transposed(rows: Tensor, heads: int, sides: tuple[int, int]) -> Tensor:
    """Takes the rows of each head for a matrix of these sides, and transposes it."""
    N = rows.size(0)
    order = torch.arange(N, device=rows.device).reshape(heads, *sides).mT.reshape(N)
    return rows[order]
