"""hqq's interface to quantize, save and load models, on this library's layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hqqlora
from hqqlora import AutoHQQHFModel, HQQLinear
from hqqlora.auto_hqq_model import HQQModelForCausalLM

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
hqq = pytest.importorskip("hqq.core.quantize")

from hqq_layers import assert_same_layer  # noqa: E402
from hqq_models import (  # noqa: E402 (it needs all of these)
    IDS,
    TAGS,
    assert_same_weights,
    by_hqq,
    dense_llama,
    loaded,
    loaded_by_hqq,
    quantized_by_hqq,
    quantized_layers,
)
from vllm_rules import load_as_vllm  # noqa: E402


class TestOtherModels:
    """Read and written by us alone: hqq makes other classes of them, or loses parameters that
    belong to modules with submodules."""

    @staticmethod
    def t5() -> Any:
        config = transformers.T5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4
        )
        return transformers.T5ForConditionalGeneration(config)

    @staticmethod
    def bert() -> Any:
        config = transformers.BertConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
        return transformers.BertForSequenceClassification(config)

    @staticmethod
    def vit() -> Any:
        config = transformers.ViTConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=32,
        )
        return transformers.ViTForImageClassification(config)

    @pytest.mark.parametrize(
        ("make", "inputs"),
        [
            ("t5", {"input_ids": IDS, "decoder_input_ids": IDS}),
            ("bert", {"input_ids": IDS}),
            ("vit", {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}),
        ],
    )
    def test_they_come_back_bit_for_bit(
        self, tmp_path: Path, make: str, inputs: dict[str, Tensor]
    ) -> None:
        torch.manual_seed(0)
        config = hqqlora.BaseQuantizeConfig(group_size=32)
        model = getattr(self, make)()
        model = AutoHQQHFModel.quantize_model(model, config, torch.float32, "cpu")
        AutoHQQHFModel.save_quantized(model, tmp_path / "model")
        other = loaded(tmp_path / "model")
        assert type(other) is type(model)
        state, again = model.state_dict(), other.state_dict()
        assert state.keys() == again.keys()
        assert all(torch.equal(state[key], again[key]) for key in state)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, other(**inputs).logits)


class TestQuantizeModel:
    def test_the_same_layers_as_hqqs_get_hqqs_codes(self) -> None:
        config = {**hqq.BaseQuantizeConfig(group_size=32), "solver": "reference"}
        ours = AutoHQQHFModel.quantize_model(dense_llama(), config, torch.float32, "cpu")
        config.pop("solver")
        theirs = quantized_by_hqq(config)
        assert_same_weights(ours, theirs)

    def test_the_rest_gets_the_compute_dtype_but_computed_buffers(self) -> None:
        config = hqqlora.BaseQuantizeConfig()
        model: Any = AutoHQQHFModel.quantize_model(dense_llama(), config, torch.bfloat16, "cpu")
        assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
        layer = model.model.layers[0].mlp.up_proj
        assert layer.compute_dtype == layer.scale.dtype == torch.bfloat16
        expected = dense_llama().model.rotary_emb.inv_freq
        assert torch.equal(model.model.rotary_emb.inv_freq, expected)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_configurations_go_by_hqqs_tags(self) -> None:
        config = {
            "self_attn.q_proj": hqqlora.BaseQuantizeConfig(nbits=8),
            "self_attn.k_proj": None,
            "mlp.up_proj": hqq.BaseQuantizeConfig(nbits=2, group_size=16, axis=0),
        }
        model: Any = AutoHQQHFModel.quantize_model(
            dense_llama(num_hidden_layers=2), config, torch.float32, "cpu"
        )
        assert model.linear_tags == TAGS
        layers = quantized_layers(model, HQQLinear)
        assert {name: layer.nbits for name, layer in layers.items()} == {
            f"model.layers.{i}.{tag}": nbits
            for i in range(2)
            for tag, nbits in (("self_attn.q_proj", 8), ("mlp.up_proj", 2))
        }

    def test_a_tag_means_the_whole_name_without_numbers(self) -> None:
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Module()])
        model.layers[0].q = nn.Linear(64, 64)
        model.layers[0].cross = nn.Module()
        model.layers[0].cross.q = nn.Linear(64, 64)
        config = {"q": hqqlora.BaseQuantizeConfig(nbits=8)}
        AutoHQQHFModel.quantize_model(model, config, torch.float32, "cpu")
        assert model.linear_tags == ["cross.q", "q"]
        assert list(quantized_layers(model, HQQLinear)) == ["layers.0.q"]

    def test_a_tag_that_no_layer_has_is_warned_of(self) -> None:
        config = {tag: hqqlora.BaseQuantizeConfig() for tag in ("mlp.up_proj", "mlp.up_porj")}
        with pytest.warns(UserWarning, match=r"no linear layer has the tag 'mlp.up_porj'"):
            AutoHQQHFModel.quantize_model(dense_llama(), config, torch.float32, "cpu")

    def test_peft_puts_the_fused_layer_on_it(self) -> None:
        peft = pytest.importorskip("peft")
        config = hqqlora.BaseQuantizeConfig()
        model = AutoHQQHFModel.quantize_model(dense_llama(), config, torch.float32, "cpu")
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        with torch.profiler.profile() as profile:
            adapted(IDS, labels=IDS).loss.backward()
        names = {event.key for event in profile.key_averages()}
        assert "hqqlora::lora_linear_backward" in names
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert len(trained) == 2 * len(TAGS)
        assert all(parameter.grad is not None for parameter in trained)

    def test_save_pretrained_makes_a_checkpoint_for_from_pretrained_and_vllm(
        self, tmp_path: Path
    ) -> None:
        theirs = by_hqq(tmp_path / "hqq", torch.float16, group_size=64)
        ours: Any = loaded(tmp_path / "hqq", torch.float16)
        ours.save_pretrained(tmp_path / "transformers")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "transformers")
        assert again.dtype == torch.float16
        for name, layer in quantized_layers(ours, HQQLinear).items():
            assert_same_layer(again.get_submodule(name), layer)
            assert torch.equal(layer.W_q, theirs.get_submodule(name).W_q)
        assert len(load_as_vllm(tmp_path / "transformers")) == 4

    def test_a_second_time_it_does_nothing(self) -> None:
        config = hqqlora.BaseQuantizeConfig()
        model = AutoHQQHFModel.quantize_model(dense_llama(), config, torch.float32, "cpu")
        with pytest.warns(UserWarning, match="quantized already"):
            assert AutoHQQHFModel.quantize_model(model, config) is model

    def test_several_devices_are_refused_before_anything_is_changed(self) -> None:
        model = dense_llama()
        for device in (["cpu", "cpu"], {"model": "cpu"}):
            with pytest.raises(ValueError, match="only one device is supported"):
                AutoHQQHFModel.quantize_model(
                    model,
                    hqqlora.BaseQuantizeConfig(),
                    device=device,  # type: ignore[arg-type]
                )
        assert not quantized_layers(model, HQQLinear)

    def test_the_older_interface_has_methods_on_the_model(self, tmp_path: Path) -> None:
        dense_llama().save_pretrained(tmp_path / "dense")
        model: Any = HQQModelForCausalLM.from_pretrained(tmp_path / "dense")
        model.quantize_model(
            quant_config=hqqlora.BaseQuantizeConfig(), compute_dtype=torch.float32, device="cpu"
        )
        model.save_quantized(tmp_path / "quantized")
        assert_same_weights(model, loaded_by_hqq(tmp_path / "quantized"))


def test_a_real_model_still_knows_the_capital_of_france(tmp_path: Path, smollm2: Path) -> None:
    """SmolLM2 quantized, saved, loaded by both libraries."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=64)
    quantized = AutoHQQHFModel.quantize_model(dense, config, torch.bfloat16, "cpu")
    AutoHQQHFModel.save_quantized(quantized, tmp_path / "model")
    ours: Any = loaded(tmp_path / "model", torch.bfloat16)
    theirs = loaded_by_hqq(tmp_path / "model", torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    for model in (ours, theirs):
        tokens = model.generate(**prompt, max_new_tokens=2, do_sample=False)
        assert tokenizer.decode(tokens[0]).endswith("The capital of France is Paris.")
    with torch.no_grad():
        assert torch.equal(ours(**prompt).logits, quantized(**prompt).logits)
