"""`hqqlora info` says what is in a folder: layers, bits, sizes, errors, and what is dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_command import quantize, stored_tensors
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from tiny_models import save_tiny, tiny_llama, tiny_mixtral  # noqa: E402

# In memory already, each run plans in this process rather than in one of its own.
import hqqlora.transformers  # noqa: E402
from hqqlora import HQQLinear  # noqa: E402
from hqqlora.cli import main  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = '{"attn": {"nbits": 8}, "mlp": {"nbits": 3, "axis": 0}}'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense; 4-bit and mixed, by the command; qmodel, by hqq's way of saving; adapter."""
    base = tmp_path_factory.mktemp("info")
    save_tiny(tiny_llama(attention_bias=True), base / "dense", torch.bfloat16)
    assert quantize(base / "dense", base / "four", "--group-size", "32") == 0
    assert quantize(base / "dense", base / "mixed", "--dynamic-config", MIXED) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(base / "dense", dtype="auto")
    config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=32)
    hqqlora.AutoHQQHFModel.quantize_model(model, config, torch.bfloat16, device="cpu")
    hqqlora.AutoHQQHFModel.save_quantized(model, base / "qmodel")
    hqqlora.add_lora(model, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    hqqlora.save_adapter(model, base / "adapter")
    return base


def info(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["info", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def values(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(info(capsys, *arguments, "--json"))
    return found


def rows(text: str) -> dict[str, list[str]]:
    """First word of each line -> the others."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def test_a_row_for_each_kind_of_layer(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = rows(info(capsys, folders / "four"))
    # 4 bits, and two bfloat16 values for 32 weights
    assert table["model.layers.*.mlp.up_proj"] == [
        *("2", "128", "x", "64", "4", "32", "1", "5.00", "10.2", "kB")
    ]
    assert table["model.layers.*.self_attn.k_proj"][:4] == ["2", "32", "x", "64"]
    assert table["model.layers.*.self_attn.q_proj.bias"][:3] == ["2", "64", "bfloat16"]
    assert table["lm_head.weight"] == ["1", "96", "x", "64", "bfloat16", "12.3", "kB"]
    assert table["quantized:"] == [
        "14",
        "layers,",
        "0.1",
        "M",
        "weights,",
        "0.0",
        "MB,",
        "5.00",
        "bits",
        "a",
        "weight",
    ]


def test_a_row_for_every_layer(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(info(capsys, folders / "mixed", "--layers"))
    assert len([name for name in table if name.endswith("_proj")]) == 14
    assert table["model.layers.1.self_attn.q_proj"][4:7] == ["8", "64", "1"]
    assert table["model.layers.0.mlp.up_proj"][4:7] == ["3", "64", "0"]


@pytest.mark.parametrize("name", ["four", "mixed", "qmodel"])
def test_the_numbers_are_those_of_the_files(
    name: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = values(capsys, folders / name)
    if name == "qmodel":
        model = hqqlora.AutoHQQHFModel.from_quantized(folders / name, torch.bfloat16, "cpu")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folders / name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, HQQLinear)}
    assert {layer["name"] for layer in found["layers"]} == layers.keys()
    for layer in found["layers"]:
        m = layers[layer["name"]]
        m.repack(planes=False)  # as in the files
        assert layer["shape"] == [m.out_features, m.in_features]
        assert (layer["bits"], layer["group_size"], layer["axis"]) == (
            *(m.nbits, m.group_size, m.axis),
        )
        assert layer["bytes"] == m.W_q.nbytes + m.scale.nbytes + m.zero.nbytes
        assert layer["bits_per_weight"] == 8 * layer["bytes"] / (m.out_features * m.in_features)
    dense = {
        n: p for n, p in model.state_dict().items() if n.split(".")[-1] in ("weight", "bias")
    }
    assert {tensor["name"] for tensor in found["dense"]} == dense.keys()
    assert found["dense_bytes"] == sum(tensor.nbytes for tensor in dense.values())


@pytest.mark.parametrize("name", ["four", "mixed", "qmodel"])
def test_the_error_is_measured_against_the_dense_model(
    name: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = load_file(folders / "dense/model.safetensors")
    if name == "qmodel":
        model = hqqlora.AutoHQQHFModel.from_quantized(folders / name, torch.bfloat16, "cpu")
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folders / name)
    found = values(capsys, folders / name, "--against", folders / "dense")
    assert len(found["layers"]) == 14
    for layer in found["layers"]:
        W = dense[layer["name"] + ".weight"].double()
        Q = model.get_submodule(layer["name"]).dequantize(torch.float32).double()
        expected = float((W - Q).norm() / W.norm())
        assert layer["relative_error"] == pytest.approx(expected, rel=1e-5)
        assert 0.001 < expected < 0.3
    table = rows(info(capsys, folders / name, "--against", folders / "dense"))
    errors = [v["relative_error"] for v in found["layers"] if v["name"].endswith("up_proj")]
    assert table["model.layers.*.mlp.up_proj"][-2:] == [
        f"{sum(errors) / 2:.2%}",
        f"{max(errors):.2%}",
    ]


def test_an_adapter(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = info(capsys, folders / "adapter")
    table = rows(text)
    assert table["model.layers.*.self_attn.q_proj"][:5] == ["2", "64", "x", "64", "4"]
    count = 2 * 4 * (64 + 64) + 2 * 4 * (64 + 128)
    assert f"LoRA adapter: 4 layers, {count:,} parameters" in text
    assert "alpha 8" in text
    assert values(capsys, folders / "adapter")["adapter_parameters"] == count


def test_a_dense_model(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, folders / "dense")
    assert found["kind"] == "dense model"
    tensors = stored_tensors(folders / "dense")
    assert found["dense_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["layers"] == []


def test_experts_that_are_dense_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tiny_mixtral(num_hidden_layers=1, num_local_experts=2), tmp_path / "dense")
    skip = ("--skip-modules", "lm_head", "experts")
    assert quantize(tmp_path / "dense", tmp_path / "q", *skip) == 0
    text = info(capsys, tmp_path / "q")
    assert text.count("an expert, not quantized") == 3
    assert "of these, 6 could be expected to be quantized and are not: 0.2 MB" in text
    assert transformers.MixtralForCausalLM.from_pretrained(tmp_path / "q") is not None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_compared_expert_by_expert(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the checkpoint has them transposed, and square (down_proj of gpt_oss)."""
    model = getattr(tiny_models, f"tiny_{family}")(num_hidden_layers=1)
    save_tiny(model, tmp_path / "dense", torch.bfloat16)
    assert quantize(tmp_path / "dense", tmp_path / "q", "--group-size", "32") == 0
    quantized = type(model).from_pretrained(tmp_path / "q", dtype="auto")
    found = values(capsys, tmp_path / "q", "--against", tmp_path / "dense")
    layers = {la["name"].replace("block_sparse_moe", "mlp"): la for la in found["layers"]}
    for key in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{key}"
        W = model.get_parameter(name).detach().double()
        Q = quantized.get_submodule(name).dequantize(torch.float32).double()
        W = W.transpose(1, 2) if family == "gpt_oss" else W
        assert layers[name]["shape"] == list(W.shape)
        expected = float((W - Q).norm() / W.norm())
        assert layers[name]["relative_error"] == pytest.approx(expected, rel=1e-5)
        assert 0.01 < expected < 0.3
    assert not [tensor["name"] for tensor in found["dense"] if tensor["note"]]
    table = rows(info(capsys, tmp_path / "q", "--against", tmp_path / "dense"))
    assert table[next(name for name in table if name.endswith("down_proj"))][-1].endswith("%")


def test_quantized_experts_are_counted_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_mixtral(num_hidden_layers=1, num_local_experts=2)
    experts, out_features, in_features = model.model.layers[0].mlp.experts.down_proj.shape
    config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=32)
    hqqlora.quantize_model(model, config, progress=False).save_pretrained(tmp_path)
    (layer,) = [
        layer for layer in values(capsys, tmp_path)["layers"] if "down_proj" in layer["name"]
    ]
    assert layer["shape"] == [experts, out_features, in_features]
    assert layer["bits_per_weight"] == 4 + 2 * 32 / 32  # scale and zero in float32


# ---- --plot ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["mixed"], ["qmodel", "--against", "dense"], ["adapter"]],
    ids=" ".join,
)
def test_a_picture(
    arguments: list[str],
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folders)
    path = tmp_path / "info.png"
    assert f"drawn: {path}" in info(capsys, *arguments, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["info.png"]


def test_the_picture_shows_bits_or_errors_by_block(folders: Path) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    from hqqlora.info_command.contents import read_contents
    from hqqlora.info_command.errors_of_layers import relative_errors
    from hqqlora.info_command.plot import _draw_layers

    contents = read_contents(folders / "mixed")
    errors = relative_errors(contents.layers, str(folders / "dense"))
    for shown in (None, errors):
        axes = figure_module.Figure().subplots()
        _draw_layers(axes, contents, shown)
        drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
        assert len(drawn) == 7
        for depth, value in drawn["mlp.up_proj"]:
            name = f"model.layers.{int(depth)}.mlp.up_proj"
            layer = next(layer for layer in contents.layers if layer.name == name)
            assert value == (layer.bits_per_weight if shown is None else errors[name])


def test_without_matplotlib_the_command_that_installs_it_is_named(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert main(["info", str(folders / "four"), "--plot", "x.png"]) == 2
    expected = (
        "hqqlora info: the package matplotlib is not installed: pip install 'hqqlora[plot]'\n"
    )
    assert capsys.readouterr().err == expected


# ---- what cannot be shown ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        (["empty"], "has no config.json"),
        (["damaged"], "qmodel.pt is damaged"),
        (["four", "--against", "nowhere"], "nowhere: there is no such folder"),
        (["four", "--against", "mixed"], "is quantized already"),
        (["four", "--against", "other"], "has no weights of these layers"),
        (["four", "--against", "wide"], "has [128, 128]"),
        (["dense", "--against", "dense"], "--against: dense is a dense model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_shown(
    arguments: list[str],
    words: str,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folders)
    Path("empty").mkdir(exist_ok=True)
    Path("damaged").mkdir(exist_ok=True)
    Path("damaged/qmodel.pt").write_text("no model")
    if "other" in arguments:
        save_tiny(tiny_llama(transformers.LlamaModel), Path("other"))
    if "wide" in arguments:
        save_tiny(tiny_llama(hidden_size=128), Path("wide"))
    assert main(["info", *arguments]) == 2
    assert words in capsys.readouterr().err
