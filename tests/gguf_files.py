"""Little GGUF models, written with gguf alone, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

TYPES = gguf.GGMLQuantizationType
# Where the fp16 numbers are in a block.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
}
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS, VOCABULARY = 256, 512, 4, 2, 2, 258


def random_blocks(kind: str, N: int, K: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks with every bit random but those of the fp16 numbers, which are small."""
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    blocks = rng.integers(0, 256, (N * K // block, size), dtype=np.uint8)
    spread = 0.2 / 2 ** {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}.get(kind, 8)
    for start in HALVES[kind]:
        halves = rng.normal(0, spread, len(blocks)).astype(np.float16)
        blocks[:, start : start + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(N, -1)


def byte_tokens() -> list[str]:
    """A special token, the bytes, and one that is merged from two."""
    from tokenizers import pre_tokenizers

    return ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(byte_tokens())}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def write_model(
    path: Path,
    kind: str = "Q4_1",
    architecture: str = "llama",
    tied: bool = True,
    seed: int = 0,
    extra: dict[str, np.ndarray] | None = None,
    **numbers: Any,
) -> Path:
    """A random model of two layers whose linear layers are of type `kind`.

    `numbers` are added to what the file says under its architecture; `extra` to its tensors.
    """
    rng = np.random.default_rng(seed)
    head = numbers.get("attention.key_length", HIDDEN // HEADS)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.type", "model")
    writer.add_string("general.name", "tiny")
    settings = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": head,
        "vocab_size": VOCABULARY,
        **numbers,
    }
    for key, value in settings.items():
        types = gguf.GGUFValueType
        of_type = {int: types.UINT32, float: types.FLOAT32, str: types.STRING}[type(value)]
        writer.add_key_value(f"{architecture}.{key}", value, of_type)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "gpt-2")
    writer.add_array("tokenizer.ggml.tokens", byte_tokens())
    writer.add_array("tokenizer.ggml.token_type", [3] + [1] * (VOCABULARY - 1))
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)

    def dense(name: str, *shape: int, mean: float = 0.0) -> None:
        writer.add_tensor(name, rng.normal(mean, 0.1, shape).astype(np.float32))

    def linear(name: str, N: int, K: int) -> None:
        if kind in ("F32", "F16"):
            dtype = np.float32 if kind == "F32" else np.float16
            writer.add_tensor(name, rng.normal(0, 0.1, (N, K)).astype(dtype))
        else:
            writer.add_tensor(name, random_blocks(kind, N, K, rng), raw_dtype=TYPES[kind])

    dense("token_embd.weight", VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        block = f"blk.{i}."
        dense(block + "attn_norm.weight", HIDDEN, mean=1.0)
        dense(block + "ffn_norm.weight", HIDDEN, mean=1.0)
        linear(block + "attn_q.weight", HEADS * head, HIDDEN)
        linear(block + "attn_k.weight", KV_HEADS * head, HIDDEN)
        linear(block + "attn_v.weight", KV_HEADS * head, HIDDEN)
        linear(block + "attn_output.weight", HIDDEN, HEADS * head)
        linear(block + "ffn_gate.weight", INTERMEDIATE, HIDDEN)
        linear(block + "ffn_up.weight", INTERMEDIATE, HIDDEN)
        linear(block + "ffn_down.weight", HIDDEN, INTERMEDIATE)
        if architecture == "qwen2":
            dense(block + "attn_q.bias", HEADS * head)
            dense(block + "attn_k.bias", KV_HEADS * head)
            dense(block + "attn_v.bias", KV_HEADS * head)
        if architecture == "qwen3":
            dense(block + "attn_q_norm.weight", head, mean=1.0)
            dense(block + "attn_k_norm.weight", head, mean=1.0)
    dense("output_norm.weight", HIDDEN, mean=1.0)
    if not tied:
        linear("output.weight", VOCABULARY, HIDDEN)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense_model(path: Path) -> Any:
    """What transformers itself loads from a file: the dequantized model, float32."""
    import transformers

    arguments: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        local_files_only=True,
        **arguments,
    ).eval()


def file_tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}


def tokens() -> torch.Tensor:
    return torch.arange(1, 25).reshape(2, 12) * 9
