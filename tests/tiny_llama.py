"""A random Llama of 0.1 M parameters with a byte tokenizer, saved as a Hugging Face folder, and
a text that it can learn something from."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny_llama(folder: Path, **config) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    shape = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **config})).save_pretrained(folder)
    return folder


def save_model_and_text(folder: Path, lines: int) -> Path:
    """What a run of training starts from, as folder/model and folder/text.txt."""
    save_tiny_llama(folder / "model")
    (folder / "text.txt").write_text(patterned_text(lines))
    return folder


def patterned_text(lines: int) -> str:
    return "".join(f"{i % 7} times {i % 5} is {(i % 7) * (i % 5)}.\n" for i in range(lines))
