"""First values of adapters that are made from the weight: from the dequantized one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from hqq_layers import assert_same_layer, quantized_layer
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import adapter_layer, relative_error, tiny_quantized, token_ids

import hqqlora
from hqqlora.peft import HQQLoraLinear, requantization_errors

N, K, R = 64, 128, 16

pytestmark = pytest.mark.filterwarnings("ignore:a changed weight:UserWarning")


def adapted(base: hqqlora.HQQLinear, init: Any, **options: Any) -> HQQLoraLinear:
    config = LoraConfig(
        **{
            "r": R,
            "lora_alpha": 8,
            "target_modules": ["0"],
            "init_lora_weights": init,
            **options,
        }
    )
    if init == "pissa_niter_8":
        torch.manual_seed(0)
    return get_peft_model(nn.Sequential(base), config).base_model.model[0].eval()


def loftq_config(iterations: int = 1, **options: Any) -> LoraConfig:
    """By assignment, as the constructor asks for scipy, which only PEFT's own LoftQ needs."""
    config = LoraConfig(**{"r": R, "lora_alpha": 8, "target_modules": ["0"], **options})
    config.init_lora_weights = "loftq"
    config.loftq_config = {"loftq_bits": 4, "loftq_iter": iterations}
    return config


def total(layer: HQQLoraLinear) -> torch.Tensor:
    return layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")


