"""examples/finetune_gguf.py runs, and what it writes can be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gguf_files import file_tensors, write_model  # noqa: E402

EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune_gguf.py"


def test_the_example_trains_and_writes_both_files(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "Q4_1")
    command = [sys.executable, str(EXAMPLE), "--model", str(path), "--steps", "2"]
    command += ["--output", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "step 2: loss" in done.stdout
    adapter = file_tensors(tmp_path / "out" / "adapter.gguf")
    assert len(adapter) == 28
    before, after = file_tensors(path), file_tensors(tmp_path / "out" / "model.gguf")
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert {name for name, (kind, _) in before.items() if kind == "Q4_1"} <= changed
