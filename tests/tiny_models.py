"""Tiny random models of several architectures, one function each, and inputs to run them with.

Every width is a multiple of 32, so that group sizes up to 32 divide every row and 64 every
weight. Options are those of the architecture's configuration::

    tiny_llama(num_hidden_layers=1, tie_word_embeddings=True)
    tiny_bert(transformers.BertForMaskedLM)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "t5", "bert", "vit")

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama(model_class: type | None = None, **config: Any) -> Any:
    """Causal; no biases unless attention_bias or mlp_bias is set."""
    import transformers

    settings = transformers.LlamaConfig(**{**_DECODER, **config})
    return _random(model_class or transformers.LlamaForCausalLM, settings)


def tiny_qwen2(model_class: type | None = None, **config: Any) -> Any:
    """Causal; q, k and v have biases; embeddings are tied."""
    import transformers

    shape = {**_DECODER, "tie_word_embeddings": True}
    del shape["head_dim"]
    settings = transformers.Qwen2Config(**{**shape, **config})
    return _random(model_class or transformers.Qwen2ForCausalLM, settings)


def tiny_qwen3(model_class: type | None = None, **config: Any) -> Any:
    """Causal; embeddings are tied."""
    import transformers

    settings = transformers.Qwen3Config(**{**_DECODER, "tie_word_embeddings": True, **config})
    return _random(model_class or transformers.Qwen3ForCausalLM, settings)


def tiny_mistral(model_class: type | None = None, **config: Any) -> Any:
    """Causal, with a sliding window."""
    import transformers

    settings = transformers.MistralConfig(**{**_DECODER, "sliding_window": 16, **config})
    return _random(model_class or transformers.MistralForCausalLM, settings)


def tiny_gemma(model_class: type | None = None, **config: Any) -> Any:
    """Causal; embeddings are tied."""
    import transformers

    settings = transformers.GemmaConfig(**{**_DECODER, "tie_word_embeddings": True, **config})
    return _random(model_class or transformers.GemmaForCausalLM, settings)


def tiny_t5(model_class: type | None = None, **config: Any) -> Any:
    """Encoder and decoder; reads a linear layer's weight.dtype; embeddings are tied."""
    import transformers

    shape = {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    settings = transformers.T5Config(**{**shape, **config})
    return _random(model_class or transformers.T5ForConditionalGeneration, settings)


def tiny_bert(model_class: type | None = None, **config: Any) -> Any:
    """Encoder with a classifier; every linear layer has a bias."""
    import transformers

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "num_labels": 4,
    }
    settings = transformers.BertConfig(**{**shape, **config})
    return _random(model_class or transformers.BertForSequenceClassification, settings)


def tiny_vit(model_class: type | None = None, **config: Any) -> Any:
    """Vision encoder with a classifier."""
    import transformers

    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "initializer_range": 0.2,
        "num_labels": 4,
    }
    settings = transformers.ViTConfig(**{**shape, **config})
    return _random(model_class or transformers.ViTForImageClassification, settings)


def tiny_mixtral(model_class: type | None = None, **config: Any) -> Any:
    """Causal; every layer has four experts, of which each token takes two."""
    import transformers

    settings = transformers.MixtralConfig(**{**_DECODER, "num_local_experts": 4, **config})
    return _random(model_class or transformers.MixtralForCausalLM, settings)


def tiny_qwen2_moe(model_class: type | None = None, **config: Any) -> Any:
    """Causal; layer 0 has six experts and a shared one, layer 1 is dense."""
    import transformers

    experts = {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
        "mlp_only_layers": [1],
    }
    settings = transformers.Qwen2MoeConfig(**{**_DECODER, **experts, **config})
    return _random(model_class or transformers.Qwen2MoeForCausalLM, settings)


def tiny_qwen3_moe(model_class: type | None = None, **config: Any) -> Any:
    """Causal; every layer has eight experts."""
    import transformers

    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    settings = transformers.Qwen3MoeConfig(**{**_DECODER, **experts, **config})
    return _random(model_class or transformers.Qwen3MoeForCausalLM, settings)


def tiny_gpt_oss(model_class: type | None = None, **config: Any) -> Any:
    """Causal; experts in layers whose weights are transposed and interleaved, with biases."""
    import transformers

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
    settings = transformers.GptOssConfig(**{**_DECODER, **experts, **config})
    return _random(model_class or transformers.GptOssForCausalLM, settings)


def tiny_llava() -> Any:
    """A language model that sees: CLIP before a Llama of one layer."""
    import transformers

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text)
    return transformers.LlavaForConditionalGeneration(config)


def tiny_model(family: str, **config: Any) -> Any:
    """The tiny model of one of FAMILIES."""
    return globals()[f"tiny_{family}"](**config)


def save_tiny(model: Any, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Saves a dense model as a Hugging Face folder, in `dtype` if one is given."""
    (model if dtype is None else model.to(dtype)).save_pretrained(folder)
    return folder


def quantized_tiny(
    folder: Path, dense: Any, config: Any = None, dtype: torch.dtype | None = None
) -> Any:
    """`dense` through a checkpoint in `folder` and from_pretrained; 4 bits in groups of 32
    unless `config` says otherwise."""
    from hqqlora.transformers import HqqConfig

    save_tiny(dense, folder / "dense", dtype)
    config = config or HqqConfig(nbits=4, group_size=32)
    return type(dense).from_pretrained(folder / "dense", quantization_config=config)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """Saves a model and returns the folder."""
    model.save_pretrained(folder, **options)
    return folder


def inputs_for(model: Any, batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    """Inputs for a forward pass of any of the models."""
    generator = torch.Generator().manual_seed(1)
    kind = model.config.model_type
    if kind == "vit":
        shape = (batch, 3, model.config.image_size, model.config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if kind == "t5":
        inputs["decoder_input_ids"] = tokens[:, :3]
    return inputs


def linear_names(model: nn.Module) -> list[str]:
    """The names of all linear layers, dense or not."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _random(model_class: type, settings: Any) -> Any:
    torch.manual_seed(0)
    return model_class(settings).eval()


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    """Equal in the kinds of modules, and in dtype and every bit of all tensors; of quantized
    layers also in format."""
    from hqqlora import HQQLinear

    kinds = [[(name, type(m)) for name, m in model.named_modules()] for model in (a, b)]
    assert kinds[0] == kinds[1]
    mine, other = a.state_dict(), b.state_dict()
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key
    for layer, same in zip(a.modules(), b.modules(), strict=True):
        if isinstance(layer, HQQLinear):
            assert layer.quant_config == same.quant_config  # type: ignore[union-attr]
            assert layer.compute_dtype == same.compute_dtype  # type: ignore[union-attr]


def early_transformers() -> bool:
    """Whether this is one of the first versions of transformers 5, which convert what they
    offload to the model's dtype and, loading quantized, take weights of any shape."""
    import inspect

    from transformers.integrations.accelerate import accelerate_disk_offload

    return "dtype" in inspect.signature(accelerate_disk_offload).parameters


def quantized_names(model: nn.Module) -> list[str]:
    """The names of all quantized layers."""
    from hqqlora import HQQLinear

    return [name for name, module in model.named_modules() if isinstance(module, HQQLinear)]
