"""HQQLinear is an ordinary module around a quantized weight, in hqq's format."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from format_oracle import BITS
from hqq_layers import assert_same_layer, dense_layer, quantized_layer
from torch import Tensor, nn

from hqqlora import BaseQuantizeConfig, HQQLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_close(actual: Tensor, expected: Tensor, in_features: int) -> None:
    """Within the rounding of sums of in_features products, and of the result."""
    assert torch.isfinite(actual).all()
    eps = max(torch.finfo(actual.dtype).eps, in_features * torch.finfo(torch.float32).eps)
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= 2 * eps * expected.abs().max().item()


# ---- quantizing --------------------------------------------------------------------------


class TestQuantizing:
    @pytest.mark.parametrize(("nbits", "error"), [(8, 0.004), (4, 0.07), (3, 0.15), (2, 0.34)])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_the_weight_is_near_the_dense_one(
        self, nbits: int, error: float, axis: int
    ) -> None:
        weight = dense_layer().weight.detach()
        layer = quantized_layer(nbits=nbits, group_size=32, axis=axis)
        difference = layer.dequantize() - weight
        assert (difference.norm() / weight.norm()).item() <= error

    def test_the_dense_parameters_are_freed_or_kept(self) -> None:
        dense = dense_layer()
        HQQLinear(dense, BaseQuantizeConfig(), del_orig=False)
        assert dense.weight is not None
        assert dense.bias is not None
        HQQLinear(dense, BaseQuantizeConfig())
        assert dense.weight is None
        assert dense.bias is None

    def test_everything_is_frozen(self) -> None:
        layer = quantized_layer()
        assert {name for name, _ in layer.named_parameters()} == {
            "W_q",
            "scale",
            "zero",
            "bias",
        }
        assert not any(p.requires_grad for p in layer.parameters())

    @pytest.mark.parametrize("nbits", BITS)
    @pytest.mark.parametrize("axis", [0, 1])
    def test_tensors_have_hqqs_shapes_and_dtypes(self, nbits: int, axis: int) -> None:
        layer = quantized_layer(64, 128, nbits=nbits, group_size=32, axis=axis)
        groups = 64 * 128 // 32
        rows, columns = (groups, 32) if axis == 1 else (32, groups)
        per = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[nbits]
        layer.repack(planes=False)  # 3 bits are in planes otherwise: tests/test_planes.py
        assert tuple(layer.W_q.shape) == (-(-rows // per), columns)
        assert layer.W_q.dtype == (torch.int32 if nbits == 3 else torch.uint8)
        assert tuple(layer.scale.shape) == ((groups, 1) if axis == 1 else (1, groups))
        assert layer.zero.shape == layer.scale.shape

    def test_without_a_group_size_a_row_or_a_column_is_a_group(self) -> None:
        assert quantized_layer(64, 128, group_size=None, axis=1).group_size == 128
        assert quantized_layer(64, 128, group_size=None, axis=0).group_size == 64

    def test_dtypes_are_hqqs_default_or_as_asked(self) -> None:
        layer = HQQLinear(dense_layer(), BaseQuantizeConfig())
        assert layer.compute_dtype == layer.scale.dtype == torch.float16
        assert layer.bias.dtype == layer.dequantize().dtype == torch.float16
        layer = quantized_layer(compute_dtype=torch.bfloat16, meta_dtype=torch.float32)
        assert layer.scale.dtype == layer.zero.dtype == torch.float32
        assert layer.bias.dtype == layer.dequantize().dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_dense_weight_may_be_of_any_floating_dtype(self, dtype: torch.dtype) -> None:
        dense = dense_layer().to(dtype)
        expected = HQQLinear.from_weights(
            dense.weight.detach().float(), None, BaseQuantizeConfig()
        )
        layer = HQQLinear(dense, BaseQuantizeConfig())
        assert torch.equal(layer.dequantize(), expected.dequantize())

    def test_from_weights_is_the_same_as_from_a_layer(self) -> None:
        dense = dense_layer()
        assert_same_layer(
            HQQLinear.from_weights(dense.weight, dense.bias, BaseQuantizeConfig()),
            HQQLinear(dense, BaseQuantizeConfig()),
        )

    def test_the_solver_is_the_one_the_configuration_names(self) -> None:
        names = ("default", "reference", "minmax")
        weights = [quantized_layer(solver=name).dequantize() for name in names]
        assert not torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])
        assert torch.equal(weights[2], quantized_layer(optimize=False).dequantize())

    @pytest.mark.parametrize("nbits", [4, 8])
    def test_round_zero_reaches_the_solver(self, nbits: int) -> None:
        def zeros(round_zero: bool | None) -> Tensor:
            layer = quantized_layer(nbits=nbits, optimize=False, round_zero=round_zero)
            return layer.zero.detach()

        assert torch.equal(zeros(True), zeros(True).round())
        assert not torch.equal(zeros(False), zeros(False).round())
        assert torch.equal(zeros(None), zeros(nbits == 4))

    def test_minmax_covers_the_range_of_each_group(self) -> None:
        weight = dense_layer().weight.detach().reshape(-1, 64)
        layer = quantized_layer(nbits=8, group_size=64, optimize=False)
        dequantized = layer.dequantize().reshape(-1, 64)
        step = (weight.amax(1) - weight.amin(1)) / 255
        assert ((dequantized.amin(1) - weight.amin(1)).abs() <= step).all()
        assert ((dequantized.amax(1) - weight.amax(1)).abs() <= step).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_weight_that_is_not_finite_is_refused_with_its_place(self, value: float) -> None:
        dense = dense_layer()
        dense.weight.data[5, 7] = value
        with pytest.raises(ValueError, match=r"weight\[5, 7\] is -?(nan|inf); a weight must"):
            HQQLinear(dense, BaseQuantizeConfig())
        assert dense.weight is not None

    def test_a_group_size_that_does_not_divide_is_refused_with_the_shape(self) -> None:
        with pytest.raises(ValueError, match=r"group_size=48 .* weight \[64, 128\]"):
            HQQLinear(dense_layer(), BaseQuantizeConfig(group_size=48))

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (nn.Conv1d(4, 4, 1), "dense nn.Linear, not Conv1d"),
            (nn.Linear(8, 8, device="meta"), "meta device"),
            (nn.Linear(8, 8, dtype=torch.float64), "float64 weight"),
        ],
    )
    def test_what_is_no_dense_linear_layer_is_refused(
        self, layer: nn.Module, message: str
    ) -> None:
        with pytest.raises(TypeError, match=message):
            HQQLinear(layer, BaseQuantizeConfig(group_size=8))  # type: ignore[arg-type]

    def test_a_quantized_layer_is_not_quantized_again(self) -> None:
        with pytest.raises(TypeError, match=r"dense nn\.Linear, not HQQLinear"):
            HQQLinear(quantized_layer(), BaseQuantizeConfig())

    def test_requantizing_its_own_weight_at_8_bits_is_nearly_exact(self) -> None:
        layer = quantized_layer(nbits=8, optimize=False)
        before = layer.dequantize()
        layer.requantize(before)
        assert torch.allclose(layer.dequantize(), before, atol=1e-6)

    def test_requantizing_another_shape_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"weight \[128, 64\] is not \[64, 128\]"):
            quantized_layer().requantize(torch.zeros(128, 64))


# ---- computing ---------------------------------------------------------------------------


class TestForward:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("compute_dtype", DTYPES)
    def test_it_is_a_linear_layer_in_the_dtype_of_x(
        self, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        layer = quantized_layer(compute_dtype=compute_dtype)
        x = torch.randn(2, 5, 128).to(dtype)
        y = layer(x)
        expected = x.double() @ layer.dequantize(torch.float32).double().T
        assert y.dtype == dtype
        assert y.shape == (2, 5, 64)
        assert_close(y, expected + layer.bias.double(), 128)

    def test_bias_and_no_bias(self) -> None:
        with_bias, without = quantized_layer(), quantized_layer(bias=False)
        x = torch.randn(3, 128)
        assert without.bias is None
        assert torch.allclose(with_bias(x), without(x) + with_bias.bias, atol=1e-6)

    @pytest.mark.parametrize("compute_dtype", DTYPES)
    def test_autocast_decides_the_dtype(self, compute_dtype: torch.dtype) -> None:
        layer = quantized_layer(compute_dtype=compute_dtype)
        x = torch.randn(3, 128)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert_close(y, layer(x.bfloat16()), 128)

    def test_the_gradient_flows_to_x_alone(self) -> None:
        layer = quantized_layer()
        x = torch.randn(3, 128, requires_grad=True)
        dy = torch.randn(3, 64)
        layer(x).backward(dy)
        assert x.grad is not None
        assert_close(x.grad, dy.double() @ layer.dequantize().double(), 64)
        assert all(p.grad is None for p in layer.parameters())

    def test_the_placeholder_has_the_weights_shape_but_nothing_in_it(self) -> None:
        layer = quantized_layer(compute_dtype=torch.bfloat16)
        assert layer.weight.shape == (64, 128)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.untyped_storage().nbytes() == 2
        assert layer.weight.isnan().all()
        for write in (nn.init.normal_, nn.init.kaiming_uniform_, lambda w: w.copy_(w + 1)):
            with pytest.raises(RuntimeError, match="single memory location"):
                write(layer.weight)

    def test_meta_is_hqqs_dict(self) -> None:
        layer = quantized_layer(nbits=3, group_size=32, axis=0)
        meta = layer.meta
        assert meta["scale"] is layer.scale
        assert meta["zero"] is layer.zero
        assert meta["packing"] == "3bit_32"
        assert meta["unpack_view_dtype"] == torch.int32
        assert (meta["nbits"], meta["group_size"], meta["axis"]) == (3, 32, 0)
        assert meta["shape"] == torch.Size((64, 128))

    def test_its_text_says_what_it_is(self) -> None:
        text = repr(quantized_layer(nbits=2, group_size=32))
        assert "in_features=128, out_features=64, bias=True, nbits=2, group_size=32" in text
        assert "uninitialized" in repr(HQQLinear(None, None, initialize=False))

    def test_an_uninitialized_layer_says_so(self) -> None:
        with pytest.raises(RuntimeError, match="no weight yet"):
            HQQLinear(None, None, initialize=False)(torch.zeros(1, 8))

    def test_reset_parameters_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="no initial state"):
            quantized_layer().reset_parameters()


# ---- moving and copying ------------------------------------------------------------------


class TestConverting:
    @pytest.mark.parametrize(
        ("convert", "dtype"),
        [
            (lambda m: m.half(), torch.float16),
            (lambda m: m.bfloat16(), torch.bfloat16),
            (lambda m: m.float(), torch.float32),
            (lambda m: m.to(torch.float16), torch.float16),
            (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
        ],
    )
    def test_dtype_conversions_reach_scale_zero_bias_and_compute_dtype(
        self, convert: Callable[[nn.Module], nn.Module], dtype: torch.dtype
    ) -> None:
        layer = quantized_layer(compute_dtype=torch.float32, meta_dtype=torch.float16)
        codes = layer.W_q.clone()
        model = convert(nn.Sequential(layer))
        assert layer.scale.dtype == layer.zero.dtype == layer.bias.dtype == dtype
        assert layer.compute_dtype == layer.dequantize().dtype == layer.weight.dtype == dtype
        assert torch.equal(layer.W_q, codes)
        assert model(torch.randn(2, 128, dtype=dtype)).dtype == dtype

    def test_conversion_to_float64_is_refused_and_changes_nothing(self) -> None:
        layer = quantized_layer()
        with pytest.raises(TypeError, match=r"float16 or bfloat16, not torch\.float64"):
            layer.double()
        assert layer.scale.dtype == layer.compute_dtype == torch.float32

    def test_moving_keeps_dtypes_and_reaches_every_tensor(self) -> None:
        layer = quantized_layer(compute_dtype=torch.bfloat16, meta_dtype=torch.float32)
        layer.to("meta")
        assert all(p.is_meta for p in layer.parameters())
        assert layer.weight.is_meta
        assert layer.device.type == "meta"
        assert layer.compute_dtype == torch.bfloat16
        assert layer.scale.dtype == torch.float32
        layer.to_empty(device="cpu")
        assert layer.device.type == "cpu"

    @pytest.mark.parametrize("initialized", [True, False])
    def test_conversion_of_a_whole_model_does_not_mind_uninitialized_layers(
        self, initialized: bool
    ) -> None:
        layer = quantized_layer() if initialized else HQQLinear(None, None, initialize=False)
        nn.Sequential(layer, nn.Linear(4, 4)).half().cpu()
        assert layer.is_initialized() == initialized

    @pytest.mark.parametrize("nbits", [4, 3])
    def test_a_deep_copy_shares_nothing(self, nbits: int) -> None:
        layer = quantized_layer(nbits=nbits, solver="reference")
        other = copy.deepcopy(layer)
        assert_same_layer(layer, other)
        assert layer.W_q.data_ptr() != other.W_q.data_ptr()
        other.half()
        assert layer.compute_dtype == torch.float32

    @pytest.mark.parametrize("nbits", [4, 3])
    def test_pickling_brings_back_the_same_layer(self, nbits: int) -> None:
        layer = quantized_layer(nbits=nbits, solver="reference")
        other = pickle.loads(pickle.dumps(layer))
        assert_same_layer(layer, other)
        x = torch.randn(2, 128)
        assert torch.equal(layer(x), other(x))

    def test_torch_save_of_a_whole_module(self) -> None:
        layer = quantized_layer()
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        assert_same_layer(layer, torch.load(file, weights_only=False))

    def test_train_and_eval_follow_the_dense_layer(self) -> None:
        assert HQQLinear(dense_layer().eval(), BaseQuantizeConfig()).training is False
        assert HQQLinear(dense_layer().train(), BaseQuantizeConfig()).training is True
