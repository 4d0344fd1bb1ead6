"""Little quantized models for PEFT, their dense twins, and what runs inside of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hqqlora


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> nn.Module:
    """A random dense Llama of two layers, with biases in attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_bias": True,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config})).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    return model


def tiny_quantized(
    dtype: torch.dtype = torch.float32, seed: int = 0, quant: Any = None, **config: Any
) -> nn.Module:
    """`tiny_llama`, quantized to 4 bits with groups of 32."""
    quant = quant or hqqlora.BaseQuantizeConfig(nbits=4, group_size=32)
    return hqqlora.quantize_model(tiny_llama(dtype, seed, **config), quant, progress=False)


def dense_twin(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with nn.Linear layers that have the dequantized weights."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, hqqlora.HQQLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            dense.weight.data = layer.dequantize(torch.float32)
            if layer.bias is not None:
                dense.bias.data = layer.bias.data
            parent, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, dense)
    return twin.to(dtype)


def fill_adapters(model: nn.Module, std: float = 0.1, seed: int = 1) -> nn.Module:
    """Random numbers for the B, bias and magnitude of every adapter: they start at nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Gives `target` the adapters of `source`, in its own dtype."""
    values = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if "lora_" in name:
                parameter.copy_(values[name])


def token_ids(batch: int = 2, length: int = 12, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (batch, length), generator=generator)


def adapter_layer(model: nn.Module, name: str = "q_proj", layer: int = 0) -> Any:
    """One of PEFT's layers in a Llama."""
    found = [m for n, m in model.named_modules() if n.endswith(name) and f".{layer}." in n]
    assert len(found) == 1
    return found[0]


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.elements: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        space, _, name = function.name().partition("::")
        if space == "hqqlora":
            self.counts[name.partition(".")[0]] += 1
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function.is_view:
            self.elements.append(result.numel())
        return result


@contextmanager
def operations() -> Iterator[_Operations]:
    """Counts calls of hqqlora's operators, and how many elements each tensor made has."""
    with _Operations() as mode:
        yield mode


def is_fused(call: Callable[[], Tensor]) -> bool:
    """Whether a layer's forward is one operation with the adapter in it."""
    with operations() as seen:
        call()
    return dict(seen.counts) == {"lora_linear": 1}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    actual, exact = actual.detach().double(), exact.detach().double()
    return float((actual - exact).norm() / exact.norm())
