"""The seed that stands for a dropout mask."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)


def dropout_seed(device: torch.device) -> Tensor:
    """A seed [1], int64, on the device of x and from the default generator of that device.

    Nothing waits for it: on CUDA the kernels read it. There torch has its generator take part
    in a CUDA graph's capture, so that each replay draws another seed, hence another mask.

    Under torch.compile it is marked as one to be kept for the backward pass. With an
    `activation_memory_budget` below 1 the partitioner would otherwise draw it again there,
    which gave another mask and gradients of another function (torch 2.13 knows only the
    generators behind its own dropout as random). At a budget of exactly 0 it recomputes all the
    same, and torch's own dropout too.
    """
    if torch.compiler.is_compiling():
        kept: Tensor = checkpoint(
            _draw, device, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_all
        )
        return kept
    return _draw(device)


def _draw(device: torch.device) -> Tensor:
    return torch.randint(2**63 - 1, (1,), device=device)


def _must_save(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


_keep_all = functools.partial(create_selective_checkpoint_contexts, _must_save)
