"""Adapter files beside PEFT: PEFT reads ours, and we read PEFT's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layers import trained
from peft_models import dense_twin
from torch import nn

from hqqlora import (
    BaseQuantizeConfig,
    LoRALinear,
    add_lora,
    load_adapter,
    quantize_model,
    save_adapter,
)
from hqqlora.model import lora_layers

TOKENS = torch.arange(12).reshape(2, 6)
LINEAR_NAMES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


@pytest.fixture
def llama(transformers: Any) -> Any:
    """Builds the same tiny random Llama at each call."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )

    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config).eval()
        return model

    return build


def quantized(model: nn.Module) -> nn.Module:
    config = BaseQuantizeConfig(nbits=4, group_size=16)
    return quantize_model(model, config, progress=False).eval()


def dequantized(model: nn.Module) -> nn.Module:
    """The dense model with the weights that quantization leaves."""
    return dense_twin(quantized(model), torch.float32)


def assert_same_logits(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        logits, others = model(TOKENS).logits, other(TOKENS).logits
    assert torch.isfinite(logits).all()
    assert (logits - others).abs().max() <= 1e-5 * others.abs().max()


OPTIONS = [
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 8, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5}},
    {"r": 4, "lora_bias": True},
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*lora_bias.*", "ignore:Adapter")
class TestBesidePeft:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_peft_computes_the_same_with_our_adapter(
        self, options: dict[str, Any], llama: Any, peft: Any, tmp_path: Path
    ) -> None:
        model = trained(add_lora(quantized(llama()), **options))
        save_adapter(model, tmp_path)
        base = dequantized(llama())
        with torch.no_grad():
            assert (base(TOKENS).logits - model(TOKENS).logits).abs().max() > 0.01
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        assert_same_logits(theirs, model)
        theirs = peft.PeftModel.from_pretrained(quantized(llama()), tmp_path).eval()
        assert_same_logits(theirs, model)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_we_compute_the_same_with_pefts_adapter(
        self, options: dict[str, Any], llama: Any, peft: Any, tmp_path: Path
    ) -> None:
        config = peft.LoraConfig(
            **{"target_modules": "all-linear", "lora_dropout": 0.1, **options},
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(2)
        theirs = peft.get_peft_model(dequantized(llama()), config).eval()
        theirs.save_pretrained(tmp_path)
        model = load_adapter(quantized(llama()), tmp_path)
        expected = 4 if "target_modules" in options else 14
        assert len(list(lora_layers(model))) == expected
        assert all(layer.lora_dropout == 0.1 for _, layer in lora_layers(model))
        assert_same_logits(model, theirs)

    def test_the_targets_in_our_file_are_what_peft_users_write(
        self, llama: Any, tmp_path: Path
    ) -> None:
        save_adapter(add_lora(quantized(llama())), tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["target_modules"] == LINEAR_NAMES
        assert config["task_type"] == "CAUSAL_LM"

    def test_pefts_dora_is_refused_by_name(self, llama: Any, peft: Any, tmp_path: Path) -> None:
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="DoRA is not supported"):
            load_adapter(quantized(llama()), tmp_path)

    def test_all_linear_leaves_out_a_quantized_output_layer(self, transformers: Any) -> None:
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
        model = transformers.LlamaForCausalLM(config)
        quantize_model(
            model, BaseQuantizeConfig(group_size=16), skip_modules=[], progress=False
        )
        add_lora(model, r=2)
        assert not isinstance(model.lm_head, LoRALinear)
        assert len(list(lora_layers(model))) == 7
