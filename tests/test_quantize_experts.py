"""`hqqlora quantize` of mixtures of experts, whose experts are in one tensor for a projection,
or each in tensors of its own: it writes what `from_pretrained` and `save_pretrained` do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_command import assert_same_checkpoint, quantize, stored_tensors
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from tiny_models import assert_same_model, save_tiny  # noqa: E402

import hqqlora  # noqa: E402
from hqqlora import BaseQuantizeConfig, HqqConfig, HQQExpertWeights  # noqa: E402
from hqqlora.cli import main  # noqa: E402
from hqqlora.command.safetensors_file import FileWriter  # noqa: E402
from hqqlora.quantize_command import stream  # noqa: E402
from hqqlora.quantize_command.options import QuantizeOptions  # noqa: E402
from hqqlora.quantize_command.plan_apart import plan_here  # noqa: E402
from hqqlora.quantize_command.sizes import model_bytes, model_bytes_with  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
GROUP = ("--group-size", "32")


def tiny(family: str, **config: Any) -> Any:
    return getattr(tiny_models, f"tiny_{family}")(**config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint of each family, in bfloat16; and "fused", that of a Mixtral with the
    tensors that the model has, [experts, rows, columns]."""
    base = tmp_path_factory.mktemp("experts")
    for family in FAMILIES:
        save_tiny(tiny(family), base / family, torch.bfloat16)
    model = tiny("mixtral").to(torch.bfloat16)
    (base / "fused").mkdir()
    (base / "fused/config.json").write_bytes((base / "mixtral/config.json").read_bytes())
    save_file(model.state_dict(), base / "fused/model.safetensors", metadata={"format": "pt"})
    return base


def loaded(folder: Path, **options: Any) -> Any:
    """The model, of which no tensor was missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, **options
    )
    assert not any(info.values())
    return model


def experts_in(model: Any) -> dict[str, HQQExpertWeights]:
    return {n: m for n, m in model.named_modules() if isinstance(m, HQQExpertWeights)}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_from_pretrained_and_save_pretrained_do(
    family: str, folders: Path, tmp_path: Path
) -> None:
    expected = loaded(folders / family, quantization_config=HqqConfig(nbits=4, group_size=32))
    expected.save_pretrained(tmp_path / "expected")
    assert quantize(folders / family, tmp_path / "q", *GROUP) == 0
    assert_same_checkpoint(tmp_path / "q", tmp_path / "expected")
    model = loaded(tmp_path / "q")
    assert len(experts_in(model)) == (2 if family == "qwen2_moe" else 4)
    assert_same_model(model, expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "fused"])
def test_it_makes_what_quantize_model_makes(family: str, folders: Path, tmp_path: Path) -> None:
    expected = loaded(folders / family)
    hqqlora.quantize_model(expected, BaseQuantizeConfig(nbits=4, group_size=32), progress=False)
    assert quantize(folders / family, tmp_path / "q", *GROUP) == 0
    assert_same_model(loaded(tmp_path / "q"), expected)


SETTINGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "3 bits": (["--bits", "3", *GROUP], {"nbits": 3, "group_size": 32}),
    "columns": (["--axis", "0", "--group-size", "none"], {"axis": 0, "group_size": None}),
    "float32": ([*GROUP, "--dtype", "float32"], {"group_size": 32}),
    "mixed": (
        ["--dynamic-config", '{"attn": {"nbits": 8}, "experts.down_proj": {"nbits": 2}}'],
        {"dynamic_config": {"attn": {"nbits": 8}, "experts.down_proj": {"nbits": 2}}},
    ),
}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_option_means_what_it_does_in_the_configuration(
    name: str, family: str, folders: Path, tmp_path: Path
) -> None:
    """Also that bfloat16 weights are quantized as they are for float32 scales."""
    arguments, settings = SETTINGS[name]
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    transformers.AutoModelForCausalLM.from_pretrained(
        folders / family, quantization_config=HqqConfig(**settings), dtype=dtype
    ).save_pretrained(tmp_path / "expected")
    assert quantize(folders / family, tmp_path / "q", *arguments) == 0
    assert_same_checkpoint(tmp_path / "q", tmp_path / "expected")


def test_experts_of_one_projection_may_be_in_several_files(
    folders: Path, tmp_path: Path
) -> None:
    loaded(folders / "mixtral").save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 4
    assert quantize(tmp_path / "dense", tmp_path / "q", *GROUP) == 0
    assert quantize(folders / "mixtral", tmp_path / "expected", *GROUP) == 0
    assert_same_checkpoint(tmp_path / "q", tmp_path / "expected")


def test_what_stays_dense_is_named_with_its_reason(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(folders / "qwen2_moe", tmp_path / "q", *GROUP) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "quantized: 15 layers and 12 matrices of experts, 0.1 M weights" in text
    assert "model.layers.*.mlp.gate.weight 0.0 MB (a router)" in text
    skip = ("--skip-modules", "lm_head", "experts")
    assert quantize(folders / "qwen2_moe", tmp_path / "skipped", *GROUP, *skip) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "quantized: 15 layers, " in text
    assert (
        "6 x model.layers.*.mlp.experts.*.up_proj.weight 0.0 MB (not to be quantized)" in text
    )
    assert not experts_in(loaded(tmp_path / "skipped"))


def test_an_unknown_form_stays_dense_and_is_named(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As if transformers had joined them in a way that this library does not know."""
    from hqqlora.quantize_command import expert_plan

    class Unknown: ...

    monkeypatch.setattr(expert_plan, "Concatenate", Unknown)
    assert quantize(folders / "mixtral", tmp_path / "q", *GROUP) == 0
    text = capsys.readouterr().out
    assert re.search(r"8 x .*\.experts\.\*\.w3\.weight .*\(experts in a form that is not", text)
    assert {n.rpartition(".")[2] for n in experts_in(loaded(tmp_path / "q"))} == {"down_proj"}


