"""`hqqlora train` from an adapter that there is: the correction beside a quantized model, or
that of an earlier run. Rank, scaling and layers are the adapter's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import save_model_and_text

import hqqlora
from hqqlora.cli import main
from hqqlora.training import loop

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("keep_threads")

STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model_and_text(tmp_path_factory.mktemp("corrected"), lines=200)
    options = ["--bits", "2", "--group-size", "32", "--correction", "4", "--threads", "1"]
    assert main(["quantize", str(folder / "model"), str(folder / "small"), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    assert main(train(place, "finished")) == 0
    return place / "finished"


def train(place: Path, output: str, *more: str) -> list[str]:
    return [
        *("train", "--model", str(place / "small"), "--data", str(place / "text.txt")),
        *("--threads", "1", "--sequence-length", "64", "--batch", "4", "--steps", str(STEPS)),
        *("--warmup", "1", "--learning-rate", "1e-2", "--sample-tokens", "0"),
        *("--dtype", "float32", "--output", str(place / output), *more),
    ]


def log_of(folder: Path) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((folder / "train_log.json").read_text())
    return log


def factors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_it_begins_with_the_correction_that_the_model_has(place: Path, finished: Path) -> None:
    log = log_of(finished)
    assert log["options"]["adapter"] == str(place / "small/correction")
    assert (log["options"]["rank"], log["options"]["alpha"]) == (4, 8.0)
    perplexity = log["perplexity"]
    assert perplexity["with_adapter"] < perplexity["quantized"]
    config = json.loads((finished / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "small")
    before, after = factors_of(place / "small/correction"), factors_of(finished / "adapter")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert 0 < (tensor - before[name]).norm() < before[name].norm(), name


def test_without_it_training_begins_anew(place: Path, capsys: Any) -> None:
    assert main(train(place, "anew", "--no-correction", "--rank", "6")) == 0
    log = log_of(place / "anew")
    assert "with_adapter" not in log["perplexity"]
    assert (log["options"]["rank"], log["options"]["adapter"]) == (6, None)
    assert "correction" not in capsys.readouterr().out


def test_the_adapter_of_a_run_is_trained_on(place: Path, finished: Path) -> None:
    """Its beginning is where that run ended; dropout is this run's own."""
    adapter = finished / "adapter"
    options = ("--adapter", str(adapter), "--rank", "4", "--dropout", "0.1")
    assert main(train(place, "on", *options)) == 0
    log = log_of(place / "on")
    begun = log["perplexity"]["with_adapter"]
    assert begun == pytest.approx(log_of(finished)["perplexity"]["fine_tuned"], rel=1e-6)
    assert log["options"]["adapter"] == str(adapter)
    config = json.loads((place / "on/adapter/adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.1


def test_a_stopped_run_goes_on_bit_for_bit(
    place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = loop._take_step

    def take_two(*arguments: Any) -> None:
        if arguments[4].step == 2:
            raise KeyboardInterrupt
        take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_take_step", take_two)
        assert main(train(place, "stopped", "--checkpoint-every", "1")) == 130
    assert main(["train", "--resume", "--output", str(place / "stopped")]) == 0
    mine, other = log_of(place / "stopped"), log_of(finished)
    assert mine["perplexity"] == other["perplexity"]
    assert [s["loss"] for s in mine["steps"]] == [s["loss"] for s in other["steps"]]
    again, first = factors_of(place / "stopped/adapter"), factors_of(finished / "adapter")
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_peft_and_merge_find_the_quantized_base(place: Path, finished: Path) -> None:
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(finished / "adapter").eval()
    layers = [m for m in tuned.modules() if isinstance(m, hqqlora.HQQLinear)]
    assert len(layers) == 14
    assert main(["merge", "--dense", str(finished / "adapter"), str(place / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(place / "merged").eval()
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-3)
    shutil.rmtree(place / "merged")


def test_llama_cpp_gets_what_was_trained(place: Path, finished: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = place / "adapter.gguf"
    assert main(["export", "gguf-adapter", str(finished / "adapter"), str(path)]) == 0
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    found = torch.tensor(tensors["blk.1.ffn_down.weight.lora_b"])
    assert torch.equal(found, factors_of(finished / "adapter")[name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "8"], "--rank is 8, but the adapter"),
        (["--alpha", "4"], "--alpha is 4.0, but the adapter"),
        (["--rslora"], "--rslora is True, but the adapter"),
        (["--target-modules", "q_proj"], "--target-modules is q_proj, but the adapter"),
        (["--adapter", "nowhere"], "is no adapter: it has no adapter_config.json"),
        (["--adapter", "{}/small/correction", "--correction"], "exclude each other"),
        (["--output", "{}/small"], "lies in the output folder"),
        (["--model", "{}/model", "--correction"], "--correction: {}/model has none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_contradicts_the_adapter_is_refused(
    place: Path, capsys: Any, options: list[str], words: str
) -> None:
    options = [option.format(place) for option in options]
    assert main(train(place, "refused", *options)) == 2
    assert words.format(place) in capsys.readouterr().err
    assert not (place / "refused").exists()


def test_a_damaged_one_is_refused(place: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(place / "small/correction", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"none")
    assert main(train(place, "damaged", "--adapter", str(tmp_path / "adapter"))) == 2
    assert "adapter_model.safetensors cannot be read" in capsys.readouterr().err
