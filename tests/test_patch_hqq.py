"""patch_hqq: hqq's own HQQLinear runs on our operators, on its own memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hqq_layers import dense_layer, hqqs_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hqqlora import HQQLinear
from hqqlora.hqq_patch import patch_hqq, unpatch_hqq

hqq = pytest.importorskip("hqq.core.quantize")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [8, 4, 3, 2, 1]


@pytest.fixture
def patched() -> Iterator[None]:
    patch_hqq()
    yield
    unpatch_hqq()


class Operators(TorchDispatchMode):
    """Notes our operators, and where the codes lie that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "hqqlora":
            self.calls.append((func._opname, args[1].data_ptr()))
        return func(*args, **(kwargs or {}))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def forward_and_backward(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 128).to(dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(2, 3, 64).to(dtype))
    assert x.grad is not None
    return y, x.grad


@pytest.mark.usefixtures("patched")
class TestWhilePatched:
    @pytest.mark.parametrize("nbits", BITS)
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("view_as_float", [False, True])
    def test_outputs_and_gradients_are_ours_bit_for_bit(
        self, nbits: int, axis: int, dtype: torch.dtype, bias: bool, view_as_float: bool
    ) -> None:
        layer = hqqs_layer(dtype, bias, nbits=nbits, axis=axis, view_as_float=view_as_float)
        ours = HQQLinear.from_hqq(layer)
        ours.repack(planes=False)  # planes are added up in another order
        y, dx = forward_and_backward(layer, dtype)
        expected_y, expected_dx = forward_and_backward(ours, dtype)
        assert torch.equal(y, expected_y)
        assert torch.equal(dx, expected_dx)

    @pytest.mark.parametrize("view_as_float", [False, True])
    def test_both_passes_read_hqqs_codes_where_they_are(self, view_as_float: bool) -> None:
        layer = hqqs_layer(view_as_float=view_as_float)
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        with Operators() as operators:
            forward_and_backward(layer, torch.float32)
        address = layer.W_q.data_ptr()
        assert operators.calls == [("linear", address), ("linear_dgrad", address)]
        after = layer.state_dict()
        assert before.keys() == after.keys()
        for key in before:  # byte by byte: codes viewed as floats may be NaN
            assert torch.equal(as_bytes(before[key]), as_bytes(after[key]))

    def test_no_grad_runs_the_forward_alone(self) -> None:
        layer = hqqs_layer()
        x = torch.randn(3, 128)
        with Operators() as operators, torch.no_grad():
            y = layer(x.requires_grad_())
        assert [name for name, _ in operators.calls] == ["linear"]
        assert not y.requires_grad

    def test_a_bias_that_is_trained_gets_its_gradient(self) -> None:
        layer = hqqs_layer()
        layer.bias = nn.Parameter(layer.bias)
        layer(torch.randn(2, 3, 128)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((64,), 6.0))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_x_may_have_another_dtype_than_the_layer(self, dtype: torch.dtype) -> None:
        layer = hqqs_layer(torch.float16)
        y, dx = forward_and_backward(layer, dtype)
        assert y.dtype == dx.dtype == dtype

    def test_scales_and_zeros_that_hqq_quantized_are_used(self) -> None:
        settings = hqq.BaseQuantizeConfig(group_size=8, quant_scale=True, quant_zero=True)
        layer = hqq.HQQLinear(
            None, settings, compute_dtype=torch.float32, device="cpu", initialize=False
        )
        layer.quantize(dense_layer().weight.data, **layer.quant_config)
        assert "scale_q" in layer.meta
        x = torch.eye(128)
        with Operators() as operators:
            y = layer(x)
        assert operators.calls == [("linear", layer.W_q.data_ptr())]
        torch.testing.assert_close(y, layer.dequantize().t())

    @pytest.mark.parametrize("nbits", [6, 5, 1.58])
    def test_bits_that_hqq_stores_in_larger_words_are_used(self, nbits: float) -> None:
        layer = hqqs_layer(nbits=nbits)
        with Operators() as operators:
            y = layer(torch.eye(128))
        assert operators.calls == [("linear", layer.W_q.data_ptr())]
        torch.testing.assert_close(y, layer.dequantize().t() + layer.bias)

    def test_what_the_operators_do_not_take_goes_hqqs_way(self) -> None:
        def whole_matrix() -> Any:
            settings = hqq.BaseQuantizeConfig()
            settings["weight_quant_params"]["channel_wise"] = False
            return hqq.HQQLinear(
                dense_layer(), settings, compute_dtype=torch.float32, device="cpu"
            )

        def trained_zero() -> Any:
            layer = hqqs_layer()
            layer.meta["zero"] = nn.Parameter(layer.meta["zero"].clone())
            return layer

        for layer in (whole_matrix(), trained_zero(), hqqs_layer(torch.float64)):
            with Operators() as operators:
                y = layer(torch.eye(128, dtype=layer.compute_dtype))
            assert operators.calls == []
            torch.testing.assert_close(y, layer.dequantize().t() + layer.bias)

    def test_a_layer_without_a_weight_says_so_as_ever(self) -> None:
        layer = hqq.HQQLinear(None, None, device="cpu", initialize=False)
        with pytest.raises(AssertionError, match="not quantized"):
            layer(torch.randn(1, 8))

    def test_choosing_a_backend_does_not_undo_it(self) -> None:
        layer = hqqs_layer()
        hqq.HQQLinear.set_backend(hqq.HQQBackend.PYTORCH_FORWARD)
        try:
            assert hqq.HQQLinear.backend is hqq.HQQBackend.PYTORCH_FORWARD
            with Operators() as operators:
                layer(torch.randn(1, 128))
            assert len(operators.calls) == 1
        finally:
            hqq.HQQLinear.set_backend(hqq.HQQBackend.PYTORCH)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_compiled_layers_have_no_graph_break(self, dtype: torch.dtype) -> None:
        layer = hqqs_layer(dtype, view_as_float=True)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        y, dx = forward_and_backward(compiled, dtype)
        with torch.compiler.set_stance("fail_on_recompile"):
            again, _ = forward_and_backward(compiled, dtype)
        expected, expected_dx = forward_and_backward(layer, dtype)
        assert torch.equal(y, expected)
        assert torch.equal(again, expected)
        assert torch.equal(dx, expected_dx)

    def test_hqqs_own_lora_trains_on_it(self) -> None:
        peft = pytest.importorskip("hqq.core.peft")
        config = {"r": 4, "lora_alpha": 8, "dropout": 0.0, "train_dtype": torch.float32}
        layer = peft.HQQLinearLoRA(hqqs_layer(), config)
        with Operators() as operators:
            layer(torch.randn(2, 3, 128, requires_grad=True)).sum().backward()
        assert [name for name, _ in operators.calls] == ["linear", "linear_dgrad"]
        assert layer.lora_B.grad.abs().sum() > 0


