"""Checks for four processes: a model that none of them could hold is quantized by all."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from distributed_training import RANK, SHAPE, everyone, whole
from peft_models import tiny_llama, token_ids
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hqqlora import BaseQuantizeConfig, HQQLinear, add_lora, quantize_model
from hqqlora.distributed import load_sharded, quantized_skeleton, shard_model
from hqqlora.distributed.dense_checkpoint import DenseCheckpoint

CONFIGS = {
    "4bits": BaseQuantizeConfig(nbits=4, group_size=64),
    "3bits": BaseQuantizeConfig(nbits=3, group_size=64),
    "axis0": {
        "down_proj": BaseQuantizeConfig(nbits=4, group_size=64, axis=0),
        "o_proj": None,
        "*": BaseQuantizeConfig(nbits=8, group_size=32, axis=0),
    },
}


def saved_dense(folder: Path, name: str, **config: Any) -> Path:
    """The checkpoint of a tiny dense Llama, in several files, the same for all processes."""
    path = folder / name
    if dist.get_rank() == 0:
        model = tiny_llama(torch.bfloat16, **SHAPE, **config)
        model.save_pretrained(path, max_shard_size="60KB")
    dist.barrier()
    return path


def empty(path: Path) -> Any:
    from transformers import AutoConfig

    with init_empty_weights():
        config = AutoConfig.from_pretrained(path)
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def in_one_process(path: Path, config: Any) -> nn.Module:
    dense = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return quantize_model(dense, config, progress=False)


def assert_equal_parameters(model: nn.Module, expected: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    wanted = dict(expected.named_parameters())
    assert parameters.keys() == wanted.keys()
    for name, parameter in wanted.items():
        found = whole(parameters[name])
        assert found.dtype == parameter.dtype, name
        assert torch.equal(found, parameter), name
        assert parameters[name].requires_grad == parameter.requires_grad, name


class Reads:
    """What this process has read of a checkpoint, and how much of it was alive at once."""

    def __init__(self) -> None:
        self.whole: list[str] = []
        self.parts: dict[str, int] = {}
        self.alive = self.most_alive = 0

    def note(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        self.alive += size
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(tensor.untyped_storage(), self.forget, size)
        return tensor

    def forget(self, size: int) -> None:
        self.alive -= size


@contextmanager
def reads() -> Iterator[Reads]:
    seen = Reads()
    tensor, part = DenseCheckpoint.tensor, DenseCheckpoint.part

    def read(self: DenseCheckpoint, key: str) -> Tensor:
        seen.whole.append(key)
        return seen.note(tensor(self, key))

    def read_part(self: DenseCheckpoint, key: str, *where: int) -> Tensor:
        found = part(self, key, *where)
        seen.parts[key] = seen.parts.get(key, 0) + found.numel()
        return seen.note(found)

    DenseCheckpoint.tensor, DenseCheckpoint.part = read, read_part  # type: ignore[assignment]
    try:
        yield seen
    finally:
        DenseCheckpoint.tensor, DenseCheckpoint.part = tensor, part  # type: ignore[assignment]


def same_codes_as_one_process(folder: Path) -> None:
    path = saved_dense(folder, "one-layer", num_hidden_layers=1)
    for name, config in CONFIGS.items():
        model = quantized_skeleton(empty(path), config)
        torch.manual_seed(dist.get_rank())
        add_lora(model, r=RANK)
        shard_model(model, mesh=everyone())
        load_sharded(model, path, init_lora_weights=False)

        expected = in_one_process(path, config)
        torch.manual_seed(0)
        add_lora(expected, r=RANK, init_lora_weights=False)
        assert_equal_parameters(model, expected)
        tokens = token_ids(2, 8)
        assert torch.equal(model(tokens).logits, expected(tokens).logits), name


def each_dense_weight_is_read_by_one(folder: Path) -> None:
    path = saved_dense(folder, "dense")
    model = quantized_skeleton(empty(path), CONFIGS["4bits"])
    add_lora(model, r=RANK)
    shard_model(model, mesh=everyone())
    with reads() as mine:
        load_sharded(model, path)
    of_all: list[Any] = [None] * 4
    dist.all_gather_object(of_all, (mine.whole, mine.parts))

    quantized = [n for n, m in model.named_modules() if isinstance(m, HQQLinear)]
    keys = sorted(name.replace(".base_layer", "") + ".weight" for name in quantized)
    assert sorted(key for read, _ in of_all for key in read) == keys
    assert len(keys) == 14
    assert all(3 <= len(read) <= 4 for read, _ in of_all)  # the work is shared

    checkpoint = DenseCheckpoint(path)
    others = set(checkpoint.keys()) - set(keys)
    for key in others:
        parts = sum(read.get(key, 0) for _, read in of_all)
        assert parts == torch.Size(checkpoint.shape(key)).numel(), key
    largest = max(checkpoint.tensor(key).numel() * 2 for key in keys)
    assert mine.alive == 0
    assert 0 < mine.most_alive <= largest


def tied_weights_stay_tied(folder: Path) -> None:
    """lm_head is the embedding, which the checkpoint has once."""
    path = saved_dense(folder, "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in DenseCheckpoint(path)
    skeleton = empty(path)
    skeleton.tie_weights()
    model = shard_model(quantized_skeleton(skeleton, CONFIGS["4bits"]), mesh=everyone())
    load_sharded(model, path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = in_one_process(path, CONFIGS["4bits"])
    assert_equal_parameters(model, expected)
    tokens = token_ids(2, 8)
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


def what_the_checkpoint_lacks_is_named_before_anything_is_read(folder: Path) -> None:
    path = saved_dense(folder, "tied", tie_word_embeddings=True)
    untied = shard_model(quantized_skeleton(empty(path), CONFIGS["4bits"]), mesh=everyone())
    with reads() as mine, pytest.raises(ValueError, match=r"lm_head\.weight is not in"):
        load_sharded(untied, path)
    assert not mine.whole
    assert not mine.parts
    assert all(parameter.is_meta for parameter in untied.parameters())


IN_FOUR: dict[str, Callable[[Path], None]] = {
    "load-tied-weights-stay-tied": tied_weights_stay_tied,
    "load-names-what-the-checkpoint-lacks": (
        what_the_checkpoint_lacks_is_named_before_anything_is_read
    ),
    "load-same-codes-as-one-process": same_codes_as_one_process,
    "load-each-dense-weight-is-read-by-one": each_dense_weight_is_read_by_one,
}
