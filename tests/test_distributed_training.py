"""A Llama with HQQ weights and LoRA under DDP, FSDP2 and torch.distributed.checkpoint, and
quantized by the ranks that share it: in two and four processes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import distributed_checkpoints
import distributed_loading
import distributed_policies
import distributed_training
from distributed_processes import outcome, run_checks

MODULES = (
    distributed_training,
    distributed_policies,
    distributed_checkpoints,
    distributed_loading,
)
CHECKS = [name for module in MODULES for name in module.CHECKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [module.__name__ for module in MODULES]
    return run_checks(names, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("check", CHECKS)
def test_in_four_processes(folder: Path, check: str) -> None:
    outcome(folder, check)
