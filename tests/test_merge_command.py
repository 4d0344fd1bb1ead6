"""`hqqlora merge`: the folder it writes computes what base and adapter compute together."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_model_and_text
from torch import nn

import hqqlora
from hqqlora.cli import main

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

from peft_models import fill_adapters, relative_error, token_ids  # noqa: E402

from hqqlora.peft import merge_and_unload  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, small (model in 4 bits), and an adapter of each."""
    folder = save_model_and_text(tmp_path_factory.mktemp("merge"), lines=10)
    assert main(["quantize", str(folder / "model"), str(folder / "small")]) == 0
    for base in ("model", "small"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / base)
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = fill_adapters(peft.get_peft_model(model, lora), std=0.05)
        tuned.save_pretrained(folder / f"{base}-adapter")
    return folder


def merge(place: Path, base: str, output: Path, *more: str) -> int:
    return main(["merge", str(place / f"{base}-adapter"), str(output), *more])


def together(place: Path, base: str) -> Any:
    return peft.AutoPeftModelForCausalLM.from_pretrained(place / f"{base}-adapter").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=token_ids()).logits
    return found


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_into_the_bits_of_the_base(place: Path, tmp_path: Path, capsys: Any):
    assert merge(place, "small", tmp_path / "out") == 0
    found = loaded(tmp_path / "out")
    layers = [m for m in found.modules() if isinstance(m, hqqlora.HQQLinear)]
    assert len(layers) == 14
    assert {layer.nbits for layer in layers} == {4}
    assert torch.equal(logits(found), logits(merge_and_unload(together(place, "small"))))
    assert 0 < relative_error(logits(found), logits(together(place, "small"))) < 0.5
    said = capsys.readouterr()
    assert "into 14 layers, quantized again: " in said.out
    assert f"written: {tmp_path / 'out'}, " in said.out
    assert said.err.count("warn") == 0
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(("base", "options"), [("small", ["--dense"]), ("model", [])])
def test_into_dense_weights(place: Path, tmp_path: Path, base: str, options: list[str]):
    assert merge(place, base, tmp_path / "out", *options) == 0
    found = loaded(tmp_path / "out")
    assert not any(isinstance(m, hqqlora.HQQLinear) for m in found.modules())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert relative_error(logits(found), logits(together(place, base))) < 1e-5


def test_a_base_that_is_named_and_has_been_downloaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = tmp_path / "models--someone--small"
    shutil.copytree(place / "small", cache / "snapshots/0123")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert merge(place, "small", tmp_path / "by-name", "--base", "someone/small") == 0
    assert merge(place, "small", tmp_path / "by-path") == 0
    weights = [tmp_path / name / "model.safetensors" for name in ("by-name", "by-path")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_refused(place: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "there").mkdir()
    nameless = shutil.copytree(place / "small-adapter", tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    wide = shutil.copytree(place / "model", tmp_path / "wide")
    changed = json.loads((wide / "config.json").read_text()) | {"vocab_size": 300}
    (wide / "config.json").write_text(json.dumps(changed))
    for arguments, words in [
        (
            ["small-adapter", tmp_path / "there"],
            "exists already: give the name of",
        ),
        (["small", tmp_path / "out"], "is no adapter: it has no adapter_config.json"),
        (["small-adapter", tmp_path / "out", "--base", "no"], "--base no: there is no such"),
        ([nameless, tmp_path / "out"], "names no base: give --base"),
        (["small-adapter", tmp_path / "out", "--base", wide], "cannot load the model"),
    ]:
        assert main(["merge", str(place / arguments[0]), *map(str, arguments[1:])]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hqqlora merge: ")
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def full(self: nn.Module, folder: Path, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert merge(place, "small", tmp_path / "out") == 1
    assert f"cannot write {tmp_path / 'out'}: No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