class TestPatching:
    @pytest.fixture(autouse=True)
    def unpatched(self) -> Iterator[None]:
        unpatch_hqq()
        yield
        unpatch_hqq()

    def test_layers_from_before_and_after_are_concerned(self) -> None:
        before = hqqs_layer()
        patch_hqq()
        after = hqqs_layer()
        for layer in (before, after):
            with Operators() as operators:
                forward_and_backward(layer, torch.float32)
            assert [name for name, _ in operators.calls] == ["linear", "linear_dgrad"]

    def test_it_is_undone_exactly(self) -> None:
        hqqs_layer()  # the first layer made gives the class its forward
        before = dict(vars(hqq.HQQLinear))
        patch_hqq()
        patch_hqq()
        hqqs_layer()
        assert vars(hqq.HQQLinear)["forward"] is not before["forward"]
        unpatch_hqq()
        assert dict(vars(hqq.HQQLinear)) == before
        unpatch_hqq()
        assert dict(vars(hqq.HQQLinear)) == before

    def test_it_is_undone_exactly_where_no_layer_had_been_made(self) -> None:
        forward = vars(hqq.HQQLinear).get("forward")
        if forward is not None:
            del hqq.HQQLinear.forward
        before = dict(vars(hqq.HQQLinear))
        patch_hqq()
        unpatch_hqq()
        assert dict(vars(hqq.HQQLinear)) == before
        hqq.HQQLinear.set_backend(hqq.HQQLinear.backend)

    def test_a_backend_chosen_meanwhile_stays_chosen(self) -> None:
        patch_hqq()
        hqq.HQQLinear.set_backend(hqq.HQQBackend.PYTORCH_FORWARD)
        unpatch_hqq()
        try:
            assert hqq.HQQLinear.forward is hqq.HQQLinear.forward_pytorch
        finally:
            hqq.HQQLinear.set_backend(hqq.HQQBackend.PYTORCH)
        assert hqq.HQQLinear.forward is hqq.HQQLinear.forward_pytorch_backprop

    def test_unpatched_layers_run_hqqs_way(self) -> None:
        patch_hqq()
        layer = hqqs_layer()
        ours, _ = forward_and_backward(layer, torch.float32)
        unpatch_hqq()
        with Operators() as operators:
            theirs, _ = forward_and_backward(layer, torch.float32)
        assert operators.calls == []
        torch.testing.assert_close(ours, theirs)

    def test_a_peft_model_made_before_runs_on_it(self) -> None:
        peft = pytest.importorskip("peft")

        def layer_and_adapter() -> Any:
            model = nn.Sequential(hqqs_layer(bias=False))
            torch.manual_seed(2)
            config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
            return peft.get_peft_model(model, config)

        model = layer_and_adapter()
        expected, expected_dx = forward_and_backward(model, torch.float32)
        patch_hqq()
        with Operators() as operators:
            y, dx = forward_and_backward(model, torch.float32)
        assert [name for name, _ in operators.calls][:1] == ["linear"]
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(dx, expected_dx)
        assert all(
            parameter.grad is not None
            for name, parameter in model.named_parameters()
            if "lora_" in name
        )