# ---- sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_dry_runs_sizes_are_those_of_the_files(
    family: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan = plan_here(QuantizeOptions(str(folders / family), None, dry_run=True))
    assert quantize(folders / family, tmp_path / "q", "--bits", "2", *GROUP) == 0
    size = sum(tensor.nbytes for tensor in stored_tensors(tmp_path / "q").values())
    assert model_bytes_with(plan, 2, 32) == size
    assert model_bytes(plan) == model_bytes_with(plan, 4, 64)
    assert main(["quantize", str(folders / family), "--dry-run"]) == 0
    assert " and 16 matrices of experts, " in capsys.readouterr().out


# ---- interrupted, and damaged --------------------------------------------------------------


class Killed(BaseException):
    """Where a process would have ended."""


@pytest.mark.parametrize("family", ["mixtral", "fused"])
def test_ended_in_the_middle_of_an_expert_tensor_it_goes_on_and_ends_the_same(
    family: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (*GROUP, "--max-shard-size", "40KB")
    assert quantize(folders / family, tmp_path / "expected", *small) == 0
    write = FileWriter.write

    def failing(self: FileWriter, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        if re.search(r"layers\.1\..*gate_up_proj\.scale", name) and first:
            raise Killed  # the second expert, after its codes have been written
        write(self, name, tensor, first)

    with monkeypatch.context() as patch:
        patch.setattr(FileWriter, "write", failing)
        with pytest.raises(Killed):
            quantize(folders / family, tmp_path / "q", *small)
    done = list((tmp_path / "q").glob("*.safetensors"))
    assert done
    assert not (tmp_path / "q/config.json").exists()
    times = {path: path.stat().st_mtime_ns for path in done}
    for path in done:
        assert path.read_bytes() == (tmp_path / "expected" / path.name).read_bytes()
    assert quantize(folders / family, tmp_path / "q", *small) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert_same_checkpoint(tmp_path / "q", tmp_path / "expected")


def test_no_more_than_an_experts_matrix_is_read_at_a_time(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    quantize_weight = stream.quantize_weight

    def seen(weight: torch.Tensor, *arguments: Any) -> Any:
        sizes.append(tuple(weight.shape))
        return quantize_weight(weight, *arguments)

    monkeypatch.setattr(stream, "quantize_weight", seen)
    assert quantize(folders / "fused", tmp_path / "q", *GROUP) == 0
    assert sizes.count((256, 64)) == sizes.count((64, 128)) == 2 * 4


def damaged(folder: Path, copy: Path, **tensors: Any) -> Path:
    """A copy of a checkpoint with other tensors; None: without it."""
    state = {**load_file(folder / "model.safetensors"), **tensors}
    copy.mkdir()
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


BLOCK = "model.layers.0.block_sparse_moe.experts"
FUSED = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("family", "tensor", "change", "words"),
    [
        ("mixtral", f"{BLOCK}.2.w3.weight", None, "gate_up_proj has 4 experts, but"),
        ("mixtral", f"{BLOCK}.2.w2.weight", torch.randn(32, 128), "down_proj is"),
        ("mixtral", f"{BLOCK}.2.w2.weight", torch.full((64, 128), torch.inf), "expert 2, of"),
        ("fused", f"{FUSED}.down_proj", torch.randn(3, 64, 128), "has [4, 64, 128]"),
        ("fused", f"{FUSED}.down_proj", None, "has no model.layers.1.mlp.experts.down_proj,"),
    ],
    ids=["missing", "misshapen", "not finite", "too few", "no layer"],
)
def test_experts_that_are_missing_misshapen_or_not_finite(
    family: str,
    tensor: str,
    change: torch.Tensor | None,
    words: str,
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = None if change is None else change.to(torch.bfloat16)
    source = damaged(folders / family, tmp_path / "dense", **{tensor: other})
    assert quantize(source, tmp_path / "q", *GROUP) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert "model.layers." in error
    assert not (tmp_path / "q/config.json").exists()
