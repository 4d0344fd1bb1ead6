"""A script for `accelerate launch`: FSDP2 by accelerate's own plugin, in two processes on a
CPU, trains, saves and loads quantized layers as one process does.

    accelerate launch --config_file CONFIG.yaml distributed_accelerate.py FOLDER

accelerate 1.15 asks only on accelerators whether the launcher wants FSDP (`AcceleratorState`);
on CPUs it takes DDP and says nothing. So one thing is forced here: that the processes are those
of several GPUs. All that follows is accelerate's own doing, as it is on GPUs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from distributed_training import adapted, batches, trainable, trained_alone, whole
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

KINDS = (("own", 4, 1), ("peft", 3, 0))


def prepared(accelerator: Accelerator, model: nn.Module) -> tuple[Any, Any]:
    """Sharded, with its optimizer."""
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    codes = [p for name, p in model.named_parameters() if name.endswith("W_q")]
    assert codes
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(p.to_local().numel() < p.numel() for p in codes)
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) > 2  # each block
    return model, optimizer


def train(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: list[list[Tensor]]
) -> Tensor:
    """The losses, a mean over the processes for each step."""
    losses = []
    for step in steps:
        mine = step[accelerator.process_index]
        loss = model(input_ids=mine, labels=mine).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach().double(), "mean"))
    return torch.stack(losses)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).clone() for name, p in model.named_parameters()}


def trains_saves_and_loads(
    accelerator: Accelerator, kind: tuple[str, int, int], folder: Path
) -> None:
    alone, expected = trained_alone(*kind, parts=2)
    model, optimizer = prepared(accelerator, adapted(*kind))
    assert torch.equal(train(accelerator, model, optimizer, batches(2)), expected)
    wanted = parameters(model)
    for name, parameter in alone.named_parameters():
        assert torch.equal(wanted[name], parameter), name
    accelerator.save_state(str(folder))
    rest = train(accelerator, model, optimizer, batches(2)[:2])
    accelerator.free_memory()

    other = adapted(*kind)
    with torch.no_grad():  # what the checkpoint must bring back
        for parameter in other.parameters():
            parameter.copy_(torch.ones_like(parameter))
    loaded, optimizer = prepared(accelerator, other)
    accelerator.load_state(str(folder))
    for name, tensor in parameters(loaded).items():
        assert torch.equal(wanted[name], tensor), name
    assert torch.equal(train(accelerator, loaded, optimizer, batches(2)[:2]), rest)
    accelerator.free_memory()


def main(folder: str) -> None:
    torch.set_num_threads(1)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # see above
    accelerator = Accelerator()
    assert accelerator.is_fsdp2
    assert accelerator.num_processes == 2
    for kind in KINDS:
        trains_saves_and_loads(accelerator, kind, Path(folder) / kind[0])
        if accelerator.is_main_process:
            print("equal to one process:", *kind, flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # see distributed_processes.py


if __name__ == "__main__":
    main(*sys.argv[1:])
