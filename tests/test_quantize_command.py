"""`hqqlora quantize` writes what `from_pretrained` and `save_pretrained` would have written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_command import assert_same_checkpoint, quantize, stored_config, stored_tensors
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    assert_same_model,
    quantized_names,
    save_tiny,
    tiny_bert,
    tiny_llama,
    tiny_llava,
    tiny_model,
    tiny_qwen2,
    tiny_t5,
)

from hqqlora import (  # noqa: E402
    BaseQuantizeConfig,
    HqqConfig,
    input_importance,
    quantize_model,
)
from hqqlora.cli import main  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dense Llama in bfloat16."""
    return save_tiny(tiny_llama(), tmp_path_factory.mktemp("llama"), torch.bfloat16)


def loaded(model: Any, folder: Path, **options: Any) -> Any:
    return type(model).from_pretrained(folder, **options)


MODELS = {
    "llama": lambda: tiny_llama(attention_bias=True),
    "qwen2": tiny_qwen2,
    "gemma": lambda: tiny_model("gemma"),
    "t5": tiny_t5,
    "bert": tiny_bert,
    "vit": lambda: tiny_model("vit"),
    "llava": tiny_llava,
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in MODELS), ("t5", torch.float16)],
    ids=str,
)
def test_it_writes_what_from_pretrained_and_save_pretrained_do(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = MODELS[family]()
    save_tiny(model, tmp_path / "dense", dtype)
    config = HqqConfig(nbits=4, group_size=32)
    expected = loaded(model, tmp_path / "dense", quantization_config=config, dtype="auto")
    expected.save_pretrained(tmp_path / "expected")
    assert quantize(tmp_path / "dense", tmp_path / "q", "--group-size", "32") == 0
    assert_same_checkpoint(tmp_path / "q", tmp_path / "expected")
    assert_same_model(loaded(model, tmp_path / "q", dtype="auto"), expected)


def test_with_importance_it_writes_what_quantize_model_makes(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    importance = input_importance(model)
    quantize_model(model, config, progress=False, importance=importance)
    model.save_pretrained(tmp_path / "expected")
    assert quantize(llama, tmp_path / "q", "--group-size", "32", "--importance") == 0
    assert f"importance: of {len(importance) - 1} layers" in capsys.readouterr().out
    expected = stored_tensors(tmp_path / "expected")
    mine = stored_tensors(tmp_path / "q")
    for name, tensor in mine.items():
        assert torch.equal(tensor, expected[name]), name


def test_layers_that_tokens_do_not_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tiny_llava(), tmp_path / "dense", torch.float32)
    options = ("--group-size", "32", "--importance")
    assert quantize(tmp_path / "dense", tmp_path / "q", *options) == 0
    said = capsys.readouterr().out
    assert "importance: of 7 layers" in said
    assert "the other 14 are quantized without, such as" in said


def test_importance_that_cannot_be_had(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--importance", "--solver", "reference")
    assert quantize(llama, tmp_path / "q", *options) == 2
    assert "--importance needs --solver default, not reference" in capsys.readouterr().err
    save_tiny(tiny_model("vit"), tmp_path / "vit", torch.float32)
    assert quantize(tmp_path / "vit", tmp_path / "q", "--importance", "--group-size", "32") == 2
    assert "--importance: ViTModel has no input embeddings" in capsys.readouterr().err


def test_it_writes_what_quantize_model_makes(llama: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    quantize_model(model, BaseQuantizeConfig(nbits=4, group_size=32), progress=False)
    model.save_pretrained(tmp_path / "expected")
    assert quantize(llama, tmp_path / "q", "--group-size", "32") == 0
    expected = stored_tensors(tmp_path / "expected")
    mine = stored_tensors(tmp_path / "q")
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in mine)


SETTINGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "8 bits": (["--bits", "8"], {"nbits": 8}),
    "3 bits": (["--bits", "3"], {"nbits": 3}),
    "axis 0": (["--axis", "0"], {"axis": 0}),
    "whole rows": (["--group-size", "none"], {"group_size": None}),
    "min/max": (["--solver", "minmax"], {"solver": "minmax"}),
    "float16": (["--dtype", "float16"], {}),
    "skip": (["--skip-modules", "lm_head", "down_proj"], {"skip": ["lm_head", "down_proj"]}),
    "skip nothing": (["--skip-modules"], {"skip": []}),
    "mixed": (
        ["--dynamic-config", '{"attn": {"nbits": 8}, "mlp": {"nbits": 2, "group_size": 16}}'],
        {"dynamic_config": {"attn": {"nbits": 8}, "mlp": {"nbits": 2, "group_size": 16}}},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_option_means_what_it_does_in_the_configuration(
    name: str, llama: Path, tmp_path: Path
) -> None:
    arguments, settings = SETTINGS[name]
    skip = settings.pop("skip", ["lm_head"])
    config = HqqConfig(**{"group_size": 64, **settings}, skip_modules=skip)
    dtype = torch.float16 if name == "float16" else torch.bfloat16
    transformers.AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=config, dtype=dtype
    ).save_pretrained(tmp_path / "expected")
    assert quantize(llama, tmp_path / "q", *arguments) == 0
    assert_same_checkpoint(tmp_path / "q", tmp_path / "expected")


def test_shards_have_an_index_and_no_layer_is_divided(llama: Path, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(llama, dtype="auto").save_pretrained(
        tmp_path / "dense", max_shard_size="60KB"
    )
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    assert quantize(llama, tmp_path / "whole") == 0
    assert quantize(tmp_path / "dense", tmp_path / "q", "--max-shard-size", "20KB") == 0
    files = sorted(path.name for path in (tmp_path / "q").glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    tensors = stored_tensors(tmp_path / "q")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name in tensors:
        if name.endswith(".W_q"):
            places = {index["weight_map"][name[:-3] + key] for key in ("W_q", "zero", "shape")}
            assert len(places) == 1
    assert_same_checkpoint(tmp_path / "q", tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert len(quantized_names(model)) == 14


def test_what_goes_with_the_weights_is_copied(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "dense")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "spiece.model"):
        (tmp_path / "dense" / name).write_text(name)
    for name in ("pytorch_model.bin", ".hidden", "flax_model.msgpack"):
        (tmp_path / "dense" / name).write_text("not this")
    assert quantize(tmp_path / "dense", tmp_path / "q") == 0
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "spiece.model",
        "tokenizer.json",
    ]
    assert (tmp_path / "q" / "spiece.model").read_text() == "spiece.model"


def with_tensors(folder: Path, copy: Path, **tensors: Any) -> Path:
    """A copy of a checkpoint with other tensors; None: without it."""
    shutil.copytree(folder, copy)
    state = {**load_file(folder / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_tied_weight_that_is_stored_twice_is_written_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tiny_qwen2(), tmp_path / "dense")
    embedding = load_file(tmp_path / "dense/model.safetensors")["model.embed_tokens.weight"]
    twice = {"lm_head.weight": embedding.clone()}
    source = with_tensors(tmp_path / "dense", tmp_path / "twice", **twice)
    assert quantize(source, tmp_path / "q", "--skip-modules") == 0
    assert "lm_head.weight: the same as model.embed_tokens.weight" in capsys.readouterr().out
    assert quantize(tmp_path / "dense", tmp_path / "expected", "--skip-modules") == 0
    assert_same_checkpoint(tmp_path / "q", tmp_path / "expected")


def test_one_that_differs_is_kept(tmp_path: Path) -> None:
    save_tiny(tiny_qwen2(), tmp_path / "dense")
    other = {"lm_head.weight": torch.randn(96, 64)}
    source = with_tensors(tmp_path / "dense", tmp_path / "twice", **other)
    assert quantize(source, tmp_path / "q", "--skip-modules") == 0
    assert torch.equal(
        stored_tensors(tmp_path / "q")["lm_head.weight"], other["lm_head.weight"]
    )


def test_what_stays_dense_is_named_with_its_reason(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"model.layers.0.mtp.weight": torch.randn(4, 4, dtype=torch.bfloat16)}
    source = with_tensors(llama, tmp_path / "dense", **extra)
    assert quantize(source, tmp_path / "q", "--skip-modules", "lm_head", "down_proj") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "quantized: 12 layers" in text
    assert "2 x model.layers.*.mlp.down_proj.weight 0.0 MB (not to be quantized)" in text
    assert "lm_head.weight 0.0 MB (not to be quantized)" in text
    assert "model.embed_tokens.weight" in text
    assert "model.layers.*.mtp.weight 0.0 MB (the model has no such tensor)" in text
    copied = stored_tensors(tmp_path / "q")["model.layers.0.mtp.weight"]
    assert torch.equal(copied, extra["model.layers.0.mtp.weight"])


# ---- --dry-run -----------------------------------------------------------------------------


def test_a_dry_run_reads_headers_alone_and_writes_nothing(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama, tmp_path / "dense")
    weights = tmp_path / "dense" / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # the header's numbers without the data
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    assert main(["quantize", str(tmp_path / "dense"), "--dry-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert "quantized: 14 layers, 0.1 M weights" in capsys.readouterr().out


@pytest.mark.parametrize(("bits", "group"), [(8, 16), (4, 64), (3, 32), (2, None), (1, 128)])
def test_a_dry_runs_sizes_are_those_of_the_files(
    bits: int, group: int | None, llama: Path, tmp_path: Path
) -> None:
    from hqqlora.quantize_command.options import QuantizeOptions
    from hqqlora.quantize_command.plan_apart import plan_here
    from hqqlora.quantize_command.sizes import model_bytes, model_bytes_with

    _, plan = plan_here(QuantizeOptions(str(llama), None, bits=8, group_size=128, dry_run=True))
    chosen = ["--bits", str(bits), "--group-size", str(group).lower()]
    assert quantize(llama, tmp_path / "q", *chosen) == 0
    size = sum(tensor.nbytes for tensor in stored_tensors(tmp_path / "q").values())
    assert model_bytes_with(plan, bits, group) == size
    assert model_bytes(plan) == model_bytes_with(plan, 8, 128)
    assert model_bytes_with(plan, 4, 3 * 64) is None


# ---- what cannot be done -------------------------------------------------------------------


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """The one line that the command says."""
    assert main(["quantize", *map(str, arguments)]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hqqlora quantize: ")
    return error


def test_what_is_no_dense_model(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(llama, tmp_path / "bin")
    (tmp_path / "bin/model.safetensors").rename(tmp_path / "bin/pytorch_model.bin")
    shutil.copytree(llama, tmp_path / "short")
    with (tmp_path / "short/model.safetensors").open("r+b") as file:
        file.truncate(1000)
    shutil.copytree(llama, tmp_path / "unknown")
    config = {**stored_config(llama), "architectures": ["LlamaForMindReading"]}
    (tmp_path / "unknown/config.json").write_text(json.dumps(config))
    assert quantize(llama, tmp_path / "quantized") == 0
    for name, words in {
        "nowhere": "there is no such folder",
        "empty": "has no config.json",
        "bin": "has neither model.safetensors nor model.safetensors.index.json (only pytorch",
        "short": "short/model.safetensors is not a whole safetensors file",
        "unknown": "architectures=['LlamaForMindReading']",
        "quantized": "is quantized already (hqq): give the dense model",
    }.items():
        assert words in fails(capsys, 2, tmp_path / name, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_weight_that_is_missing_misshapen_or_not_finite(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(llama / "model.safetensors")[layer]
    broken = weight.clone()
    broken[2, 3] = float("nan")
    for name, (tensor, words) in {
        "missing": (None, f"has no {layer}"),
        "misshapen": (weight[:64].clone(), f"{layer} is [64, 64]"),
        "broken": (broken, "weight[2, 3] is nan"),
    }.items():
        source = with_tensors(llama, tmp_path / name, **{layer: tensor})
        error = fails(capsys, 2, source, tmp_path / "q")
        assert words in error
        assert layer in error
    assert not (tmp_path / "q/config.json").exists()
    assert not list((tmp_path / "q").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--group-size", "48"], "group_size=48 does not divide"),
        (["--group-size", "0"], "--group-size: 0 is not a positive integer or 'none'"),
        (["--bits", "5"], "--bits: invalid choice"),
        (["--skip-modules", "*"], "no layer of LlamaForCausalLM is to be quantized"),
        (["--dynamic-config", '{"experts": {"nbits": 4}}'], "means no linear layer"),
        (["--dynamic-config", '{"mlp": {"nbits": 7}}'], "nbits=7"),
        (["--dynamic-config", "{"], "--dynamic-config: not JSON"),
        (["--max-shard-size", "5"], "is not a size such as 500MB or 5GB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be(
    arguments: list[str],
    words: str,
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in fails(capsys, 2, llama, tmp_path / "q", *arguments)
    assert not (tmp_path / "q").exists()


def test_a_destination_is_needed(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "DST is missing" in fails(capsys, 2, llama)
