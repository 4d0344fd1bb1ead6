"""2,000 steps need no more memory, tensors or open files than the first few hundred."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft_models import tiny_llama

import hqqlora
from hqqlora.training.batches import Examples
from hqqlora.training.checkpoint import Progress, take_checkpoint, write_checkpoint
from hqqlora.training.loop import make_optimizer, train
from hqqlora.training.next_token_loss import NextTokenLoss
from hqqlora.training.options import TrainOptions, to_dict

pytest.importorskip("transformers")

STEPS = 2000
# What malloc may hold more: in each step a progress entry, four floats in four lists, of some
# 200 bytes (the smallest tensor of a step, with its storage, would be some 500); and the
# allocator's own unrest, once.
BYTES_A_STEP, UNREST = 300, 1_000_000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def _without_what_there_was() -> Iterator[None]:
    """`live_tensors` sees none of other tests' tensors, which may go at any time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("one_thread", "_without_what_there_was")
def test_the_loop_of_hqqlora_train_does_not_grow(tmp_path: Path) -> None:
    """With dropout, clipping, measuring and checkpoints."""
    model = tiny_llama(num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8)
    hqqlora.quantize_model(model, hqqlora.BaseQuantizeConfig(group_size=32), progress=False)
    hqqlora.add_lora(model, r=2, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    options = TrainOptions(
        steps=STEPS, batch=1, eval_every=50, checkpoint_every=250, learning_rate=1e-3
    )
    optimizer = make_optimizer(list(hqqlora.lora_parameters(model)), options)
    progress = Progress()
    seen: dict[int, tuple[int, int, int]] = {}

    def save() -> None:
        state = take_checkpoint(to_dict(options), {}, progress, model, optimizer, {})
        write_checkpoint(state, tmp_path / "checkpoint.pt")
        del state
        seen[progress.step] = (resident_bytes(), live_tensors(), open_files())

    windows = torch.randint(0, 64, (16, 8))
    loss, examples = NextTokenLoss(model), Examples(windows)

    def measure() -> None:
        progress.add_held_out_loss(loss.sum(*examples.take([0])))

    train(model, loss, examples, optimizer, options, progress, save, measure)
    save()
    assert progress.step == STEPS
    memory, tensors, files = zip(*(seen[step] for step in sorted(seen)), strict=True)
    assert len(seen) == 8
    assert len(set(tensors[1:])) == 1, tensors
    assert len(set(files)) == 1, files
    assert memory[-1] - memory[2] <= BYTES_A_STEP * (STEPS - 750) + UNREST, memory
