"""Tensor-parallel quantized layers, on two and four gloo ranks, are the unsharded ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensor_parallel_checks
from distributed_processes import outcome, run_checks

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_checks("tensor_parallel_checks", tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("check", tensor_parallel_checks.CHECKS)
def test_in_four_processes(results: Path, check: str) -> None:
    outcome(results, check)
