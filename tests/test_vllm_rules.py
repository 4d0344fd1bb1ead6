"""A checkpoint of ours passes vLLM's rules and means the same weight there; planted faults do
not pass. See tests/vllm_rules.py for the rules."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_rules import BrokenRuleError, load_as_vllm, stored_tensors

import hqqlora
from hqqlora import HqqConfig, HQQLinear

transformers = pytest.importorskip("transformers")

Q_PROJ = "model.layers.0.self_attn.q_proj"


def save_dense(folder: Path, architecture: str = "Llama", **config: Any) -> Path:
    shape = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model_config = getattr(transformers, f"{architecture}Config")(**{**shape, **config})
    torch.manual_seed(0)
    getattr(transformers, f"{architecture}ForCausalLM")(model_config).save_pretrained(folder)
    return folder


def save_quantized(
    folder: Path,
    quantization: Any = None,
    shard_size: str = "1GB",
    architecture: str = "Llama",
    **config: Any,
) -> Any:
    """What a user does: quantize on load, save."""
    dense = save_dense(folder / "dense", architecture, **config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense,
        quantization_config=quantization or HqqConfig(nbits=4, group_size=64),
        dtype=torch.float16,
    )
    model.save_pretrained(folder / "quantized", max_shard_size=shard_size)
    return model


def assert_same_weights(folder: Path, model: Any) -> None:
    """Every fused layer as vLLM loads it has the dequantized weights and biases of its parts,
    bit for bit (in float32)."""
    layers = load_as_vllm(folder)
    assert len(layers) == 4 * model.config.num_hidden_layers
    for layer in layers.values():
        parent = layer.name.rpartition(".")[0]
        parts = [model.get_submodule(f"{parent}.{part}") for part in layer.parts]
        assert {isinstance(part, HQQLinear) for part in parts} == {layer.quantized}
        dense = [
            part.dequantize(torch.float32) if layer.quantized else part.weight.float()
            for part in parts
        ]
        assert torch.equal(layer.weight(), torch.cat(dense))
        if layer.has_bias:
            bias = torch.cat([part.bias.float() for part in parts])
            assert torch.equal(layer.parameters["bias"], bias)


class TestOurCheckpointsPass:
    def test_what_save_pretrained_writes_means_the_same_in_vllm(self, tmp_path: Path) -> None:
        model = save_quantized(tmp_path)
        assert_same_weights(tmp_path / "quantized", model)

    def test_in_several_files(self, tmp_path: Path) -> None:
        model = save_quantized(tmp_path, shard_size="100KB")
        assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 1
        assert_same_weights(tmp_path / "quantized", model)

    @pytest.mark.parametrize(
        ("architecture", "config"),
        [
            ("Llama", {"attention_bias": True, "mlp_bias": True}),
            ("Llama", {"tie_word_embeddings": True, "head_dim": 64}),
            ("Mistral", {}),
            ("Qwen2", {}),
        ],
    )
    def test_models_with_biases_tied_embeddings_or_other_names(
        self, tmp_path: Path, architecture: str, config: dict[str, Any]
    ) -> None:
        model = save_quantized(tmp_path, None, "1GB", architecture, **config)
        assert_same_weights(tmp_path / "quantized", model)

    @pytest.mark.parametrize("skipped", ["mlp", "self_attn", "down_proj", "o_proj"])
    def test_skip_modules_that_name_a_part_of_vllms_names(
        self, tmp_path: Path, skipped: str
    ) -> None:
        config = HqqConfig(nbits=4, group_size=64, skip_modules=["lm_head", skipped])
        model = save_quantized(tmp_path, config)
        assert_same_weights(tmp_path / "quantized", model)

    def test_what_a_plain_state_dict_holds(self, tmp_path: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(save_dense(tmp_path))
        hqqlora.quantize_model(model, hqqlora.BaseQuantizeConfig(), progress=False)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "hqq",
            "quant_config": hqqlora.BaseQuantizeConfig(),
            "skip_modules": ["lm_head"],
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert_same_weights(tmp_path, model)


class TestWhatVllmCannotLoad:
    """Checkpoints that are fine here; vLLM has no place for them."""

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"nbits": 8}, "nbits is 8"),
            ({"nbits": 4, "group_size": 32}, "group_size is 32"),
            ({"nbits": 4, "axis": 0}, "axis is 0"),
            ({"nbits": 4, "view_as_float": True}, "W_q is torch.float16"),
            ({"skip_modules": ["lm_head", "q_proj"]}, "q_proj of .*: weight is no parameter"),
            ({"skip_modules": []}, r"lm_head\.\w+ is no parameter"),
            (
                {"dynamic_config": {"self_attn.q_proj": {"nbits": 4, "group_size": 64}}},
                "has no weight_quant_params",
            ),
        ],
    )
    def test_other_formats(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        save_quantized(tmp_path, HqqConfig(**config))
        with pytest.raises(BrokenRuleError, match=message):
            load_as_vllm(tmp_path / "quantized")

    def test_a_layer_whose_outputs_are_no_multiple_of_64(self, tmp_path: Path) -> None:
        save_quantized(tmp_path, None, "1GB", "Llama", intermediate_size=80)
        with pytest.raises(BrokenRuleError, match=r"gate_up_proj is \[160, 128\]"):
            load_as_vllm(tmp_path / "quantized")


class TestPlantedFaultsAreFound:
    @pytest.fixture(scope="class")
    def good(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("good")
        save_quantized(folder)
        return folder / "quantized"

    @pytest.fixture
    def folder(self, good: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(good, tmp_path / "checkpoint"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("quantization_config"), "no quantization_config"),
            (lambda c: c["quantization_config"].pop("quant_method"), "quant_method"),
            (lambda c: c["quantization_config"].pop("skip_modules"), "no skip_modules"),
            (
                lambda c: c["quantization_config"].update(
                    quant_config={"nbits": 4, "group_size": 64}
                ),
                "no weight_quant_params",
            ),
            (
                lambda c: c["quantization_config"].update(skip_modules=["mlp"]),
                r"model\.layers\.\d\.mlp\.\w+: \w+ is no parameter",
            ),
        ],
    )
    def test_in_config_json(
        self, folder: Path, change: Callable[[Any], object], message: str
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BrokenRuleError, match=message):
            load_as_vllm(folder)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("solver", torch.ones(1), "q_proj of .*: solver is no parameter"),
            ("meta_zero", torch.ones(1), "meta_zero is no parameter"),
            ("weight", torch.ones(128, 128), "weight is no parameter"),
            ("W_q", torch.zeros(128, 32, dtype=torch.uint8), "W_q has 8192 codes"),
            ("W_q", torch.zeros(256, 64, dtype=torch.uint8), "W_q has 32768 codes"),
            ("W_q", torch.zeros(128, 16, dtype=torch.float16), "W_q is torch.float16"),
            ("scale", torch.ones(512, 1), r"scale is \[512, 1\]"),
            ("zero", torch.ones(128, 1), r"zero is \[128, 1\]"),
            ("scale", torch.ones(256, 1, dtype=torch.uint8), "scale is torch.uint8"),
            ("W_q", None, r"qkv_proj: the checkpoint lacks \['q_proj.W_q'\]"),
            ("scale", None, r"qkv_proj: the checkpoint lacks \['q_proj.scale'\]"),
        ],
    )
    def test_in_a_layer(
        self, folder: Path, key: str, value: Tensor | None, message: str
    ) -> None:
        tensors = stored_tensors(folder)
        tensors.pop(f"{Q_PROJ}.{key}", None)
        if value is not None:
            tensors[f"{Q_PROJ}.{key}"] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BrokenRuleError, match=message):
            load_as_vllm(folder)

    def test_in_the_order_of_the_codes(self, folder: Path) -> None:
        expected = load_as_vllm(folder)
        tensors = load_file(folder / "model.safetensors")
        W_q = tensors[f"{Q_PROJ}.W_q"]
        tensors[f"{Q_PROJ}.W_q"] = W_q << 4 | W_q >> 4
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        actual = load_as_vllm(folder)
        different = [
            n for n, a in actual.items() if not torch.equal(a.weight(), expected[n].weight())
        ]
        assert different == ["model.layers.0.self_attn.qkv_proj"]

    def test_in_the_rest_of_the_model(self, folder: Path) -> None:
        tensors = stored_tensors(folder)
        for change, message in (
            ({"model.norm.weight": torch.ones(64)}, r"model\.norm\.weight is \[64\]"),
            ({"model.layers.9.mlp.up_proj.W_q": torch.ones(1)}, r"W_q is no parameter"),
        ):
            save_file({**tensors, **change}, folder / "model.safetensors", {"format": "pt"})
            with pytest.raises(BrokenRuleError, match=message):
                load_as_vllm(folder)
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(BrokenRuleError, match=r"lacks \['model\.norm\.weight'\]"):
            load_as_vllm(folder)
