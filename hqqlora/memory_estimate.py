"""What fine-tuning a Llama takes of memory, by arithmetic alone: before there is a model.

The kinds are those of `hqqlora.memory`, and so are the numbers: a test compares them. As a
script, ``python -m hqqlora.memory_estimate`` prints the tables of docs/memory.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hqqlora.memory import LayerMemory
from hqqlora.ops import meta_shape
from hqqlora.planes import codes_layout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama, or of a model with its layers."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    """Whether the output layer's weight is that of the embeddings."""

    @staticmethod
    def from_config(config: Any) -> LlamaShape:
        """That of a transformers.LlamaConfig."""
        return LlamaShape(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
            config.tie_word_embeddings,
        )

    def linear_layers(self) -> list[tuple[int, int]]:
        """out_features and in_features of a block's layers: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return [
            (q, self.hidden),
            (kv, self.hidden),
            (kv, self.hidden),
            (self.hidden, q),
            (self.intermediate, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]

    def parameters(self) -> int:
        """Of the dense model."""
        block = sum(N * K for N, K in self.linear_layers()) + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.blocks * block + embeddings + self.hidden


LLAMA_3 = {
    "8B": LlamaShape(4096, 14336, 32, 32, 8, 128, 128256),
    "70B": LlamaShape(8192, 28672, 80, 64, 8, 128, 128256),
    "405B": LlamaShape(16384, 53248, 126, 128, 8, 128, 128256),
}


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is fine-tuned: every linear layer of its blocks quantized and adapted, by
    AdamW, sharded over `gpus` by FSDP2."""

    nbits: int = 4
    group_size: int = 64
    axis: int = 1
    rank: int = 16
    dtype_bytes: int = 2
    """Of an element of what stays dense, of scales and zeros, and of activations."""
    adapter_bytes: int = 4
    """Of an element of the adapters, their gradients and each of AdamW's two states."""
    gpus: int = 1

    def block(self, shape: LlamaShape) -> LayerMemory:
        """One block's share on a GPU, without activations."""
        parts = [self._linear(N, K) for N, K in shape.linear_layers()]
        norms = 2 * self._bytes((shape.hidden,), self.dtype_bytes)
        return sum(parts, LayerMemory(dense=norms))

    def rest(self, shape: LlamaShape) -> LayerMemory:
        """A GPU's share of embeddings, last norm and output layer."""
        embeddings = self._bytes((shape.vocabulary, shape.hidden), self.dtype_bytes)
        norm = self._bytes((shape.hidden,), self.dtype_bytes)
        return LayerMemory(dense=embeddings * (1 if shape.tied else 2) + norm)

    def model(self, shape: LlamaShape) -> LayerMemory:
        """All of a GPU's share, without activations."""
        return sum([self.block(shape)] * shape.blocks, self.rest(shape))

    def block_input(self, shape: LlamaShape, tokens: int) -> int:
        """Bytes that a checkpointed block keeps of so many tokens: its input."""
        return tokens * shape.hidden * self.dtype_bytes

    def _linear(self, N: int, K: int) -> LayerMemory:
        format_ = (N, K, self.nbits, self.group_size, self.axis)
        weight, word = codes_layout(format_, planes=True)
        meta = meta_shape(N, K, self.group_size, self.axis)
        adapters = [(self.rank, K), (N, self.rank)]
        trained = sum(self._bytes(shape, self.adapter_bytes) for shape in adapters)
        return LayerMemory(
            codes=self._bytes(weight, word.itemsize),
            scales=2 * self._bytes(meta, self.dtype_bytes),
            adapters=trained,
            gradients=trained,
            # and each parameter's count of steps, a float32
            optimizer=2 * trained + 4 * len(adapters),
        )

    def _bytes(self, shape: Shape, element: int) -> int:
        """Of the largest of the parts into which FSDP2 cuts a tensor: along its first
        dimension."""
        return math.ceil(shape[0] / self.gpus) * math.prod(shape[1:]) * element


# ---- the tables of docs/memory.md --------------------------------------------------------

_GPUS = 8
_TOKENS = 4096


def markdown_tables() -> tuple[str, str]:
    """Llama 3 of three sizes on 8 GPUs, in GB: what is held, and what comes and goes."""
    return "\n".join(_held()), "\n".join(_passing())


def _held() -> Iterator[str]:
    yield (
        "| GB on each GPU | codes | scales, zeros | embeddings, norms, lm_head | adapters "
        "| gradients | AdamW | all |"
    )
    yield "|---" * 8 + "|"
    for name, shape in LLAMA_3.items():
        m = TrainingPlan(gpus=_GPUS).model(shape)
        sizes = (m.codes, m.scales, m.dense, m.adapters, m.gradients, m.optimizer, m.total)
        yield _row(name, sizes)


def _passing() -> Iterator[str]:
    yield (
        "| GB on each GPU | one block, unsharded | embeddings, norms, lm_head, unsharded "
        f"| inputs of all blocks, {_TOKENS:,} tokens | logits, {_TOKENS:,} tokens, float32 |"
    )
    yield "|---" * 5 + "|"
    for name, shape in LLAMA_3.items():
        whole = TrainingPlan()
        block = whole.block(shape)
        yield _row(
            name,
            (
                block.codes + block.scales + block.dense + block.adapters,
                whole.rest(shape).total,
                shape.blocks * whole.block_input(shape, _TOKENS),
                _TOKENS * shape.vocabulary * 4,
            ),
        )


def _row(name: str, sizes: tuple[int, ...]) -> str:
    return f"| {name} | " + " | ".join(f"{size / 1e9:,.2f}" for size in sizes) + " |"


if __name__ == "__main__":
    print(*markdown_tables(), sep="\n\n")
