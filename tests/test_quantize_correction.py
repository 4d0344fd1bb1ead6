"""`hqqlora quantize --correction`: an adapter, beside the quantized weights, that gives back
the best part of what they have lost; killed and resumed, of the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_command import quantize, stored_tensors
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_models import save_tiny, tiny_llama, tiny_model  # noqa: E402

import hqqlora  # noqa: E402
from hqqlora.quantize_command import correction, job, stream  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

RANK = 8
OPTIONS = ("--bits", "2", "--group-size", "32", "--correction", str(RANK))
SMALL_FILES = ("--max-shard-size", "20KB")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("llama"), torch.bfloat16)


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without interruption writes, in several files."""
    folder = tmp_path_factory.mktemp("whole") / "q"
    assert quantize(llama, folder, *OPTIONS, *SMALL_FILES) == 0
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def errors(dense: Path, folder: Path, columns: dict[str, torch.Tensor]) -> list[list[float]]:
    """Of each layer |(W - Q) c| and |(W - Q - BA) c|, and the least that its rank allows."""
    weights = load_file(dense / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, folder, subfolder="correction")
    found = []
    for name, layer in tuned.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        lost = weights[f"{name}.weight"].float() - layer.base_layer.dequantize(torch.float32)
        c = columns.get(name, torch.ones(lost.size(1)))
        rest = (lost - layer.get_delta_weight("default")) * c
        least = torch.linalg.svdvals(lost * c)[RANK:].norm()
        found.append([float((lost * c).norm()), float(rest.norm()), float(least)])
    assert len(found) == 14
    return found


@pytest.mark.parametrize(
    "more", [(), ("--importance",), ("--axis", "0", "--bits", "3")], ids=str
)
def test_peft_loads_the_nearest_correction(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    columns: dict[str, torch.Tensor] = {}
    finish = job.finish_correction

    def noting(folder: Path, shards: Any, config: Any) -> None:
        for step in (step for steps in shards.values() for step in steps):
            if step.importance is not None:
                squares = step.importance.float()
                columns[step.module] = squares.clamp_min(0.01 * squares.mean()).sqrt()
        finish(folder, shards, config)

    monkeypatch.setattr(job, "finish_correction", noting)
    assert quantize(llama, tmp_path / "q", *OPTIONS, *more) == 0
    assert len(columns) == (14 if "--importance" in more else 0)
    for before, after, least in errors(llama, tmp_path / "q", columns):
        assert after < 0.9 * before
        assert after == pytest.approx(least, rel=1e-2)


def test_model_and_correction_compute_with_their_sum(llama: Path, whole: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(
        model, whole, subfolder="correction", is_trainable=True
    )
    layer = tuned.get_base_model().model.layers[1].mlp.down_proj
    factors = load_file(whole / "correction/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj"
    B, A = factors[f"{name}.lora_B.weight"], factors[f"{name}.lora_A.weight"]
    x = torch.randn(5, A.size(1))
    expected = x @ (layer.base_layer.dequantize(torch.float32) + 2 * B @ A).T
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert layer.lora_A["default"].weight.requires_grad
    config = json.loads((whole / "correction/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(whole)
    assert (config["r"], config["lora_alpha"]) == (RANK, 2 * RANK)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(whole / "correction")
    assert sum(isinstance(m, hqqlora.HQQLinear) for m in again.modules()) == 14


def test_the_weights_are_those_without_it(llama: Path, whole: Path, tmp_path: Path) -> None:
    assert quantize(llama, tmp_path / "q", *OPTIONS[:-2]) == 0
    plain, mine = stored_tensors(tmp_path / "q"), stored_tensors(whole)
    assert plain.keys() == mine.keys()
    assert all(torch.equal(plain[name], mine[name]) for name in plain)
    assert not (tmp_path / "q/correction").exists()


class Killed(BaseException):
    """Where a process would have ended, without a handler's help."""


@pytest.mark.parametrize("where", ["part", "parts", "whole", "config"])
def test_killed_and_resumed_it_is_of_the_same_bytes(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Between the factors and the weights of the third file; before all factors become one;
    after; and before the parts are removed."""
    folder, count = tmp_path / "q", 0

    def killed(*arguments: Any, **named: Any) -> Any:
        raise Killed

    write_shard = stream.Stream.write_shard

    def third(self: Any, path: Path, steps: Any) -> None:
        nonlocal count
        count += 1
        write_shard(self, path, steps)
        if count == 3:  # factors that are whole, of weights that are not
            path.unlink()
            raise Killed

    with monkeypatch.context() as patch:
        if where == "part":
            patch.setattr(stream.Stream, "write_shard", third)
        elif where == "parts":
            patch.setattr(job, "finish_correction", killed)
        elif where == "whole":
            patch.setattr(correction, "write_json", killed)
        else:
            patch.setattr(correction, "remove_folder", killed)
        with pytest.raises(Killed):
            quantize(llama, folder, *OPTIONS, *SMALL_FILES)
    assert not (folder / "config.json").exists()
    assert quantize(llama, folder, *OPTIONS, *SMALL_FILES) == 0
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) == files
    for file in files:
        if file.name != "adapter_config.json":  # which names its folder
            assert (folder / file).read_bytes() == (whole / file).read_bytes(), file


def test_weights_whose_factors_are_lost_are_made_again(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def killed(*arguments: Any) -> None:
        raise Killed

    folder = tmp_path / "q"
    with monkeypatch.context() as patch:
        patch.setattr(job, "finish_correction", killed)
        with pytest.raises(Killed):
            quantize(llama, folder, *OPTIONS, *SMALL_FILES)
    part = sorted((folder / ".correction").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-1])
    capsys.readouterr()
    assert quantize(llama, folder, *OPTIONS, *SMALL_FILES) == 0
    count = len(list(whole.glob("*.safetensors")))
    assert f"going on: {count - 1} of {count} files are done" in capsys.readouterr().out
    path = "correction/adapter_model.safetensors"
    assert (folder / path).read_bytes() == (whole / path).read_bytes()


def test_another_rank_is_refused_on_what_was_begun(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(job, "finish_correction", killed)
        with pytest.raises(Killed):
            quantize(llama, tmp_path / "q", *OPTIONS)
    assert quantize(llama, tmp_path / "q", *OPTIONS[:-1], "4") == 2
    assert "begun with --correction 8, not 4" in capsys.readouterr().err


def test_experts_are_left_out_and_counted(tmp_path: Path, capsys: Any) -> None:
    save_tiny(tiny_model("mixtral"), tmp_path / "dense", torch.float32)
    options = ("--group-size", "32", "--correction", "4")
    assert quantize(tmp_path / "dense", tmp_path / "q", *options) == 0
    said = capsys.readouterr().out
    assert "matrices of experts are left out" in said
    factors = load_file(tmp_path / "q/correction/adapter_model.safetensors")
    assert factors
    assert not any("expert" in name for name in factors)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    peft.PeftModel.from_pretrained(model, tmp_path / "q", subfolder="correction")


def test_a_rank_that_a_layer_cannot_have(llama: Path, tmp_path: Path, capsys: Any) -> None:
    assert quantize(llama, tmp_path / "q", "--correction", "200") == 2
    assert "no correction of it has a rank above" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_a_dry_run_says_its_size(llama: Path, tmp_path: Path, capsys: Any) -> None:
    assert quantize(llama, tmp_path / "q", *OPTIONS, "--dry-run") == 0
    assert f"correction: rank {RANK}, of 14 layers, " in capsys.readouterr().out
    shutil.rmtree(tmp_path)
