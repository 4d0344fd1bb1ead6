"""Checks for two processes: plain stacks of layers, without transformers, under DDP, FSDP2 and
torch.distributed.checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hqqlora
from hqqlora import BaseQuantizeConfig, LoRALinear

X = torch.linspace(-1, 1, 4 * 64).reshape(4, 64)


def adapted_model(axis: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    config = BaseQuantizeConfig(group_size=32, axis=axis)
    hqqlora.quantize_model(model, config, skip_modules=[], progress=False)
    hqqlora.add_lora(model, r=4, init_lora_weights=False)
    return model


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, LoRALinear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def half() -> Tensor:
    rank = dist.get_rank()
    return X[2 * rank : 2 * rank + 2]


def gradients_are_those_of_one_process(folder: Path) -> None:
    """The same model in both processes, on half of X each."""
    for axis in (1, 0):
        reference = adapted_model(axis)
        expected = reference(X)
        expected.pow(2).mean().backward()

        plain = nn.parallel.DistributedDataParallel(adapted_model(axis))
        plain(half()).pow(2).mean().backward()
        for actual, wanted in zip(gradients(plain), gradients(reference), strict=True):
            assert_near(actual, wanted)

        model = sharded(adapted_model(axis))
        y = model(half())
        y.pow(2).mean().backward()
        assert_near(y, expected[2 * dist.get_rank() :][:2])
        for shard, wanted in zip(gradients(model), gradients(reference), strict=True):
            assert_near(shard.full_tensor(), wanted)  # type: ignore[attr-defined]


def the_whole_state_from_the_first_rank(folder: Path) -> None:
    for axis in (1, 0):
        model = sharded(adapted_model(axis))
        y = model(half())
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=whole)
        if dist.get_rank() == 0:
            alone = adapted_model(axis, seed=2)
            alone.load_state_dict(state)
            assert_near(alone(half()), y)
        other = sharded(adapted_model(axis, seed=1))
        from_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, state, options=from_0)
        assert torch.equal(other(half()), y)


def adapter_files(folder: Path) -> None:
    """save_adapter is called by all; the file is that of one process, and loads into shards."""
    plain = adapted_model(1)
    hqqlora.save_adapter(sharded(adapted_model(1)), folder / "fsdp-adapter")
    dist.barrier()
    alone = hqqlora.load_adapter(adapted_model(1, seed=1), folder / "fsdp-adapter")
    shared = hqqlora.load_adapter(sharded(adapted_model(1, seed=1)), folder / "fsdp-adapter")
    shares = dict(shared.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(alone.get_parameter(name), parameter), name
            assert torch.equal(shares[name].full_tensor(), parameter), name  # type: ignore[attr-defined]


IN_TWO: dict[str, Callable[[Path], None]] = {
    "layers-gradients-are-those-of-one-process": gradients_are_those_of_one_process,
    "layers-whole-state-from-the-first-rank": the_whole_state_from_the_first_rank,
    "layers-adapter-files": adapter_files,
}
