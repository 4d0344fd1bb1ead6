"""Checks for two processes: mixed precision, CPU offload and how things are shared out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distributed_training import (
    adapted,
    assert_training_equals_one_process,
    blocks,
    everyone,
    sharded,
    train,
    trainable,
    whole,
)
from peft_models import token_ids
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard

from hqqlora import HQQLinear
from hqqlora.distributed import shard_model

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def cast(model: nn.Module, kept: tuple[str, ...] = ()) -> nn.Module:
    """`model` with its floats, but for parameters with `kept` in their names, in bfloat16."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.bfloat16()
    return model


def operands(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The logits, and the tensors that each quantized layer computed with."""
    seen: dict[str, list[Tensor]] = {}
    packed = HQQLinear.packed.fget
    names = {id(m): name for name, m in model.named_modules() if isinstance(m, HQQLinear)}

    def spy(layer: HQQLinear) -> Any:
        weight = packed(layer)
        seen[names[id(layer)]] = [t.clone() for t in weight[:3]]
        return weight

    HQQLinear.packed = property(spy)
    try:
        return model(input_ids=tokens).logits.detach(), seen
    finally:
        HQQLinear.packed = property(packed)


def assert_same(found: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        for actual, expected in zip(found[name], tensors, strict=True):
            assert actual.dtype == expected.dtype, name
            assert torch.equal(actual, expected), name


def fully_shard_rounds_scales(folder: Path) -> None:
    tokens = token_ids(2, 8)
    for adapters, bits in (("own", 3), ("peft", 4)):
        reference = cast(adapted(adapters, bits, 1))
        model = sharded(adapted(adapters, bits, 1), everyone(), mp_policy=BF16)
        expected, wanted = operands(reference, tokens)
        logits, found = operands(model, tokens)
        assert_same(found, wanted)
        assert found.popitem()[1][0].dtype == (torch.int32 if bits == 3 else torch.uint8)
        assert torch.equal(logits, expected)


KEPT = ("W_q", "scale", "zero", "lora_", "_proj.bias", "base_layer.bias")


def shard_model_keeps_scales(folder: Path) -> None:
    tokens = token_ids(2, 8)
    for adapters, bits in (("own", 3), ("peft", 4)):
        original = operands(adapted(adapters, bits, 1), tokens)[1]
        reference = cast(adapted(adapters, bits, 1), KEPT)
        model = shard_model(adapted(adapters, bits, 1), mesh=everyone(), mp_policy=BF16)
        expected = operands(reference, tokens)[0]
        logits, found = operands(model, tokens)
        assert_same(found, original)
        assert logits.dtype == torch.bfloat16
        assert torch.equal(logits, expected)


def cast_all_but_kept(model: nn.Module) -> nn.Module:
    return cast(model, KEPT)


def mixed_precision_trains_as_one_process(folder: Path) -> None:
    def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        # What has been cast already is cast once more by nobody.
        return shard_model(model, mesh=mesh, mp_policy=BF16)

    for adapters in ("own", "peft"):
        assert_training_equals_one_process((adapters, 4, 1), shard, cast_all_but_kept)


def offload_trains_as_one_process(folder: Path) -> None:
    offload = CPUOffloadPolicy(pin_memory=False)
    for shard in (sharded, shard_model):
        assert_training_equals_one_process(
            ("own", 4, 1), lambda m, mesh, s=shard: s(m, mesh=mesh, offload_policy=offload)
        )


def everything_is_shared_out(folder: Path) -> None:
    for axis, bits in ((0, 4), (1, 4), (1, 3)):
        plain = adapted("own", bits, axis)
        model = shard_model(adapted("own", bits, axis), mesh=everyone())
        sizes = {name: p.numel() for name, p in plain.named_parameters()}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), name
            share = parameter.to_local()
            rows = plain.get_parameter(name).shape[0]
            if name.endswith((".scale", ".zero")) and axis == 0:
                assert rows == 1
                assert parameter.placements == (Shard(1),), name
                assert share.numel() == sizes[name] / 2, name
            assert share.numel() <= -(-rows // 2) * (sizes[name] / rows), name
        tokens = token_ids(2, 8)
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def one_block_is_whole_at_a_time(folder: Path) -> None:
    """Before, between and after steps every parameter is a shard; within a block's forward
    only that block's (and the root's) are whole."""
    model = shard_model(adapted("own", 4, 1), mesh=everyone())
    seen: list[list[bool]] = []
    layers = list(blocks(model))

    def whole_blocks(*_: object) -> None:
        seen.append([not isinstance(next(b.parameters()), DTensor) for b in layers])

    for block in layers:
        block.self_attn.register_forward_hook(whole_blocks)
    train(model, [[token_ids(1, 8)]])
    assert seen == [[True, False], [False, True]]
    assert all(isinstance(p, DTensor) for block in layers for p in block.parameters())
    assert all(isinstance(p.detach(), DTensor) for p in trainable(model).values())
    assert whole(next(iter(trainable(model).values()))).isfinite().all()


IN_TWO: dict[str, Callable[[Path], None]] = {
    "mixed-precision-fully_shard-rounds-scales-but-not-codes": fully_shard_rounds_scales,
    "mixed-precision-shard_model-keeps-scales": shard_model_keeps_scales,
    "mixed-precision-trains-as-one-process": mixed_precision_trains_as_one_process,
    "cpu-offload-trains-as-one-process": offload_trains_as_one_process,
    "shard_model-shares-out-everything": everything_is_shared_out,
    "fsdp-one-block-is-whole-at-a-time": one_block_is_whole_at_a_time,
}
