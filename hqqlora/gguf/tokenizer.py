"""A tokenizer as GGUF's values: copied from another GGUF file, or from a byte-level BPE one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hqqlora.gguf.container import GGUFFile, Value

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# The expressions by which tokenizers cut text into words, and llama.cpp's names for them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_NAMES = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}


def tokenizer_values(tokenizer: Any, vocab_size: int) -> dict[str, Value]:
    """The values under "tokenizer." for a file.

    Args:
        tokenizer: the path of a GGUF file of the same model, or a fast tokenizer of
            transformers' whose model is byte-level BPE.
        vocab_size: the rows of the embedding: unused tokens are added up to it.

    Raises:
        ValueError: the tokenizer is of another kind, or has more tokens than the model.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        return _copied(GGUFFile(tokenizer), vocab_size)
    return _converted(tokenizer, vocab_size)


def _copied(file: GGUFFile, vocab_size: int) -> dict[str, Value]:
    values = {key: file.entry(key) for key in file.own_keys() if key.startswith("tokenizer.")}
    tokens = values.get("tokenizer.ggml.tokens")
    if tokens is None or len(tokens.value) != vocab_size:
        count = "no" if tokens is None else len(tokens.value)
        raise ValueError(f"{file.path} has {count} tokens, the model {vocab_size}")
    return values


def _converted(tokenizer: Any, vocab_size: int) -> dict[str, Value]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"a {type(tokenizer).__name__} cannot be stored as GGUF: give a fast tokenizer, or "
            f"the path of a GGUF file of the same model"
        )
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = (
            f"{model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}"
        )
        raise ValueError(
            f"only byte-level BPE tokenizers can be stored as GGUF, and this one's model is "
            f"{kind}; give the path of a GGUF file of the same model instead"
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if not merges:
        raise ValueError("a tokenizer without merges cannot be stored as GGUF")
    tokens, types = _tokens(tokenizer, vocab_size)
    values = {
        "tokenizer.ggml.model": Value("STRING", "gpt2"),
        "tokenizer.ggml.pre": Value("STRING", _word_splitter(parts.get("pre_tokenizer"))),
        "tokenizer.ggml.tokens": Value("ARRAY", tokens),
        "tokenizer.ggml.token_type": Value("ARRAY", types),
        "tokenizer.ggml.merges": Value("ARRAY", merges),
        "tokenizer.ggml.add_bos_token": Value("BOOL", _adds_bos(tokenizer)),
    }
    for key, attribute in (
        ("bos", "bos_token_id"),
        ("eos", "eos_token_id"),
        ("unknown", "unk_token_id"),
        ("padding", "pad_token_id"),
    ):
        token = getattr(tokenizer, attribute, None)
        if token is not None:
            values[f"tokenizer.ggml.{key}_token_id"] = Value("UINT32", int(token))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and template:
        values["tokenizer.chat_template"] = Value("STRING", template)
    return values


def _tokens(tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has a token {largest}, the model only {vocab_size} tokens"
        )
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, _NORMAL
    for i, token in tokenizer.added_tokens_decoder.items():
        types[i] = _CONTROL if token.special else _USER_DEFINED
    return tokens, types


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def _word_splitter(pre_tokenizer: Any) -> str:
    """llama.cpp's name for how a tokenizer cuts text into words before it looks for tokens."""
    steps = [pre_tokenizer] if pre_tokenizer else []
    if steps and steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step.get("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel":
        words = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and words and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not words:
            expression = steps[0].get("pattern", {}).get("Regex")
            if expression in _SPLIT_NAMES:
                return _SPLIT_NAMES[expression]
    raise ValueError(
        f"this tokenizer cuts text into words in a way that has no name here (steps {kinds}); "
        f"give the path of a GGUF file of the same model instead"
    )


def source_of(model: Any) -> Path | None:
    """The GGUF file that `load_gguf` has read the model from, if it is still there."""
    path = getattr(model, "gguf_path", None)
    return Path(path) if path is not None and os.path.isfile(path) else None
