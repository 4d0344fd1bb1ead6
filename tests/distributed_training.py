"""Checks for four processes: a Llama with HQQ weights and LoRA trains under DDP and FSDP2 as it
does in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft_models import fill_adapters, tiny_llama, token_ids
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hqqlora import BaseQuantizeConfig, add_lora, quantize_model

STEPS = 5
LENGTH = 8
# Two layers. With 4 bits in groups of 64, q_proj is 32 rows of packed words and down_proj 38:
# the latter are not shared out evenly among four. Nor are the 13 rows of 3-bit words, nor an
# adapter's three.
SHAPE = {"intermediate_size": 76, "vocab_size": 67}
RANK = 3


def quantized(bits: int, axis: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = BaseQuantizeConfig(nbits=bits, group_size=64 if axis else 32, axis=axis)
    if axis == 0:
        config = {
            "down_proj": BaseQuantizeConfig(nbits=bits, group_size=64, axis=0),
            "*": config,
        }
    return quantize_model(tiny_llama(dtype, **SHAPE), config, progress=False)


def with_own_lora(model: nn.Module) -> nn.Module:
    return add_lora(model, r=RANK, init_lora_weights=False)


def with_peft(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules="all-linear")
    return fill_adapters(get_peft_model(model, config))


ADAPTERS = {"own": with_own_lora, "peft": with_peft}


def adapted(
    adapters: str, bits: int, axis: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    torch.manual_seed(0)
    return ADAPTERS[adapters](quantized(bits, axis, dtype))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def pair() -> DeviceMesh:
    """The two processes, this one among them, of a test for two."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("pairs", "pair"))["pair"]


def four() -> DeviceMesh:
    return init_device_mesh("cpu", (4,), mesh_dim_names=("four",))


def blocks(model: nn.Module) -> nn.ModuleList:
    [found] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return found


def sharded(model: nn.Module, mesh: DeviceMesh, **policies: object) -> nn.Module:
    for block in blocks(model):
        fully_shard(block, mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


def replicated(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())


# ---- training ----------------------------------------------------------------------------


def batches(parts: int) -> list[list[Tensor]]:
    """For each step as many batches as there are processes, each [4 / parts, LENGTH]."""
    return [list(token_ids(4, LENGTH).chunk(parts)) for _ in range(STEPS)]


def train(model: nn.Module, steps: list[list[Tensor]]) -> list[float]:
    """Trains on every batch of each step and returns the losses, a mean for each step."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for step in steps:
        loss_of_step = 0.0
        for batch in step:
            loss = model(input_ids=batch, labels=batch).loss / len(step)
            loss.backward()
            loss_of_step += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_of_step)
    return losses


def mean_over(mesh: DeviceMesh, losses: list[float]) -> Tensor:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total, group=mesh.get_group())
    return total / mesh.size()


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_training_equals_one_process(
    make: Callable[[], nn.Module], shard: Callable[..., nn.Module], mesh: DeviceMesh
) -> None:
    size, rank = mesh.size(), mesh.get_local_rank()
    alone = make()
    expected = torch.tensor(train(alone, batches(size)), dtype=torch.float64)
    assert expected[-1] < 0.9 * expected[0]

    model = shard(make(), mesh)
    own = [[step[rank]] for step in batches(size)]
    losses = mean_over(mesh, train(model, own))
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    trained = {name: whole(p) for name, p in trainable(inner).items()}
    if size == 2:
        # A step of one process is (g0/2) + (g1/2); of two, (g0 + g1)/2 or that: halving is
        # exact, so every bit is the same.
        assert torch.equal(losses, expected)
        for name, parameter in trainable(alone).items():
            assert torch.equal(trained[name], parameter), name
    else:
        # Sums of four are taken in another order. The bound is that of PyTorch's own tests.
        torch.testing.assert_close(losses.float(), expected.float())


CHECKS: dict[str, Callable[[Path], None]] = {}

for _adapters, _bits, _axis in (
    ("own", 4, 1),
    ("own", 3, 1),
    ("own", 8, 0),
    ("peft", 4, 0),
    ("peft", 3, 0),
    ("peft", 8, 1),
):
    _make = partial(adapted, _adapters, _bits, _axis)
    for _kind, _shard, _mesh in (
        ("ddp2", replicated, pair),
        ("fsdp2", sharded, pair),
        ("fsdp4", sharded, four),
    ):

        def _check(folder: Path, make=_make, shard=_shard, mesh=_mesh) -> None:
            assert_training_equals_one_process(make, shard, mesh())

        CHECKS[f"train-{_kind}-{_adapters}-{_bits}bits-axis{_axis}"] = _check
