"""A LoRALinear's adapter switched off, merged into its base and taken out again."""

import copy

import pytest
import torch
from lora_layers import K, adapted_layer, assert_close, formula, quantized_layer
from torch import nn

from hqqlora import HQQLinear, LoRALinear


class TestEnabling:
    def test_disabled_it_is_its_base(self) -> None:
        layer = adapted_layer(lora_bias=True)
        x = torch.randn(5, K)
        adapted = layer(x)
        layer.disable()
        assert not layer.enabled
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.enable()
        assert torch.equal(layer(x), adapted)

    def test_a_merged_adapter_cannot_be_disabled(self) -> None:
        layer = adapted_layer()
        layer.merge()
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"):
            layer.disable()


class TestMerging:
    @pytest.mark.parametrize("lora_bias", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_to_dense_is_exact(self, bias: bool, lora_bias: bool) -> None:
        layer = adapted_layer(bias, lora_bias=lora_bias).eval()
        x = torch.randn(5, K)
        dense = layer.to_dense()
        assert type(dense) is nn.Linear
        assert dense.weight.dtype == torch.float32
        assert dense.training is False
        assert (dense.bias is not None) == (bias or lora_bias)
        assert_close(dense(x), formula(layer, x))
        assert layer.to_dense(torch.bfloat16).weight.dtype == torch.bfloat16

    def test_to_dense_of_a_disabled_adapter_is_the_base(self) -> None:
        layer = adapted_layer(lora_bias=True)
        layer.disable()
        dense = layer.to_dense()
        assert torch.equal(dense.weight, layer.base_layer.dequantize())
        assert torch.equal(dense.bias, layer.base_layer.bias)
        assert dense.bias.data_ptr() != layer.base_layer.bias.data_ptr()

    @pytest.mark.parametrize("lora_bias", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("solver", ["default", "minmax"])
    def test_merging_quantizes_the_sum_with_the_layers_own_configuration(
        self, bias: bool, lora_bias: bool, solver: str
    ) -> None:
        layer = LoRALinear(quantized_layer(bias, nbits=8, solver=solver), lora_bias=lora_bias)
        layer.lora_B.data.normal_(std=0.02)
        if layer.lora_bias is not None:
            layer.lora_bias.data.normal_()
        expected = HQQLinear(
            layer.to_dense(), layer.base_layer.quant_config, compute_dtype=torch.float32
        )
        x = torch.randn(5, K)
        y = layer(x)
        layer.merge()
        assert layer.merged
        assert torch.equal(layer.base_layer.W_q, expected.W_q)
        assert torch.equal(layer(x), layer.base_layer(x))
        assert (layer(x) - y).norm() <= 0.02 * y.norm()

    @pytest.mark.parametrize("nbits", [4, 3])
    @pytest.mark.parametrize("bias", [True, False])
    def test_unmerging_brings_back_every_bit(self, nbits: int, bias: bool) -> None:
        layer = LoRALinear(quantized_layer(bias, nbits=nbits), lora_bias=True)
        layer.lora_B.data.normal_()
        layer.lora_bias.data.normal_()  # type: ignore[union-attr]
        before = copy.deepcopy(layer.base_layer.state_dict())
        layer.merge()
        assert not torch.equal(layer.base_layer.W_q, before["W_q"])
        layer.unmerge()
        assert not layer.merged
        after = layer.base_layer.state_dict()
        assert set(after) == set(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not any(buffer is not None for buffer in layer.buffers())
        assert not any(p.requires_grad for p in layer.base_layer.parameters())

    @pytest.mark.parametrize("view_as_float", [False, True])
    @pytest.mark.parametrize("bias", [True, False])
    def test_the_state_dict_is_the_same_merged_or_not(
        self, bias: bool, view_as_float: bool
    ) -> None:
        base = quantized_layer(bias, view_as_float=view_as_float)
        layer = LoRALinear(base, lora_bias=True, init_lora_weights=False)
        layer.lora_bias.data.normal_()  # type: ignore[union-attr]
        before = copy.deepcopy(layer.state_dict())
        layer.merge()
        after = layer.state_dict()
        assert after.keys() == before.keys()
        for key in before:  # as bytes: codes seen as floats may be NaN
            assert after[key].dtype == before[key].dtype
            assert after[key].numpy().tobytes() == before[key].numpy().tobytes()

    def test_loading_a_state_dict_unmerges(self) -> None:
        layer = adapted_layer()
        x = torch.randn(5, K)
        y, state = layer(x), copy.deepcopy(layer.state_dict())
        layer.merge()
        layer.load_state_dict(state)
        assert not layer.merged
        assert torch.equal(layer(x), y)

    def test_a_merged_layer_may_be_copied_moved_and_converted(self) -> None:
        layer = adapted_layer()
        layer.merge()
        other = copy.deepcopy(layer).to(torch.bfloat16)
        assert other.merged
        other.unmerge()
        layer.unmerge()
        assert torch.equal(other.base_layer.W_q, layer.base_layer.W_q)
        assert torch.equal(other.base_layer.scale, layer.base_layer.scale.bfloat16())

    def test_an_adapter_that_is_not_finite_is_refused_and_nothing_changes(self) -> None:
        layer = adapted_layer()
        before = layer.base_layer.W_q.clone()
        layer.lora_B.data[3, 1] = float("nan")
        with pytest.raises(ValueError, match=r"weight\[3, 0\] is nan"):
            layer.merge()
        assert not layer.merged
        assert torch.equal(layer.base_layer.W_q, before)
        assert not any(buffer is not None for buffer in layer.buffers())

    def test_merging_twice_or_unmerging_without_is_refused(self) -> None:
        layer = adapted_layer()
        with pytest.raises(RuntimeError, match="not merged"):
            layer.unmerge()
        layer.merge()
        with pytest.raises(RuntimeError, match="merged already"):
            layer.merge()
        layer.unmerge()
        layer.disable()
        with pytest.raises(RuntimeError, match="the adapter is off"):
            layer.merge()
