"""The default model, as it comes out of its GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hqqlora.command.model_source import (
    ModelSource,
    choose_dtype,
    find_model,
    load_dense_model,
    load_tokenizer,
)
from hqqlora.training.sample import Prompt, complete

pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")
from gguf_files import write_model


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if type(m) is torch.nn.Linear]


def test_the_default_model_knows_something(smollm2: Path):
    """`smollm2` is what was loaded from the file, with its tokenizer, and saved."""
    assert find_model(None).name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    source = find_model(str(smollm2))
    model = load_dense_model(source, choose_dtype("float32"))
    assert len(linear_layers(model)) == 211  # 7 in each of 30 layers, and the output layer
    prompt = Prompt("The capital of France is")
    assert complete(model, load_tokenizer(source), prompt, 2).startswith(" Paris")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_comes_out_of_a_gguf_file_is_a_dense_model_like_any_other(
    tmp_path: Path, dtype: str
):
    path = write_model(tmp_path / "model.gguf")
    model = load_dense_model(ModelSource(tmp_path, path.name), choose_dtype(dtype))
    assert len(linear_layers(model)) == 2 * 7 + 1
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert getattr(model.config, "quantization_config", None) is None
    assert not model.is_quantized
    assert not model.training
