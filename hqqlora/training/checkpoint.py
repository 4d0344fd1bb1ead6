"""Checkpoints: all that a killed run needs to go on as if nothing had happened."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.command.errors import RunError, UsageError, first_line
from hqqlora.files import write_torch
from hqqlora.torch_files import read_torch

_VERSION = 1


@dataclass
class Progress:
    """What a run has done so far; it grows step by step.

    `losses`, `rates`, `norms` and `seconds` have one entry a step: the mean loss, the learning
    rate, the gradient's norm before clipping, and the wall-clock time. `measured_after` are the
    steps after which the held-out loss was measured, `held_out_losses` what it was. `facts`
    holds what was found before training (perplexities, sample, sizes), so that a resumed run
    need not again.
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    measured_after: list[int] = field(default_factory=list)
    held_out_losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def add_held_out_loss(self, loss: float) -> bool:
        """Notes what was measured now; whether it is the lowest so far."""
        lowest = loss < min(self.held_out_losses, default=math.inf)
        self.measured_after.append(self.step)
        self.held_out_losses.append(loss)
        return lowest


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    The position in the data follows from the step (see `batches.batch_places`).
    """

    options: dict[str, Any]
    fingerprints: dict[str, str]
    progress: Progress
    adapter: dict[str, Tensor]
    optimizer: dict[str, Any]
    random_state: Tensor
    importance: dict[str, Tensor] = field(default_factory=dict)
    """With `--importance`, what the model was quantized by: another processor would measure
    other last bits, and so another model."""


def take_checkpoint(
    options: dict[str, Any],
    fingerprints: dict[str, str],
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    importance: dict[str, Tensor],
) -> Checkpoint:
    """The state between two steps. Tensors are shared, not copied: write it before going on."""
    adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return Checkpoint(
        options,
        fingerprints,
        progress,
        adapter,
        optimizer.state_dict(),
        torch.get_rng_state(),
        importance,
    )


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Puts the state back into a model and an optimizer built the same way.

    Raises:
        UsageError: the adapters are not those of the checkpoint.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    if shapes != {name: tuple(t.shape) for name, t in checkpoint.adapter.items()}:
        raise UsageError("the checkpoint's adapter does not fit the model")
    try:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(checkpoint.adapter[name])
        optimizer.load_state_dict(checkpoint.optimizer)
        torch.set_rng_state(checkpoint.random_state)
    except Exception as error:  # which ones a damaged state leads to, torch does not say
        raise UsageError(f"the checkpoint is damaged: {first_line(error)}") from error
    return checkpoint.progress


def write_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Writes `path`, or leaves the checkpoint that was there.

    Raises:
        RunError: it cannot be written (no space, ...).
    """
    content = {"version": _VERSION, **vars(checkpoint), "progress": asdict(checkpoint.progress)}
    try:
        write_torch(path, content)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else first_line(error)
        raise RunError(f"cannot write the checkpoint {path}: {reason}") from error


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads `path`; no code in it is executed.

    Raises:
        UsageError: it cannot be read or is no checkpoint of this version.
    """
    try:
        content = read_torch(path)
        if content.pop("version") != _VERSION:
            raise ValueError("written by another version")
        progress = Progress(**content.pop("progress"))
        checkpoint = Checkpoint(progress=progress, **content)
        _check(checkpoint)
        return checkpoint
    except Exception as error:
        raise UsageError(f"cannot read the checkpoint {path}: {first_line(error)}") from error


def _check(checkpoint: Checkpoint) -> None:
    """ValueError if a part is of another kind than what is written."""
    progress = checkpoint.progress
    for name, value, kind in (
        ("options", checkpoint.options, dict),
        ("fingerprints", checkpoint.fingerprints, dict),
        ("adapter", checkpoint.adapter, dict),
        ("optimizer", checkpoint.optimizer, dict),
        ("random_state", checkpoint.random_state, Tensor),
        ("importance", checkpoint.importance, dict),
        ("facts", progress.facts, dict),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}")
    for name in (
        *("losses", "rates", "norms", "seconds"),
        *("measured_after", "held_out_losses"),
    ):
        numbers = getattr(progress, name)
        if not isinstance(numbers, list) or not all(type(n) in (int, float) for n in numbers):
            raise ValueError(f"{name} are not numbers")
    for name, tensor in checkpoint.adapter.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name!r} of the adapter is a {type(tensor).__name__}")
