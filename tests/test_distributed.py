"""The layers under DDP, FSDP2 and torch.distributed.checkpoint, in two processes on the CPU."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from hqqlora import BaseQuantizeConfig, LoRALinear, add_lora, quantize_model

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

X = torch.linspace(-1, 1, 4 * 64).reshape(4, 64)


def adapted_model(axis: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    config = BaseQuantizeConfig(group_size=32, axis=axis)
    quantize_model(model, config, skip_modules=[], progress=False)
    add_lora(model, r=4, init_lora_weights=False)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for axis in (1, 0):
        train_and_save(rank, folder, axis)
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads may still hold the last tensors. Python, when it shuts down, ends such a
    # thread in the middle of a C++ destructor, which aborts the process; so it does not.
    os._exit(0)


def train_and_save(rank: int, folder: str, axis: int) -> None:
    """The same model in both processes, on half of X each."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    half = X[2 * rank : 2 * rank + 2]
    reference = adapted_model(axis)
    expected = reference(X)
    expected.pow(2).mean().backward()

    plain = nn.parallel.DistributedDataParallel(adapted_model(axis))
    plain(half).pow(2).mean().backward()
    for actual, wanted in zip(gradients(plain), gradients(reference), strict=True):
        assert_near(actual, wanted)

    def sharded(model: nn.Sequential) -> nn.Module:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in model:
            if isinstance(layer, LoRALinear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    model = sharded(adapted_model(axis))
    y = model(half)
    y.pow(2).mean().backward()
    assert_near(y, expected[2 * rank : 2 * rank + 2])
    for shard, wanted in zip(gradients(model), gradients(reference), strict=True):
        assert_near(shard.full_tensor(), wanted)  # type: ignore[attr-defined]

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if rank == 0:
        torch.save(state, f"{folder}/state{axis}.pt")
    other = sharded(adapted_model(axis, seed=1))
    from_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, state, options=from_0)
    assert torch.equal(other(half), y)


def test_training_in_two_processes_is_training_in_one(tmp_path: Path) -> None:
    mp.spawn(one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    for axis in (1, 0):
        model = adapted_model(axis, seed=2)
        model.load_state_dict(torch.load(tmp_path / f"state{axis}.pt", weights_only=True))
        assert_near(model(X), adapted_model(axis)(X))
