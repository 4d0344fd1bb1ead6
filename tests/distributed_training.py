"""Checks for two and for four processes: a Llama with HQQ weights and LoRA trains under DDP and
FSDP2 as it does in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
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


def quantized(
    bits: int, axis: int, dtype: torch.dtype = torch.float32, **shape: int
) -> nn.Module:
    config = BaseQuantizeConfig(nbits=bits, group_size=64 if axis else 32, axis=axis)
    if axis == 0:
        config = {
            "down_proj": BaseQuantizeConfig(nbits=bits, group_size=64, axis=0),
            "*": config,
        }
    return quantize_model(tiny_llama(dtype, **{**SHAPE, **shape}), config, progress=False)


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


def everyone() -> DeviceMesh:
    """All processes."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))


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


@cache
def trained_alone(
    adapters: str,
    bits: int,
    axis: int,
    parts: int,
    cast: Callable[..., nn.Module] | None = None,
) -> tuple[nn.Module, Tensor]:
    """The model that one process has trained on `parts` batches a step, and its losses."""
    model = adapted(adapters, bits, axis)
    model = model if cast is None else cast(model)
    losses = torch.tensor(train(model, batches(parts)), dtype=torch.float64)
    assert losses[-1] < 0.9 * losses[0]
    return model, losses


def assert_same_losses(losses: Tensor, expected: Tensor) -> None:
    """The bound of PyTorch's own tests, where sums are taken in another order."""
    torch.testing.assert_close(losses.float(), expected.float())


def assert_training_equals_one_process(
    kind: tuple[str, int, int],
    shard: Callable[..., nn.Module],
    cast: Callable[[nn.Module], nn.Module] | None = None,
) -> None:
    mesh = everyone()
    size, rank = mesh.size(), mesh.get_local_rank()
    alone, expected = trained_alone(*kind, size, cast)
    model = adapted(*kind)
    model = shard(model if cast is None else cast(model), mesh)
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
        assert_same_losses(losses, expected)


KINDS = (
    ("own", 4, 1),
    ("own", 3, 1),
    ("own", 8, 0),
    ("peft", 4, 0),
    ("peft", 3, 0),
    ("peft", 8, 1),
)


def _checks(
    how: str, shard: Callable[..., nn.Module], kinds: tuple[tuple[str, int, int], ...]
) -> dict[str, Callable[[Path], None]]:
    def check(folder: Path, kind: tuple[str, int, int]) -> None:
        assert_training_equals_one_process(kind, shard)

    return {
        f"train-{how}-{adapters}-{bits}bits-axis{axis}": partial(
            check, kind=(adapters, bits, axis)
        )
        for adapters, bits, axis in kinds
    }


IN_TWO = {**_checks("ddp2", replicated, KINDS), **_checks("fsdp2", sharded, KINDS)}
# Each number of bits once, and each axis with each kind of adapter but one.
IN_FOUR = _checks("fsdp4", sharded, KINDS[1:4])
