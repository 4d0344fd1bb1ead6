"""`hqqlora train` on instruction data, from beginning to end, on a tiny model."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_tiny_llama

from hqqlora.cli import main
from hqqlora.training import loop
from hqqlora.training.chat_data import encode_messages

transformers = pytest.importorskip("transformers")

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
STEPS = 9

pytestmark = pytest.mark.usefixtures("keep_threads")


def talk(number: int) -> list[dict[str, str]]:
    said = [
        {"role": "user", "content": f"{number % 7}+{number % 5}?"},
        {"role": "assistant", "content": f"It is {number % 7 + number % 5}."},
    ]
    return said * (1 + number % 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_tiny_llama(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"messages": talk(i)}) + "\n" for i in range(30)]
    (folder / "talks.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> dict[str, Any]:
    assert main(train(place, place / "finished")) == 0
    return log_of(place / "finished")


def train(place: Path, output: Path, *more: str) -> list[str]:
    """Several epochs, and dropout, which draws."""
    return [
        *("train", "--model", str(place / "model"), "--data", str(place / "talks.jsonl")),
        *("--threads", "1", "--sequence-length", "64", "--batch", "4", "--rank", "8"),
        *("--steps", str(STEPS), "--warmup", "2", "--learning-rate", "2e-2"),
        *("--dropout", "0.1", "--sample-tokens", "3", "--dtype", "float32"),
        *("--output", str(output), *more),
    ]


def log_of(folder: Path) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((folder / "train_log.json").read_text())
    return log


def results(folder: Path) -> Any:
    log = log_of(folder)
    steps = [(s["loss"], s["learning_rate"], s["gradient_norm"]) for s in log["steps"]]
    adapter = (folder / "adapter/adapter_model.safetensors").read_bytes()
    return steps, log["perplexity"], log["sample"], log["data"], adapter


def test_it_learns_to_answer(finished: dict[str, Any]) -> None:
    assert finished["perplexity"]["fine_tuned"] < 0.3 * finished["perplexity"]["quantized"]
    data, training = finished["data"], finished["training"]
    assert data["train_records"] + data["held_out_records"] == 30
    assert 0 < data["learned_tokens"] < 0.7 * data["train_tokens"]
    epochs = STEPS * 4 / data["train_records"]
    real = epochs * data["train_tokens"] / STEPS  # a step; padded it would be more
    assert training["tokens_per_step"] == pytest.approx(real, rel=0.1)
    speeds = [step["tokens_per_second"] * step["seconds"] for step in finished["steps"]]
    assert sum(speeds) / STEPS == pytest.approx(training["tokens_per_step"], abs=0.5)


def test_the_sample_continues_a_held_out_prompt(finished: dict[str, Any]) -> None:
    number = int(finished["data"]["held_out"][0].rsplit(" ", 1)[1]) - 1
    assert finished["sample"]["prompt"] == f"u:{talk(number)[0]['content']}<end>a:"


def test_the_held_out_perplexity_is_that_of_the_answers(
    finished: dict[str, Any], place: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    total, count = 0.0, 0
    for name in finished["data"]["held_out"]:
        number = int(name.rsplit(" ", 1)[1]) - 1
        ids, labels = encode_messages(talk(number), tokenizer, name)
        learned = sum(label != -100 for label in labels)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total, count = total + learned * loss.item(), count + learned
    assert finished["perplexity"]["tokens"] == count
    assert finished["perplexity"]["dense"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_stopped_run_ends_as_if_nothing_had_happened(
    finished: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = loop._take_step

    def take_and_signal(loss: Any, data: Any, optimizer: Any, options: Any, *rest: Any) -> None:
        if rest[0].step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        take(loss, data, optimizer, options, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_take_step", take_and_signal)
        assert main(train(place, tmp_path / "run")) == 130
    assert main(["train", "--resume", "--output", str(tmp_path / "run")]) == 0
    assert results(tmp_path / "run") == results(place / "finished")


def test_prompts_are_learned_if_asked_for(
    finished: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    command = train(
        place, tmp_path / "run", "--learn-prompts", "--prompt", "Hi", "--steps", "1"
    )
    assert main(command) == 0
    log = log_of(tmp_path / "run")
    assert log["perplexity"]["tokens"] > finished["perplexity"]["tokens"]
    assert log["data"]["learned_tokens"] == (
        log["data"]["train_tokens"] - log["data"]["train_records"]  # all but each one's first
    )
    assert log["sample"]["prompt"] == "u:Hi<end>a:"


def test_a_model_without_a_chat_template_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_llama(tmp_path / "base")
    command = train(place, tmp_path / "run", "--model", str(tmp_path / "base"))
    assert main(command) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
