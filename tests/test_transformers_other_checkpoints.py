"""Checkpoints that others wrote: with older configurations, without metadata, or with layers
that hqq itself has quantized."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    assert_same_model,
    quantized_names,
    quantized_tiny,
    saved,
    tiny_llama,
)

from hqqlora.state_encoding import METADATA_KEYS  # noqa: E402

AutoCausal = transformers.AutoModelForCausalLM


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    return quantized_tiny(tmp_path, tiny_llama(), dtype=torch.bfloat16)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_a_flat_quant_config(tmp_path: Path, llama: Any) -> None:
    folder = saved(llama, tmp_path / "saved")

    def flatten(stored: dict[str, Any]) -> None:
        stored["quant_config"] = {
            "nbits": 4,
            "group_size": 32,
            "axis": 1,
            "quant_zero": False,
            "quant_scale": False,
            "offload_meta": False,
            "view_as_float": False,
        }

    rewrite(folder, flatten)
    again = AutoCausal.from_pretrained(folder)
    assert_same_model(again, llama)
    assert "weight_quant_params" in again.config.quantization_config.quant_config


def test_the_tensors_decide_and_not_the_configuration(tmp_path: Path, llama: Any) -> None:
    folder = saved(llama, tmp_path / "saved")

    def contradict(stored: dict[str, Any]) -> None:
        stored["quant_config"]["weight_quant_params"].update(nbits=2, group_size=16, axis=0)
        stored["skip_modules"] = []

    rewrite(folder, contradict)
    assert_same_model(AutoCausal.from_pretrained(folder), llama)


def test_without_metadata_the_configuration_decides(tmp_path: Path, llama: Any) -> None:
    from safetensors.torch import save_file

    folder = saved(llama, tmp_path / "saved")
    state = load_file(folder / "model.safetensors")
    bare = {k: v for k, v in state.items() if k.rpartition(".")[2] not in METADATA_KEYS}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same_model(AutoCausal.from_pretrained(folder), llama)


def test_layers_that_hqq_itself_has_quantized(tmp_path: Path) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    from safetensors.torch import save_file

    dense = tiny_llama()
    model = quantized_tiny(tmp_path, dense)
    folder = saved(model, tmp_path / "saved")
    state = load_file(folder / "model.safetensors")
    theirs = {}
    for name in quantized_names(model):
        layer = hqq.HQQLinear(
            copy.deepcopy(dense.get_submodule(name)),
            hqq.BaseQuantizeConfig(nbits=3, group_size=32, axis=0),
            compute_dtype=torch.float32,
            device="cpu",
        )
        theirs[name] = layer
        state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
        state.update({f"{name}.{k}": v for k, v in layer.state_dict().items()})
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    again = AutoCausal.from_pretrained(folder)
    for name, layer in theirs.items():
        ours = again.get_submodule(name)
        assert torch.equal(ours.state_dict()["W_q"], layer.W_q)
        assert torch.equal(ours.dequantize(), layer.dequantize())


def test_a_state_dict_without_files(llama: Any) -> None:
    state = {k: v.clone() for k, v in llama.state_dict().items()}
    config = copy.deepcopy(llama.config)
    config.quantization_config = llama.config.quantization_config.to_dict()
    again = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert_same_model(again, llama)
