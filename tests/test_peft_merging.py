"""Adapters merged into few bits, with their error stated, and back; or exactly into dense
layers."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from hqq_layers import assert_same_layer, quantized_layer
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import (
    adapter_layer,
    copy_adapters,
    dense_twin,
    fill_adapters,
    relative_error,
    tiny_quantized,
    token_ids,
)

import hqqlora
from hqqlora.peft import HQQLoraLinear, merge_and_unload, requantization_errors

EIGHT_BITS = hqqlora.BaseQuantizeConfig(nbits=8, group_size=32)

pytestmark = pytest.mark.filterwarnings("ignore:a changed weight:UserWarning")


def adapted(quant: Any = EIGHT_BITS, **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    return fill_adapters(get_peft_model(tiny_quantized(quant=quant), config)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def bases(model: nn.Module) -> dict[str, hqqlora.HQQLinear]:
    """Copies of all quantized layers, by the names they have without adapters."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): copy.deepcopy(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, hqqlora.HQQLinear)
    }


def assert_bases(model: nn.Module, before: dict[str, hqqlora.HQQLinear]) -> None:
    after = bases(model)
    assert after.keys() == before.keys()
    for name, layer in after.items():
        assert_same_layer(layer, before[name])


class TestIntoFewBits:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("nbits", [8, 4, 3])
    def test_the_sum_is_quantized_as_the_base_was(self, nbits: int, bias: bool) -> None:
        base = quantized_layer(bias=bias, nbits=nbits, group_size=32)
        before = copy.deepcopy(base)
        model = nn.Sequential(base)
        model = fill_adapters(get_peft_model(model, LoraConfig(r=4, target_modules=["0"])))
        layer = model.base_model.model[0]
        expected = copy.deepcopy(base)
        sum_ = base.dequantize(torch.float32) + layer.get_delta_weight("default")
        expected.requantize(sum_)
        model.merge_adapter()
        assert_same_layer(layer.base_layer, expected)
        x = torch.randn(5, base.in_features)
        assert torch.equal(layer(x), layer.base_layer(x))
        error = relative_error(layer.base_layer.dequantize(torch.float32), sum_)
        assert layer.requantization_error == pytest.approx(error, rel=1e-5)
        assert 0 < error < {8: 0.01, 4: 0.12, 3: 0.25}[nbits]
        model.unmerge_adapter()
        assert_same_layer(layer.base_layer, before)
        assert layer.requantization_error is None
        assert not any(buffer is not None for buffer in layer.buffers())

    @pytest.mark.filterwarnings("default")
    def test_the_error_is_stated_once_for_all_layers(self) -> None:
        model = adapted(hqqlora.BaseQuantizeConfig(nbits=4, group_size=32))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            model.merge_adapter()
        said = [str(w.message) for w in caught if "quantized again to 4 bits" in str(w.message)]
        assert 1 <= len(said) <= 2
        assert "up to 0.1 of it" in " ".join(said)
        errors = requantization_errors(model)
        assert len(errors) == 14
        assert max(errors.values()) <= 0.1 or "up to 1 of it" in " ".join(said)
        model.unmerge_adapter()
        assert requantization_errors(model) == {}

    def test_the_model_gives_nearly_the_same(self) -> None:
        model = adapted()
        before = logits(model)
        model.merge_adapter()
        assert 0 < relative_error(logits(model), before) < 0.05
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)

    def test_merging_one_by_one_is_merging_at_once(self) -> None:
        results = []
        for steps in ([["a", "b"]], [["a"], ["b"]]):
            model = adapted()
            for seed, name in enumerate(("a", "b")):
                model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
                fill_adapters(model, seed=seed + 5)
            before = bases(model)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already following")
                for names in steps:
                    model.merge_adapter(names)
            results.append(bases(model))
            model.unmerge_adapter()
            assert_bases(model, before)
        for name, layer in results[0].items():
            assert_same_layer(layer, results[1][name])

    def test_disabling_a_merged_adapter_unmerges_it(self) -> None:
        model = adapted()
        with model.disable_adapter():
            base = logits(model)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), base)

    def test_merging_twice_or_unmerging_without_is_only_warned_of(self) -> None:
        model = adapted()
        model.merge_adapter()
        before = bases(model)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        assert_bases(model, before)
        model.unmerge_adapter()
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()

    @pytest.mark.parametrize("safe_merge", [True, False])
    def test_an_adapter_that_is_not_finite_changes_nothing(self, safe_merge: bool) -> None:
        model = adapted()
        layer = adapter_layer(model)
        layer.lora_A["default"].weight.data[1, 2] = float("nan")
        before = copy.deepcopy(layer.base_layer)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights") as error:
            layer.merge(safe_merge)
        assert "layers.0.self_attn.q_proj" in str(error.value) or not layer.target_name
        assert_same_layer(layer.base_layer, before)
        assert not layer.merged
        assert not any(buffer is not None for buffer in layer.buffers())

    def test_a_merged_model_may_be_copied_and_converted(self) -> None:
        model = adapted()
        model.merge_adapter()
        other = copy.deepcopy(model).to(torch.bfloat16)
        other.unmerge_adapter()
        model.unmerge_adapter()
        layer, twin = adapter_layer(model).base_layer, adapter_layer(other).base_layer
        assert torch.equal(layer.W_q, twin.W_q)
        assert torch.equal(layer.scale.bfloat16(), twin.scale)

    def test_merge_and_unload_gives_quantized_layers(self) -> None:
        model = adapted()
        model.merge_adapter()
        merged_bases, y = bases(model), logits(model)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        assert not any(isinstance(m, HQQLoraLinear) for m in merged.modules())
        assert_bases(merged, merged_bases)
        assert torch.equal(logits(merged), y)

    def test_unloading_gives_the_base(self) -> None:
        model = adapted()
        before = bases(model)
        assert_bases(model.unload(), before)


