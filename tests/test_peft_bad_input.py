"""Adapters that do not belong, and layers that cannot be trained: one clear error each."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import fill_adapters, tiny_quantized, token_ids
from torch import nn


def adapter_files(folder: Path, config: dict[str, Any], **options: Any) -> Path:
    model = get_peft_model(
        tiny_quantized(**config),
        LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options}),
    )
    fill_adapters(model).save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


class TestAnAdapterForAnotherBase:
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("init", [True, "pissa"])
    def test_the_error_names_layer_found_and_expected_and_the_base_is_as_it_was(
        self, tmp_path: Path, low_cpu_mem_usage: bool, init: Any
    ) -> None:
        adapter_files(tmp_path, {"intermediate_size": 160}, init_lora_weights=init)
        base = tiny_quantized()
        base.lm_head.weight.requires_grad_(True)
        before, modules = logits(base), dict(base.named_modules())
        with pytest.raises(RuntimeError) as error:
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert (
            "layers.1.mlp.down_proj: lora_A of the adapter 'default' is [4, 160], but this "
            "layer (96 to 64 features) and r=4 call for [4, 96]: it was trained on another base"
        ) in str(error.value)
        assert dict(base.named_modules()) == modules
        assert torch.equal(logits(base), before)
        assert base.lm_head.weight.requires_grad
        assert not hasattr(base, "peft_config")
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["down_proj"]))
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("init", [True, "pissa"])
    def test_a_second_one_is_taken_out_again(self, tmp_path: Path, init: Any) -> None:
        adapter_files(tmp_path, {"intermediate_size": 160}, init_lora_weights=init)
        model = get_peft_model(tiny_quantized(), LoraConfig(r=4, target_modules=["q_proj"]))
        before = logits(fill_adapters(model))
        with pytest.raises(RuntimeError, match="down_proj: lora_A of the adapter 'other'"):
            model.load_adapter(tmp_path, "other")
        assert list(model.peft_config) == ["default"]
        assert not any("other" in name for name, _ in model.named_parameters())
        assert torch.equal(logits(model), before)

    def test_of_a_deeper_base(self, tmp_path: Path) -> None:
        adapter_files(tmp_path, {"num_hidden_layers": 3})
        base = tiny_quantized()
        before = logits(base)
        with pytest.raises(ValueError, match=r"values for 'model.layers.2.*trained on another"):
            PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(logits(base), before)

    def test_dense_models_are_loaded_as_before(self, tmp_path: Path) -> None:
        from peft_models import tiny_llama

        adapter_files(tmp_path, {"num_hidden_layers": 3})
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_target_modules_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="nothing_like_it"):
        get_peft_model(tiny_quantized(), LoraConfig(target_modules=["nothing_like_it"]))


def test_a_quantized_layer_cannot_be_a_module_to_save() -> None:
    base = tiny_quantized()
    modules = dict(base.named_modules())
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(ValueError, match=r"means model.layers.0.mlp.down_proj, .* to 4 bits"):
        get_peft_model(base, config)
    assert dict(base.named_modules()) == modules


def test_if_one_layer_cannot_be_adapted_none_is() -> None:
    base = tiny_quantized()
    before, modules = logits(base), dict(base.named_modules())
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="pissa",
        rank_pattern={"layers.1.mlp.down_proj": 0},
    )
    with pytest.raises(ValueError, match="should be a positive integer"):
        get_peft_model(base, config)
    assert dict(base.named_modules()) == modules
    assert torch.equal(logits(base), before)
