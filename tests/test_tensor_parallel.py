"""Tensor-parallel quantized layers, on two and four gloo ranks, are the unsharded ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensor_parallel_layers
import tensor_parallel_models
from distributed_processes import outcome, run_checks

pytest.importorskip("transformers")
pytest.importorskip("peft")

MODULES = (tensor_parallel_layers, tensor_parallel_models)
CHECKS = [name for module in MODULES for name in module.CHECKS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [module.__name__ for module in MODULES]
    return run_checks(names, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("check", CHECKS)
def test_in_four_processes(results: Path, check: str) -> None:
    outcome(results, check)