class TestBias:
    def test_the_base_keeps_its_bias(self) -> None:
        layer = adapter_layer(adapted())
        bias = layer.base_layer.bias.clone()
        assert bias.abs().min() > 0
        layer.merge()
        assert torch.equal(layer.base_layer.bias, bias)

    def test_a_lora_bias_is_added_to_it_and_taken_out(self) -> None:
        layer = adapter_layer(adapted(lora_bias=True, target_modules=["q_proj"]))
        bias = layer.base_layer.bias.clone()
        layer.merge()
        own = layer.scaling["default"] * layer.lora_B["default"].bias
        assert torch.equal(layer.base_layer.bias, bias + own)
        layer.unmerge()
        assert torch.equal(layer.base_layer.bias, bias)

    def test_without_a_bias_to_add_it_to_nothing_is_changed(self) -> None:
        with pytest.warns(UserWarning, match="has no bias"):
            model = adapted(lora_bias=True, target_modules=["down_proj"])
        layer = adapter_layer(model, "down_proj")
        before = copy.deepcopy(layer.base_layer)
        with pytest.raises(RuntimeError, match="the base layer has no bias"):
            layer.merge()
        assert_same_layer(layer.base_layer, before)


class TestIntoDenseLayers:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_rslora": True},
            {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
            {"use_dora": True},
        ],
        ids=str,
    )
    def test_it_is_exact(self, options: dict[str, Any]) -> None:
        model = adapted(hqqlora.BaseQuantizeConfig(nbits=2, group_size=32), **options)
        before = logits(model)
        merged = merge_and_unload(model, dequantize=True)
        kinds = {type(m) for m in merged.modules() if "Linear" in type(m).__name__}
        assert kinds == {nn.Linear}
        assert relative_error(logits(merged), before) < 1e-5
        assert requantization_errors(merged) == {}

    def test_weight_and_adapter_are_added_in_float32_and_rounded_once(self) -> None:
        model = adapted()
        layer = adapter_layer(model)
        sum_ = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")
        bias = layer.base_layer.bias
        merged = merge_and_unload(model, dequantize=True, dtype=torch.bfloat16)
        dense = adapter_layer(merged)
        assert torch.equal(dense.weight, sum_.bfloat16())
        assert torch.equal(dense.bias, bias.bfloat16())

    def test_the_result_is_saved_as_any_dense_model(self, tmp_path: Any) -> None:
        from transformers import AutoModelForCausalLM

        merged = merge_and_unload(adapted(target_modules=["v_proj"]), dequantize=True)
        assert not hasattr(merged, "hqq_quantized")
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.equal(logits(again), logits(merged))

    def test_a_model_from_transformers_forgets_that_it_was_quantized(
        self, tmp_path: Any
    ) -> None:
        transformers = pytest.importorskip("hqqlora.transformers")
        from peft_models import tiny_llama
        from transformers import AutoModelForCausalLM

        tiny_llama().save_pretrained(tmp_path / "dense")
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense",
            quantization_config=transformers.HqqConfig(nbits=4, group_size=32),
            dtype=torch.float32,
        )
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["v_proj"]))
        before = logits(fill_adapters(model).eval())
        merged = merge_and_unload(model, dequantize=True)
        assert relative_error(logits(merged), before) < 1e-5
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert not hasattr(again.config, "quantization_config")
        assert torch.equal(logits(again.eval()), logits(merged))

    def test_what_was_merged_into_few_bits_before_is_merged_exactly(self) -> None:
        model = adapted(hqqlora.BaseQuantizeConfig(nbits=3, group_size=32))
        before = logits(model)
        model.merge_adapter()
        merged = merge_and_unload(model, dequantize=True)
        assert relative_error(logits(merged), before) < 1e-5

    def test_trained_modules_stay(self) -> None:
        model = adapted(modules_to_save=["lm_head"])
        model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
        before = logits(model)
        merged = merge_and_unload(model, dequantize=True)
        assert type(merged.lm_head) is nn.Linear
        assert relative_error(logits(merged), before) < 1e-5

    def test_chosen_adapters(self) -> None:
        model = adapted()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
        fill_adapters(model, seed=9)
        model.set_adapter("other")
        before = logits(model)
        model.set_adapter("default")
        merged = merge_and_unload(model, dequantize=True, adapter_names=["other"])
        assert relative_error(logits(merged), before) < 1e-5

    @pytest.mark.parametrize("dequantize", [True, False])
    @pytest.mark.parametrize("merged_before", [True, False])
    def test_on_an_error_the_model_is_as_it_was(
        self, dequantize: bool, merged_before: bool
    ) -> None:
        model = adapted()
        model.add_adapter("bad", LoraConfig(r=2, target_modules=["down_proj"]))
        layer = adapter_layer(model, "down_proj", 1)
        layer.lora_A["bad"].weight.data[0, 0] = float("inf")
        if merged_before:
            model.merge_adapter()
        before, y = bases(model), logits(model)
        with pytest.raises(ValueError, match=r"NaNs detected.*bad"):
            merge_and_unload(model, dequantize=dequantize, adapter_names=["default", "bad"])
        assert_bases(model, before)
        assert torch.equal(logits(model), y)
        assert layer.merged_adapters == (["default"] if merged_before else [])
        model.delete_adapter("bad")
        merge_and_unload(model, dequantize=dequantize)

    def test_a_model_without_adapters_is_refused(self) -> None:
        with pytest.raises(TypeError, match="not a PEFT model"):
            merge_and_unload(nn.Sequential(nn.Linear(4, 4)))


class TestAgainstTheDenseModel:
    def test_it_is_what_peft_merges_on_a_dense_base(self) -> None:
        base = tiny_quantized(quant=EIGHT_BITS)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        twin = fill_adapters(get_peft_model(dense_twin(base, torch.float32), config))
        model = fill_adapters(get_peft_model(base, config))
        copy_adapters(model, twin)
        ours = merge_and_unload(model, dequantize=True)
        theirs = twin.merge_and_unload()
        for (name, parameter), other in zip(
            ours.named_parameters(), theirs.parameters(), strict=True
        ):
            assert relative_error(parameter, other) < 1e-6, name
