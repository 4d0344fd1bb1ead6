"""Loads a saved HQQ checkpoint by vLLM's rules, without vLLM.

These are the rules of the versions of vLLM that have the method "hqq" (hqq_marlin.py, with the
parameter and linear classes it uses), for models built like Llama on one device:

1. ``config.json`` has "quantization_config" with "quant_method", "quant_config", nested with
   "weight_quant_params", and "skip_modules" (which may be null). Other keys are not looked at.
2. Only 4 bits in groups of 64. The axis is not looked at: codes along axis 0 would load, and be
   wrong.
3. q, k and v are one layer, and so are gate and up. A layer stays dense if one of the
   dot-separated parts of its name, which is the fused name, is an entry of skip_modules; so it
   is quantized as a whole or not at all. Embeddings and lm_head stay dense.
4. A quantized layer has the parameters W_q, scale, zero (and bias), and sixteen more that are
   there to be ignored. A tensor with another name is an error, but for names ending in
   ".bias", rotary frequencies, and lm_head where it is tied. What the checkpoint lacks is not
   noticed: the parameter keeps what was in memory.
5. W_q is unpacked as hqq packs it (upper four bits of all words, then the lower four), made
   [out, in], transposed, and packed along `in`, eight codes an int32, the first in the lowest
   bits. It must be of integers: `view_as_float` fails.
6. scale and zero are made [out, in / 64].
7. Each part goes to its place in the fused parameter; what is too small is an error, and of
   what is too large the beginning is taken without a word.
8. The kernel wants `in` to be a multiple of 64 and the fused `out`, too.

Where vLLM would load nonsense without noticing, this raises as it does for its errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

BITS, GROUP_SIZE, CODES_PER_WORD = 4, 64, 8
IGNORED = (
    "axis",
    "channel_wise",
    "compute_dtype",
    "encoded_state_dict",
    "group_size",
    "nbits",
    "offload_meta",
    "optimize",
    "packing",
    "quant_scale",
    "quant_zero",
    "round_zero",
    "shape",
    "stores_quant_config",
    "unpack_view_dtype",
    "view_as_float",
)
ROTARY = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class BrokenRuleError(ValueError):
    """vLLM would raise, or load something else than what was saved."""


@dataclass
class Layer:
    """A linear layer of vLLM's: one or more layers of the checkpoint, one below the other."""

    name: str
    in_features: int
    parts: dict[str, int]  # name in the checkpoint -> out_features
    has_bias: bool
    quantized: bool = True
    parameters: dict[str, Tensor] = field(default_factory=dict)
    loaded: set[tuple[str, str]] = field(default_factory=set)

    @property
    def out_features(self) -> int:
        return sum(self.parts.values())

    def rows(self, part: str) -> slice:
        """Where the outputs of a part are."""
        names = list(self.parts)
        start = sum(self.parts[name] for name in names[: names.index(part)])
        return slice(start, start + self.parts[part])

    def create(self, dtype: torch.dtype) -> None:
        """Makes the parameters."""
        N, K = self.out_features, self.in_features
        if self.has_bias:
            self.parameters["bias"] = torch.empty(N, dtype=dtype)
        if not self.quantized:
            self.parameters["weight"] = torch.empty(N, K, dtype=dtype)
            return
        require(K % GROUP_SIZE == 0 and N % 64 == 0, f"{self.name} is [{N}, {K}]")
        self.parameters["W_q"] = torch.empty(K // CODES_PER_WORD, N, dtype=torch.int32)
        for name in ("scale", "zero"):
            self.parameters[name] = torch.empty(N, K // GROUP_SIZE, dtype=dtype)

    def load(self, part: str, key: str, tensor: Tensor) -> None:
        where = f"{part} of {self.name}: {key}"
        if self.quantized and key in IGNORED:
            return
        if key not in self.parameters:
            require(key == "bias", f"{where} is no parameter")
            return
        self.loaded.add((part, key))
        rows, K = self.parts[part], self.in_features
        if key == "W_q":
            codes = unpacked(tensor, where)
            require(codes.numel() == rows * K, f"{where} has {codes.numel()} codes")
            words = packed_for_marlin(codes.reshape(rows, K).T)
            self.parameters["W_q"][:, self.rows(part)] = words
            return
        place = self.parameters[key][self.rows(part)]
        require(tensor.is_floating_point(), f"{where} is {tensor.dtype}")
        if key in ("scale", "zero"):
            require(tensor.numel() == place.numel(), f"{where} is {list(tensor.shape)}")
            tensor = tensor.reshape(place.shape)
        require(tensor.shape == place.shape, f"{where} is {list(tensor.shape)}")
        place.copy_(tensor)

    def weight(self) -> Tensor:
        """The dense [out, in] weight that the kernel multiplies with."""
        if not self.quantized:
            return self.parameters["weight"]
        scale, zero = (
            self.parameters[name].T.repeat_interleave(GROUP_SIZE, 0)
            for name in ("scale", "zero")
        )
        words = self.parameters["W_q"]
        codes = torch.stack([words >> 4 * i & 15 for i in range(CODES_PER_WORD)], 1)
        return ((codes.reshape(-1, self.out_features) - zero) * scale).T


def require(condition: bool, problem: str) -> None:
    if not condition:
        raise BrokenRuleError(problem)


def unpacked(W_q: Tensor, where: str) -> Tensor:
    require(W_q.dtype == torch.uint8, f"{where} is {W_q.dtype}")
    require(W_q.dim() == 2, f"{where} is {list(W_q.shape)}")
    return torch.cat((W_q >> 4, W_q & 15))


def packed_for_marlin(codes: Tensor) -> Tensor:
    """[in, out] codes -> [in / 8, out] int32."""
    eight = codes.to(torch.int64).reshape(-1, CODES_PER_WORD, codes.shape[1])
    words = sum(eight[:, i] << 4 * i for i in range(CODES_PER_WORD))
    assert isinstance(words, Tensor)
    return words.to(torch.int32)  # the highest bit becomes the sign


# ---- the model ---------------------------------------------------------------------------


def quantization(config: dict[str, Any]) -> list[str] | None:
    """Checks the configuration and returns skip_modules."""
    settings = config.get("quantization_config")
    require(isinstance(settings, dict), "config.json has no quantization_config")
    require(settings.get("quant_method") == "hqq", "quant_method is not hqq")
    weight = settings.get("quant_config", {}).get("weight_quant_params")
    require(isinstance(weight, dict), "quant_config has no weight_quant_params")
    require("skip_modules" in settings, "quantization_config has no skip_modules")
    require(weight.get("nbits") == BITS, f"nbits is {weight.get('nbits')}")
    require(weight.get("group_size") == GROUP_SIZE, f"group_size is {weight.get('group_size')}")
    require(weight.get("axis") == 1, f"axis is {weight.get('axis')}")
    skip_modules: list[str] | None = settings["skip_modules"]
    return skip_modules


def linear_layers(config: dict[str, Any]) -> Iterator[Layer]:
    """The linear layers of Llama, Mistral and Qwen2 as vLLM builds them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    q, kv = heads * width, config["num_key_value_heads"] * width
    qwen = config["architectures"] == ["Qwen2ForCausalLM"]
    attention_bias, mlp_bias = config.get("attention_bias", qwen), config.get("mlp_bias", False)
    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        yield Layer(f"{attention}.qkv_proj", hidden, parts, attention_bias)
        o_bias = attention_bias and not qwen
        yield Layer(f"{attention}.o_proj", q, {"o_proj": hidden}, o_bias)
        parts = {"gate_proj": inner, "up_proj": inner}
        yield Layer(f"{mlp}.gate_up_proj", hidden, parts, mlp_bias)
        yield Layer(f"{mlp}.down_proj", inner, {"down_proj": hidden}, mlp_bias)


def other_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (hidden,)
    return shapes


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    tensors: dict[str, Tensor] = {}
    for file in sorted(files):
        tensors.update(load_file(folder / file))
    return tensors


def load_as_vllm(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Layer]:
    """The linear layers of vLLM's model, loaded from the checkpoint in `folder`.

    Raises:
        BrokenRuleError: vLLM would raise, or its model would be another one.
    """
    config = json.loads((folder / "config.json").read_text())
    skip_modules = quantization(config)
    layers: dict[str, Layer] = {}
    owner: dict[str, tuple[Layer, str]] = {}
    for layer in linear_layers(config):
        layer.quantized = not set(layer.name.split(".")).intersection(skip_modules or ())
        layer.create(dtype)
        layers[layer.name] = layer
        parent = layer.name.rpartition(".")[0]
        owner.update({f"{parent}.{part}": (layer, part) for part in layer.parts})
    others = other_shapes(config)
    for name, tensor in stored_tensors(folder).items():
        module, _, key = name.rpartition(".")
        tied_head = config.get("tie_word_embeddings", False) and module == "lm_head"
        if name.endswith(ROTARY) or tied_head:
            continue
        if module in owner:
            layer, part = owner[module]
            layer.load(part, key, tensor)
            continue
        require(name in others or key == "bias", f"{name} is no parameter")
        if name in others:
            shape = others.pop(name)
            require(tuple(tensor.shape) == shape, f"{name} is {list(tensor.shape)}")
    require(not others, f"the checkpoint lacks {sorted(others)}")
    for layer in layers.values():
        wanted = {(part, key) for part in layer.parts for key in layer.parameters}
        missing = sorted(f"{part}.{key}" for part, key in wanted - layer.loaded)
        require(not missing, f"{layer.name}: the checkpoint lacks {missing}")
    return layers
