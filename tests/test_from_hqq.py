"""hqq's own layers become ours and ours become hqq's: the same bits in the same memory."""

from typing import Any

import pytest
import torch
from hqq_layers import assert_same_layer, dense_layer, hqqs_layer, quantized_layer
from torch import Tensor, nn

from hqqlora import HQQLinear

hqq = pytest.importorskip("hqq.core.quantize")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [8, 4, 3, 2, 1]


def with_quantized_meta(compute_dtype: torch.dtype = torch.float32, axis: int = 1) -> Any:
    """What hqq made of quant_scale=True, quant_zero=True: its constructor has come to ignore
    the two, its `quantize` has not."""
    settings = hqq.BaseQuantizeConfig(
        group_size=8, axis=axis, quant_scale=True, quant_zero=True
    )
    layer = hqq.HQQLinear(
        None, settings, compute_dtype=compute_dtype, device="cpu", initialize=False
    )
    layer.quantize(dense_layer().weight.data, **layer.quant_config)
    assert "zero_q" in layer.meta
    assert "scale_q" in layer.meta
    return layer


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class TestFromHqq:
    @pytest.mark.parametrize("nbits", BITS)
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("view_as_float", [False, True])
    def test_the_weight_is_hqqs_bit_for_bit(
        self, nbits: int, axis: int, view_as_float: bool
    ) -> None:
        theirs = hqqs_layer(nbits=nbits, axis=axis, view_as_float=view_as_float)
        ours = HQQLinear.from_hqq(theirs)
        assert torch.equal(ours.dequantize(), theirs.dequantize())
        assert torch.equal(ours.bias, theirs.bias)
        assert (ours.nbits, ours.axis, ours.group_size) == (nbits, axis, 32)
        params = {**theirs.quant_config["weight_quant_params"]}
        assert ours.quant_config["weight_quant_params"] == params
        assert not any(p.requires_grad for p in ours.parameters())

    @pytest.mark.parametrize("compute_dtype", DTYPES)
    @pytest.mark.parametrize("view_as_float", [False, True])
    def test_the_memory_is_hqqs(self, compute_dtype: torch.dtype, view_as_float: bool) -> None:
        theirs = hqqs_layer(compute_dtype, view_as_float=view_as_float)
        ours = HQQLinear.from_hqq(theirs)
        assert ours.compute_dtype == ours.scale.dtype == ours.bias.dtype == compute_dtype
        for mine, other in (
            (ours.W_q, theirs.W_q),
            (ours.scale, theirs.meta["scale"]),
            (ours.zero, theirs.meta["zero"]),
            (ours.bias, theirs.bias),
        ):
            assert shares_memory(mine, other)

    @pytest.mark.parametrize("compute_dtype", DTYPES)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_scales_and_zeros_that_hqq_quantized_have_hqqs_bits(
        self, compute_dtype: torch.dtype, axis: int
    ) -> None:
        theirs = with_quantized_meta(compute_dtype, axis)
        ours = HQQLinear.from_hqq(theirs)
        assert shares_memory(ours.W_q, theirs.W_q)
        for mine, name in ((ours.scale, "scale"), (ours.zero, "zero")):
            meta = theirs.meta[f"meta_{name}"]
            expected = hqq.Quantizer.dequantize(theirs.meta[f"{name}_q"], meta)
            assert torch.equal(mine, expected)
        if compute_dtype == torch.float32:  # in 16 bits hqq rounds twice, this library once
            assert torch.equal(ours.dequantize(), theirs.dequantize())

    def test_scales_and_zeros_that_hqq_stacked_are_taken_apart(self) -> None:
        theirs = hqqs_layer()
        expected = theirs.dequantize()
        meta = theirs.meta  # by hand: hqq's offload_meta pins memory, which takes a GPU
        meta["zero_scale"] = torch.stack((meta.pop("zero"), meta.pop("scale")))
        assert torch.equal(theirs.dequantize(), expected)
        assert torch.equal(HQQLinear.from_hqq(theirs).dequantize(), expected)

    def test_scale_and_zero_of_two_dtypes_meet_in_the_wider_one(self) -> None:
        theirs = hqqs_layer()
        theirs.meta["scale"] = theirs.meta["scale"].half()
        ours = HQQLinear.from_hqq(theirs)
        assert ours.scale.dtype == ours.zero.dtype == torch.float32
        assert torch.equal(ours.dequantize(), theirs.dequantize())

    def test_gradients_flow_through_it(self) -> None:
        # A float32 layer of hqq's has its scale and zero from inference mode.
        ours = HQQLinear.from_hqq(hqqs_layer())
        x = torch.randn(3, 128, requires_grad=True)
        ours(x).sum().backward()
        torch.testing.assert_close(x.grad, ours.dequantize().sum(0).expand(3, 128))

    def test_it_stays_in_eval_mode_and_without_a_bias(self) -> None:
        ours = HQQLinear.from_hqq(hqqs_layer(bias=False).eval())
        assert ours.bias is None
        assert not ours.training

    def test_other_layers_are_refused(self) -> None:
        for layer in (nn.Linear(8, 8), quantized_layer()):
            with pytest.raises(TypeError, match="must be hqq's HQQLinear, not"):
                HQQLinear.from_hqq(layer)
        empty = hqq.HQQLinear(None, None, device="cpu", initialize=False)
        with pytest.raises(ValueError, match="has no weight yet"):
            HQQLinear.from_hqq(empty)
        with pytest.raises(ValueError, match="nbits=5 is not supported"):
            HQQLinear.from_hqq(hqqs_layer(nbits=5))


class TestToHqq:
    @pytest.mark.parametrize("nbits", BITS)
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("view_as_float", [False, True])
    def test_the_weight_is_ours_bit_for_bit_and_comes_back(
        self, nbits: int, axis: int, view_as_float: bool
    ) -> None:
        ours = quantized_layer(
            nbits=nbits, axis=axis, group_size=32, view_as_float=view_as_float
        )
        theirs = ours.to_hqq()
        assert type(theirs) is hqq.HQQLinear
        assert torch.equal(theirs.dequantize(), ours.dequantize())
        assert torch.equal(theirs.bias, ours.bias)
        assert (theirs.in_features, theirs.out_features) == (128, 64)
        assert shares_memory(theirs.W_q, ours.W_q) == (nbits != 3)  # which we have in planes
        assert shares_memory(theirs.meta["scale"], ours.scale)
        assert_same_layer(HQQLinear.from_hqq(theirs), ours)

    def test_hqqs_layer_computes(self) -> None:
        ours = quantized_layer(compute_dtype=torch.float32)
        x = torch.randn(3, 128)
        torch.testing.assert_close(ours.to_hqq()(x), ours(x))

    def test_scale_and_zero_get_the_compute_dtype_as_hqq_has_it(self) -> None:
        ours = quantized_layer(compute_dtype=torch.float16, meta_dtype=torch.float32)
        theirs = ours.to_hqq()
        assert torch.equal(theirs.meta["scale"], ours.scale.half())
        assert ours.scale.dtype == torch.float32

    def test_an_uninitialized_layer_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="no weight yet"):
            HQQLinear(None, None).to_hqq()