class TestPissaAndOlora:
    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_base_and_adapter_together_are_the_weight(
        self, init: str, dtype: torch.dtype
    ) -> None:
        base = quantized_layer(N, K, nbits=8, group_size=32, compute_dtype=dtype)
        before = base.dequantize(torch.float32)
        layer = adapted(base, init)
        assert layer.get_delta_weight("default").norm() > 0.1 * before.norm()
        # What is lost is lost by quantizing the rest again, and is stated.
        rest = before - layer.get_delta_weight("default")
        error = relative_error(layer.base_layer.dequantize(torch.float32), rest)
        assert layer.requantization_error == pytest.approx(error, rel=1e-3)
        assert 0 < error < 0.01
        assert relative_error(total(layer), before) < 0.01

    def test_pissa_takes_the_largest_singular_values(self) -> None:
        base = quantized_layer(N, K, nbits=8, group_size=32)
        before = base.dequantize(torch.float32)
        layer = adapted(base, "pissa")
        U, S, Vh = torch.linalg.svd(before)
        nearest = U[:, :R] * S[:R] @ Vh[:R]
        assert relative_error(layer.get_delta_weight("default"), nearest) < 1e-4

    def test_olora_takes_the_qr_decomposition(self) -> None:
        base = quantized_layer(N, K, nbits=8, group_size=32)
        Q, Rm = torch.linalg.qr(base.dequantize(torch.float32))
        layer = adapted(base, "olora")
        assert relative_error(layer.lora_B["default"].weight, Q[:, :R]) < 1e-5
        assert relative_error(layer.lora_A["default"].weight, Rm[:R]) < 1e-5

    def test_the_error_is_stated(self) -> None:
        with pytest.warns(UserWarning, match="quantized again to 4 bits: up to 0.1"):
            layer = adapted(quantized_layer(N, K, nbits=4, group_size=32), "pissa")
        assert 0.01 < layer.requantization_error < 0.1

    def test_pissa_leaves_less_to_be_rounded_than_the_weight_has(self) -> None:
        # A weight with a few strong directions, as trained ones have.
        dense = torch.randn(N, K) + 5 * torch.randn(N, 4) @ torch.randn(4, K)
        settings = hqqlora.BaseQuantizeConfig(nbits=4, group_size=32)
        base = hqqlora.HQQLinear.from_weights(dense, None, settings, torch.float32)
        first = (base.dequantize(torch.float32) - dense).norm()
        before = base.dequantize(torch.float32)
        layer = adapted(base, "pissa")
        assert (total(layer) - before).norm() < 0.5 * first

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_a_trained_one_is_loaded_on_the_same_base(
        self, tmp_path: Path, init: str, low_cpu_mem_usage: bool
    ) -> None:
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
        model = get_peft_model(tiny_quantized(), config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
            y = model(input_ids=token_ids()).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(
            tiny_quantized(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        ).eval()
        assert_same_layer(adapter_layer(model).base_layer, adapter_layer(again).base_layer)
        with torch.no_grad():
            assert torch.equal(again(input_ids=token_ids()).logits, y)

    def test_training_only_changes_the_adapter(self) -> None:
        layer = adapted(quantized_layer(N, K, group_size=32), "pissa").train()
        assert not any(p.requires_grad for p in layer.base_layer.parameters())
        layer(torch.randn(5, K)).sum().backward()
        assert layer.lora_A["default"].weight.grad.abs().max() > 0

    def test_merging_it_and_back(self) -> None:
        layer = adapted(quantized_layer(N, K, nbits=8, group_size=32), "pissa")
        before, error = copy.deepcopy(layer.base_layer), layer.requantization_error
        layer.merge()
        assert layer.requantization_error != error
        layer.unmerge()
        assert_same_layer(layer.base_layer, before)
        assert layer.requantization_error == error


class TestLoftq:
    @pytest.mark.parametrize("nbits", [4, 2])
    @pytest.mark.parametrize("iterations", [1, 4])
    def test_base_and_adapter_are_nearer_to_the_weight_than_the_base_alone(
        self, nbits: int, iterations: int
    ) -> None:
        base = quantized_layer(N, K, nbits=nbits, group_size=32)
        before = base.dequantize(torch.float32)
        model = get_peft_model(nn.Sequential(base), loftq_config(iterations))
        layer = model.base_model.model[0]
        alone = (layer.base_layer.dequantize(torch.float32) - before).norm()
        assert (total(layer) - before).norm() <= alone
        assert relative_error(total(layer), before) < 0.05 if nbits == 4 else 0.3

    def test_where_the_codes_miss_nothing_the_adapter_starts_as_usual(self) -> None:
        settings = hqqlora.BaseQuantizeConfig(nbits=4, group_size=32, solver="minmax")
        dense = torch.arange(16.0).repeat(N, K // 16)
        base = hqqlora.HQQLinear.from_weights(dense, None, settings, torch.float32)
        assert torch.equal(base.dequantize(), dense)
        layer = get_peft_model(nn.Sequential(base), loftq_config()).base_model.model[0]
        assert torch.equal(layer.base_layer.dequantize(), dense)
        assert layer.lora_A["default"].weight.abs().max() > 0
        assert not layer.lora_B["default"].weight.any()

    def test_from_the_dense_weights_it_corrects_what_quantizing_lost(self) -> None:
        from peft_models import tiny_llama

        dense = {
            name.removesuffix(".weight"): parameter.detach().clone()
            for name, parameter in tiny_llama().named_parameters()
        }
        config = LoraConfig(r=8, lora_alpha=4, target_modules=["q_proj", "up_proj"])
        model = get_peft_model(tiny_quantized(), config)
        hqqlora.peft.correct_quantization(model, dense.__getitem__)
        for name in ("q_proj", "up_proj"):
            layer = adapter_layer(model, name)
            exact = dense[f"model.layers.0.{'self_attn' if name == 'q_proj' else 'mlp'}.{name}"]
            base_error = (layer.base_layer.dequantize() - exact).norm()
            rest = torch.linalg.svdvals(exact - layer.base_layer.dequantize())[8:].norm()
            error = (total(layer) - exact).norm()
            assert error < base_error
            assert error.item() == pytest.approx(rest.item(), rel=1e-3)

    def test_importance_decides_which_errors_are_corrected(self) -> None:
        """Nearest in the outputs: the best of that rank, and of no other norm."""
        dense = {name: torch.randn(48, 64) for name in ("0", "1")}
        layers = []
        for weight in dense.values():
            linear = nn.Linear(64, 48, bias=False)
            linear.weight.data = weight.clone()
            config = hqqlora.BaseQuantizeConfig(nbits=2, group_size=64)
            layers.append(hqqlora.HQQLinear(linear, config, compute_dtype=torch.float32))
        importance = {"0": torch.linspace(0, 1, 64).exp().square() * 7}
        model = get_peft_model(
            nn.Sequential(*layers), LoraConfig(r=6, lora_alpha=3, target_modules=["0", "1"])
        )
        hqqlora.peft.correct_quantization(model, dense.__getitem__, importance=importance)
        for name, weight in dense.items():
            layer = model.base_model.model[int(name)]
            columns = importance[name].sqrt() if name in importance else torch.ones(64)
            lost = (weight - layer.base_layer.dequantize()) * columns
            error = ((weight - total(layer)) * columns).norm()
            rest = torch.linalg.svdvals(lost)[6:].norm()
            assert error.item() == pytest.approx(rest.item(), rel=1e-3)
        with pytest.raises(ValueError, match=r"0: the importance is \[63\], .* 64 inputs"):
            hqqlora.peft.correct_quantization(
                model, dense.__getitem__, importance={"0": torch.ones(63)}
            )


class TestOthers:
    def test_mica_takes_the_smallest_singular_values(self) -> None:
        base = quantized_layer(N, K, nbits=8, group_size=32)
        before = copy.deepcopy(base)
        try:
            layer = adapted(base, "mica")
        except (TypeError, ValueError):
            pytest.skip("this PEFT has no MiCA")
        U, _, _ = torch.linalg.svd(base.dequantize(torch.float32), full_matrices=False)
        assert relative_error(layer.lora_B["default"].weight.abs(), U[:, -R:].abs()) < 1e-3
        assert_same_layer(layer.base_layer, before)

    def test_eva_waits_for_data(self) -> None:
        base = quantized_layer(N, K, group_size=32)
        layer = adapted(base, "eva")
        x = torch.randn(5, K)
        assert torch.equal(layer(x), base(x))

    def test_corda_is_refused_and_nothing_is_changed(self) -> None:
        base = quantized_layer(N, K, group_size=32)
        before, model = copy.deepcopy(base), nn.Sequential(base)
        with pytest.raises(ValueError, match="'corda' is made from"):
            get_peft_model(
                model, LoraConfig(r=4, target_modules=["0"], init_lora_weights="corda")
            )
        assert model[0] is base
        assert_same_layer(base, before)

    def test_kasa_is_refused(self) -> None:
        from peft.tuners.lora import config

        if not hasattr(config, "KasaConfig"):
            pytest.skip("this PEFT has no KaSA")
        options = LoraConfig(r=4, target_modules=["0"], kasa_config=config.KasaConfig())
        with pytest.raises(ValueError, match="KaSA needs a weight that is not quantized"):
            get_peft_model(nn.Sequential(quantized_layer(N, K, group_size=32)), options)

    def test_no_initialisation_from_b_zero_changes_the_base(self) -> None:
        for init in (True, "gaussian", "orthogonal", False):
            base = quantized_layer(N, K, group_size=32)
            before = copy.deepcopy(base)
            layer = adapted(base, init)
            assert_same_layer(layer.base_layer, before)
            assert requantization_errors(layer) == {}
