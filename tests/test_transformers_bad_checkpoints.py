"""Damaged and inconsistent quantized checkpoints: one error that names the layer, what is found
and what is expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    assert_same_model,
    quantized_names,
    save_tiny,
    tiny_llama,
    tiny_mixtral,
)

from hqqlora.transformers import HqqConfig  # noqa: E402

LAYER = "model.layers.1.mlp.up_proj"  # [128, 64] in groups of 32
NAME = r"model\.layers\.1\.mlp\.up_proj"
State = dict[str, Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, HqqConfig(nbits=4, group_size=32))


def make_checkpoint(tmp_path: Path, config: HqqConfig) -> Path:
    dense = save_tiny(tiny_llama(mlp_bias=True), tmp_path / "dense")
    load(dense, quantization_config=config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def rewrite(folder: Path, change: Callable[[State], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def put(key: str, value: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({f"{LAYER}.{key}": value})


def drop(*keys: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in keys:
            del state[f"{LAYER}.{key}"]

    return change


def drop_layer(state: State) -> None:
    for key in [key for key in state if key.startswith(f"{LAYER}.")]:
        del state[key]


def text(value: str) -> Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


def number(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("W_q"), "needs the tensors W_q, scale and zero"),
        (drop("scale"), "needs the tensors W_q, scale and zero"),
        (drop("zero"), "needs the tensors W_q, scale and zero"),
        (drop("bias"), "the model's layer has a bias, the checkpoint's has not"),
        (drop("nbits"), "the checkpoint says nothing about 'nbits'"),
        (drop("shape"), "the checkpoint says nothing about 'shape'"),
        (drop_layer, r"the checkpoint has no such layer, but it has model\.layers\.0\.mlp\.up"),
        (put("nbits", number(7)), "nbits=7 is not supported; supported are 8, 4, 3, 2, 1"),
        (put("nbits", number(8)), "packing '4bit_u8' does not fit nbits=8"),
        (put("nbits", torch.tensor([4, 4])), r"a number is stored as a tensor \[2\]"),
        (put("axis", number(2)), "axis=2 must be 1 .* or 0"),
        (put("group_size", number(0)), "group_size=0 must be positive"),
        (put("group_size", number(64)), r"W_q is .*\[128, 32\], but .* needs .*\[64, 64\]"),
        (put("group_size", number(96)), "group_size=96 does not divide the 8192 elements"),
        (put("shape", torch.tensor([128, 65])), "group_size=32 does not divide|needs"),
        (put("shape", torch.tensor([64, 128])), r"bias is \[128\], not \[64\]"),
        (put("shape", torch.tensor([128])), "is not .out_features, in_features"),
        (put("packing", text("9bit_u8")), "packing '9bit_u8' does not fit nbits=4"),
        (
            put("compute_dtype", text("__import__('os').abort()")),
            r"compute_dtype \"__import__.*\" is not one of torch\.float32",
        ),
        (
            put("W_q", torch.zeros(128, 31, dtype=torch.uint8)),
            r"W_q is torch\.uint8 \[128, 31\], but a \[128, 64\] weight of 4 bits, "
            r"group_size 32, axis 1 needs torch\.uint8 \[128, 32\]",
        ),
        (put("W_q", torch.zeros(128, 32, dtype=torch.int32)), r"W_q is torch\.int32"),
        (put("scale", torch.zeros(255, 1)), r"scale is torch\.float32 \[255, 1\], but"),
        (put("scale", torch.zeros(1, 256)), r"scale is \[1, 256\], not \[256, 1\]"),
        (put("zero", torch.zeros(256, 1, dtype=torch.int64)), r"zero is torch\.int64"),
        (put("bias", torch.zeros(127)), r"bias is \[127\], not \[128\]"),
    ],
)
def test_a_layer_that_is_not_whole(
    checkpoint: Path, change: Callable[[State], None], message: str
) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=f"{NAME}: .*({message})"):
        load(checkpoint)


def test_a_bias_that_the_model_does_not_know(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.update(mlp_bias=False))
    with pytest.raises(ValueError, match="the checkpoint's layer has a bias, the model's has"):
        load(checkpoint)


def test_a_model_of_another_size(checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.update(intermediate_size=192))
    with pytest.raises(
        ValueError, match=r"mlp\.\w+: the checkpoint's weight is \[.*\], the model's \[.*192"
    ):
        load(checkpoint)


def test_a_dense_checkpoint_that_calls_itself_quantized(checkpoint: Path) -> None:
    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    dense = checkpoint.parent / "dense"
    edit_config(dense, lambda config: config.update(quantization_config=stored))
    with pytest.raises(ValueError, match=r"quant_method 'hqq'.*has no quantized layer"):
        load(dense)


def test_dense_weights_in_the_place_of_a_quantized_layer(checkpoint: Path) -> None:
    """That is allowed: the layer was left out when the checkpoint was made."""

    def make_dense(state: State) -> None:
        drop_layer(state)
        state[f"{LAYER}.weight"] = torch.randn(128, 64)
        state[f"{LAYER}.bias"] = torch.randn(128)

    rewrite(checkpoint, make_dense)
    model = load(checkpoint)
    assert LAYER not in quantized_names(model)
    assert len(quantized_names(model)) == 13


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_truncated_file(checkpoint: Path, keep: float) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*"):
        load(checkpoint)


def test_a_file_whose_header_is_nonsense(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_config": {"nbits": 6}}, "quant_config: nbits=6 is not supported"),
        ({"quant_config": {"bits": 4}}, r"quant_config has unknown keys \['bits'\]"),
        ({"version": 2}, r"quantization_config has unknown keys \['version'\]"),
    ],
)
def test_a_configuration_with_unknown_values(
    checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    edit_config(checkpoint, lambda config: config["quantization_config"].update(change))
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_experts_that_were_quantized_one_by_one(tmp_path: Path) -> None:
    """Checkpoints of transformers 4. Version 5 has no place for them, and would start with
    random experts."""
    dense = save_tiny(tiny_mixtral(), tmp_path / "dense")
    model = load(dense, quantization_config=HqqConfig(group_size=32))
    model.save_pretrained(tmp_path / "saved")
    name = "model.layers.0.mlp.experts.0.w1"
    attention = "model.layers.0.self_attn.q_proj."

    def add_expert(state: State) -> None:
        layer = {k: v for k, v in state.items() if k.startswith(attention)}
        state.update({k.replace(attention, f"{name}."): v.clone() for k, v in layer.items()})

    rewrite(tmp_path / "saved", add_expert)
    with pytest.raises(ValueError, match=r"experts\.0\.w1: .* all experts in one tensor"):
        load(tmp_path / "saved")


def test_floats_for_codes_cannot_be_offloaded(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    folder = make_checkpoint(tmp_path, HqqConfig(view_as_float=True))
    device_map = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu"
    )
    device_map |= {"model.layers.1": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"layers\.1\..*cannot (be offloaded|offload)"):
        load(folder, device_map=device_map, offload_folder=tmp_path / "offloaded")


def test_a_failure_leaves_the_model_and_the_next_load_alone(checkpoint: Path) -> None:
    from hqqlora.transformers import HqqQuantizer

    files = [str(checkpoint / "model.safetensors")]
    expected = load(checkpoint)
    good = load_file(files[0])
    rewrite(checkpoint, put("nbits", number(7)))
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(tiny_llama(mlp_bias=True).config)
    quantizer = HqqQuantizer(HqqConfig(), pre_quantized=True)
    with pytest.raises(ValueError, match=NAME):
        quantizer.preprocess_model(skeleton, dtype=torch.float32, checkpoint_files=files)
    assert not quantized_names(skeleton)
    with pytest.raises(ValueError, match=NAME):
        load(checkpoint)
    save_file(good, files[0], metadata={"format": "pt"})
    assert_same_model(load(checkpoint), expected)
