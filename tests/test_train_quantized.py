"""`hqqlora train` on a model that `hqqlora quantize` has made: nothing dense is needed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_model_and_text

import hqqlora
from hqqlora.cli import main
from hqqlora.training import loop
from hqqlora.training.next_token_loss import NextTokenLoss

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("keep_threads")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model_and_text(tmp_path_factory.mktemp("quantized"), lines=200)
    more = ["--bits", "3", "--axis", "0", "--group-size", "32"]
    assert main(["quantize", str(folder / "model"), str(folder / "small"), *more]) == 0
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, dict[str, Any]]:
    assert main(train(place, "finished")) == 0
    return place / "finished", log_of(place / "finished")


def train(place: Path, output: str, *more: str) -> list[str]:
    return [
        *("train", "--model", str(place / "small"), "--data", str(place / "text.txt")),
        *("--threads", "1", "--sequence-length", "64", "--batch", "4", "--steps", "24"),
        *("--warmup", "2", "--learning-rate", "1e-2", "--rank", "8", "--sample-tokens", "0"),
        *("--dtype", "float32", "--output", str(place / output), *more),
    ]


def log_of(folder: Path) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((folder / "train_log.json").read_text())
    return log


def test_it_learns_on_the_layers_as_they_are(finished: tuple[Path, dict[str, Any]]):
    folder, log = finished
    assert set(log["perplexity"]) == {"tokens", "quantized", "fine_tuned"}
    assert log["perplexity"]["fine_tuned"] < 0.1 * log["perplexity"]["quantized"]
    assert log["linear_layers"]["count"] == 14
    # 3 bits, in planes; scale and zero, in the model's own dtype, of 32 weights
    assert log["linear_layers"]["bits_per_weight"] == 3 + 2 * 32 / 32
    assert "quantize" not in log["seconds"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_no_dense_column(finished: tuple[Path, dict[str, Any]], capsys: Any):
    folder, _ = finished
    main(["train", "--resume", "--output", str(folder)])
    heading = capsys.readouterr().out.splitlines()[2]
    assert heading.split("  ")[-2:] == ["quantized", " quantized + LoRA"]
    assert "dense" not in heading


def test_peft_finds_base_and_adapter(place: Path, finished: tuple[Path, dict[str, Any]]):
    """And with them the perplexity that was printed."""
    folder, log = finished
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    assert sum(isinstance(m, hqqlora.HQQLinear) for m in model.modules()) == 14
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "small")
    content = (place / "text.txt").read_text()
    held = content[content.rfind("\n", 0, round(0.9 * len(content))) + 1 :]
    ids = torch.tensor([*tokenizer(held).input_ids, tokenizer.eos_token_id])
    ids = ids[: len(ids) // 64 * 64].view(-1, 64)
    loss = NextTokenLoss(model.get_base_model().eval()).sum(ids) / ids[:, 1:].numel()
    assert log["perplexity"]["fine_tuned"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_stopped_run_goes_on(
    place: Path, finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    take = loop._take_step

    def take_five(*arguments: Any) -> None:
        if arguments[4].step == 5:
            raise KeyboardInterrupt
        take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_take_step", take_five)
        assert main(train(place, "stopped", "--checkpoint-every", "5")) == 130
    assert main(["train", "--resume", "--output", str(place / "stopped")]) == 0
    found, expected = log_of(place / "stopped"), finished[1]
    assert found["perplexity"] == expected["perplexity"]
    assert [s["loss"] for s in found["steps"]] == [s["loss"] for s in expected["steps"]]


@pytest.mark.parametrize(
    "option",
    [
        *(["--bits", "3"], ["--group-size", "32"], ["--axis", "0"], ["--solver", "minmax"]),
        *(["--importance"], ["--no-importance"]),
    ],
    ids=" ".join,
)
def test_its_format_is_not_chosen_again(place: Path, capsys: Any, option: list[str]):
    assert main(train(place, "not", *option)) == 2
    name = option[0].replace("no-", "")
    assert f"{name}: {place / 'small'} is quantized already" in capsys.readouterr().err
    assert not (place / "not").exists()
