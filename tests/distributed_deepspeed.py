"""Checks for two processes: DeepSpeed's ZeRO-2 and ZeRO-3 train quantized layers as one process
does, save and load.

DeepSpeed is looked for in $VENV/deepspeed too, where `make test` installs it: installed beside
the others, it is imported by every test of accelerate's, which then takes seconds longer.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_training import adapted, assert_same_losses, batches, trainable, trained_alone
from torch import Tensor, nn

import hqqlora

ASIDE = Path(sys.prefix) / "deepspeed"


def is_installed() -> bool:
    return ASIDE.is_dir() or importlib.util.find_spec("deepspeed") is not None


def imported() -> Any:
    """The package, without what it would compile: an all-reduce through shared memory, for
    inference on the CPU."""
    if ASIDE.is_dir() and str(ASIDE) not in sys.path:
        sys.path.append(str(ASIDE))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_of(model: nn.Module, stage: int) -> Any:
    """Each process takes 2 of the 4 windows of a step. Every parameter is shared out, small
    ones too; nothing is clipped, as this version does unless told otherwise."""
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    return imported().initialize(model=model, optimizer=optimizer, config=settings)[0]


def train(engine: Any, steps: list[list[Tensor]]) -> Tensor:
    """The losses, a mean over the processes for each step."""
    losses = []
    for step in steps:
        mine = step[dist.get_rank()]
        loss = engine(input_ids=mine, labels=mine).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean)
    return torch.stack(losses)


def gathered(model: nn.Module, which: Callable[[str], bool]) -> dict[str, Tensor]:
    """Copies of parameters, whole."""
    chosen = {name: p for name, p in model.named_parameters() if which(name)}
    with imported().zero.GatheredParameters(list(chosen.values())):
        return {name: p.detach().clone() for name, p in chosen.items()}


def trains_saves_and_loads(stage: int, kind: tuple[str, int, int], folder: Path) -> None:
    alone, expected = trained_alone(*kind, parts=2)
    engine = engine_of(adapted(*kind), stage)
    assert_same_losses(train(engine, batches(2)), expected)
    codes = [p for name, p in engine.module.named_parameters() if name.endswith("W_q")]
    assert codes
    assert all((p.numel() == 0) == (stage == 3) for p in codes)
    path = folder / f"zero{stage}-{kind[0]}"
    engine.save_checkpoint(str(path))

    other = adapted(*kind)
    with torch.no_grad():  # what the checkpoint must bring back
        for parameter in other.parameters():
            parameter.copy_(torch.ones_like(parameter))
    loaded = engine_of(other, stage)
    loaded.load_checkpoint(str(path))
    wanted = gathered(engine.module, lambda name: True)
    found = gathered(loaded.module, lambda name: True)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    for name, parameter in alone.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(found[name], parameter), name
    more = batches(2)[:2]
    assert torch.equal(train(loaded, more), train(engine, more))
    if kind[0] == "own":
        save_and_load_the_adapter(engine.module, kind, folder / f"adapter{stage}")


def save_and_load_the_adapter(model: nn.Module, kind: Any, folder: Path) -> None:
    wanted = gathered(model, lambda name: "lora_" in name)
    with imported().zero.GatheredParameters(hqqlora.lora_parameters(model)):
        if dist.get_rank() == 0:
            hqqlora.save_adapter(model, folder)
    dist.barrier()
    alone = hqqlora.load_adapter(adapted(*kind), folder)
    for name, tensor in wanted.items():
        assert torch.equal(alone.get_parameter(name), tensor), name


IN_TWO: dict[str, Callable[[Path], None]] = {
    f"deepspeed-zero{stage}-{kind[0]}-{kind[1]}bits": partial(
        trains_saves_and_loads, stage, kind
    )
    for stage, kind in ((2, ("own", 4, 1)), (3, ("own", 4, 1)), (3, ("peft", 3, 0)))
}
