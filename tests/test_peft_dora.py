"""DoRA on quantized layers: no dense weight, no dense B A, and what the formula says."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from hqq_layers import quantized_layer
from oracle import Oracle, assert_close, product_bound, summation, unit_roundoff
from peft import LoraConfig, get_peft_model
from peft_models import fill_adapters, operations, relative_error

import hqqlora
from hqqlora.peft import HQQLoraLinear, dora

N, K, R = 64, 128, 4


def adapted(
    base: hqqlora.HQQLinear | None = None, fill: bool = True, **options: Any
) -> HQQLoraLinear:
    base = base or quantized_layer(N, K, group_size=32)
    config = LoraConfig(
        **{"r": R, "lora_alpha": 8, "target_modules": ["0"], "use_dora": True, **options}
    )
    model = get_peft_model(nn.Sequential(base), config)
    if fill:
        fill_adapters(model)
    layer = model.base_model.model[0]
    assert isinstance(layer, HQQLoraLinear)
    return layer.eval()


def parts(layer: HQQLoraLinear) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """W, A, B and the magnitude in float64, and the scaling."""
    return (
        Oracle(layer.base_layer.packed).W,
        layer.lora_A["default"].weight.double(),
        layer.lora_B["default"].weight.double(),
        layer.lora_magnitude_vector["default"].weight.double(),
        layer.scaling["default"],
    )


def formula(layer: HQQLoraLinear, x: Tensor) -> Tensor:
    """magnitude * V / |V| with V = W + scaling B A, the norm taken for a constant; float64."""
    W, A, B, magnitude, s = parts(layer)
    factor = magnitude / torch.linalg.norm(W + s * B @ A, dim=1).detach()
    y = factor * (x.double() @ W.T + s * x.double() @ A.T @ B.T)
    bias = layer.base_layer.bias
    return y if bias is None else y + bias.double()


class TestNorms:
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    @pytest.mark.parametrize("meta_dtype", [torch.float32, torch.bfloat16])
    def test_sums_of_squares(
        self, nbits: int, axis: int, meta_dtype: torch.dtype, monkeypatch: Any
    ) -> None:
        base = quantized_layer(
            N, K, nbits=nbits, axis=axis, group_size=32, meta_dtype=meta_dtype
        )
        exact = Oracle(base.packed).W.square().sum(1)
        for block in (dora.BLOCK, 3 * 8 * K):  # at once, and in blocks that do not divide N
            monkeypatch.setattr(dora, "BLOCK", block)
            assert_close(dora.row_squares(base), exact, 1e-5 * exact)

    @pytest.mark.parametrize("shape", [(63, 64), (10, 48), (64, 24)])
    def test_where_groups_or_words_run_across_rows(self, shape: tuple[int, int]) -> None:
        base = quantized_layer(*shape, group_size=16, nbits=4)
        exact = Oracle(base.packed).W.square().sum(1)
        assert_close(dora.row_squares(base), exact, 1e-5 * exact)

    def test_blocks_are_all_that_is_dequantized(self, monkeypatch: Any) -> None:
        base = quantized_layer(256, 128, group_size=32)
        monkeypatch.setattr(dora, "BLOCK", 16 * 128)
        with operations() as seen:
            dora.row_squares(base)
        assert max(seen.elements) <= 16 * 128

    def test_norms_of_the_sum(self) -> None:
        layer = adapted()
        W, A, B, _, s = parts(layer)
        exact = torch.linalg.norm(W + s * B @ A, dim=1)
        actual = dora.row_norms(
            layer.base_layer, dora.row_squares(layer.base_layer), A.float(), B.float(), s
        )
        # The square has three terms that may cancel.
        size = torch.linalg.norm(W, dim=1) + s * torch.linalg.norm(B @ A, dim=1)
        assert_close(actual, exact.detach(), (1e-5 * size.square() / exact).detach())

    def test_they_follow_a_weight_that_is_changed(self) -> None:
        layer = adapted(quantized_layer(N, K, bias=False, group_size=32))
        x = torch.randn(5, K)
        for change in (
            lambda base: base.requantize(torch.randn(N, K)),
            lambda base: base.requantize(3 * torch.randn(N, K)),
            lambda base: base.load_state_dict(
                quantized_layer(N, K, bias=False, group_size=32, seed=7).state_dict()
            ),
            lambda base: base.scale.mul_(1.5),
            lambda base: base.to(torch.bfloat16).to(torch.float32),
        ):
            layer(x)
            with torch.no_grad():
                change(layer.base_layer)
            assert relative_error(layer(x), formula(layer, x)) < 1e-5

    def test_they_are_computed_once(self, monkeypatch: Any) -> None:
        layer = adapted()
        x = torch.randn(5, K)
        layer(x)
        monkeypatch.setattr(dora, "row_squares", lambda base: pytest.fail("again"))
        layer(x)
        with torch.inference_mode():
            layer(x)


class TestForward:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_the_formula(self, dtype: torch.dtype, bias: bool) -> None:
        layer = adapted(quantized_layer(N, K, bias, dtype, group_size=32))
        x = torch.randn(2, 3, K).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        exact = formula(layer, x).detach()
        W, A, B, magnitude, s = parts(layer)
        weight = Oracle(layer.base_layer.packed)
        factor = magnitude / torch.linalg.norm(W + s * B @ A, dim=1)
        size = x.double().abs() @ (W.abs() + abs(s) * B.abs() @ A.abs()).T
        product = product_bound(x.double(), exact / factor, W, weight.magnitude)
        u = unit_roundoff(dtype)
        bound = factor * (product + (summation(K) + summation(R) + 1e-5) * size + u * size)
        assert_close(y.detach(), exact, (bound + u * exact.abs() + 1e-5 * size).detach())

    def test_a_new_adapter_leaves_the_output_as_it_is(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            base = quantized_layer(N, K, False, dtype, group_size=32)
            x = torch.randn(5, K).to(dtype)
            before = base(x)
            assert torch.equal(adapted(base, fill=False)(x), before)

    def test_one_operation_and_no_dense_matrix(self) -> None:
        layer = adapted()
        x = torch.randn(5, K)
        layer(x)
        with operations() as seen:
            layer(x)
        assert seen.counts == {"lora_linear": 1, "linear": 1}  # the second: W A^T
        assert max(seen.elements) < N * K

    def test_gradients_are_those_of_the_formula(self) -> None:
        layer = adapted().train()
        x = torch.randn(5, K, requires_grad=True)
        dy = torch.randn(5, N)
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        assert len(trained) == 4
        actual = torch.autograd.grad(layer(x), trained, dy)
        expected = torch.autograd.grad(formula(layer, x), trained, dy.double())
        for gradient, exact in zip(actual, expected, strict=True):
            assert relative_error(gradient, exact) < 1e-5

    def test_dropout_leaves_the_base_all_of_x_and_its_mean(self) -> None:
        layer = adapted(lora_dropout=0.25).train()
        x = torch.randn(1, K)
        torch.manual_seed(0)
        with torch.no_grad():
            draws = torch.stack([layer(x)[0] for _ in range(2000)]).double()
            error = (draws.mean(0) - formula(layer, x)[0]).abs()
        assert (error <= 5 * draws.std(0) / math.sqrt(2000) + 1e-6).all()
        fresh = adapted(fill=False, lora_dropout=0.9).train()  # B is zero, the factor one
        assert relative_error(fresh(x), fresh.base_layer(x)) < 1e-5

    def test_with_dropout_as_in_pefts_layer_on_a_dense_base(self) -> None:
        layer = adapted(lora_dropout=0.5).train()
        x = torch.randn(5, K)
        torch.manual_seed(4)
        dropped = nn.functional.dropout(x, 0.5).double()
        torch.manual_seed(4)
        y = layer(x)
        W, A, B, magnitude, s = parts(layer)
        factor = magnitude / torch.linalg.norm(W + s * B @ A, dim=1)
        exact = (
            x.double() @ W.T
            + (factor - 1) * (dropped @ W.T)
            + factor * s * (dropped @ A.T @ B.T)
            + layer.base_layer.bias.double()
        )
        assert relative_error(y, exact) < 1e-5

    def test_separate_operations_give_the_same(self) -> None:
        layer = adapted()
        x = torch.randn(5, K)
        fused = layer(x)
        layer.lora_A["default"].register_forward_hook(lambda *_: None)
        with operations() as seen:
            separate = layer(x)
        assert "lora_linear" not in seen.counts
        assert relative_error(separate, fused) < 1e-6

    def test_a_dora_and_a_plain_adapter_at_once(self) -> None:
        layer = adapted()
        plain = LoraConfig(r=2, lora_alpha=4)
        model = nn.Module()
        model.layer = layer
        try:
            layer.update_layer("plain", 2, lora_alpha=4, config=plain)
        except TypeError:
            pytest.skip("needs PEFT 0.19")
        nn.init.normal_(layer.lora_B["plain"].weight, std=0.1)
        layer.set_adapter(["default", "plain"])
        x = torch.randn(5, K)
        A, B = layer.lora_A["plain"].weight.double(), layer.lora_B["plain"].weight.double()
        exact = formula(layer, x) + layer.scaling["plain"] * x.double() @ A.T @ B.T
        assert relative_error(layer(x).detach(), exact.detach()) < 1e-5

    def test_autocast(self) -> None:
        layer = adapted()
        x = torch.randn(5, K)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert relative_error(y, formula(layer, x.bfloat16())) < 0.01

    def test_a_copy_has_its_own_sums(self) -> None:
        layer = adapted()
        x = torch.randn(5, K)
        layer(x)
        other = copy.deepcopy(layer)
        other.base_layer.requantize(torch.randn(N, K))
        assert relative_error(other(x), formula(other, x)) < 1e-5
        assert relative_error(layer(x), formula(layer, x)) < 1e-5


class TestMerging:
    def test_into_a_dense_layer_it_is_exact(self) -> None:
        model = nn.Sequential(quantized_layer(N, K, group_size=32))
        config = LoraConfig(r=R, lora_alpha=8, target_modules=["0"], use_dora=True)
        model = fill_adapters(get_peft_model(model, config)).eval()
        layer = model.base_model.model[0]
        x = torch.randn(5, K)
        exact = formula(layer, x)
        merged = hqqlora.peft.merge_and_unload(model, dequantize=True)
        assert type(merged[0]) is nn.Linear
        assert relative_error(merged(x), exact) < 1e-6

    def test_into_eight_bits_it_is_near_and_unmerging_is_exact(self) -> None:
        layer = adapted(quantized_layer(N, K, nbits=8, group_size=32))
        x = torch.randn(5, K)
        before, codes = layer(x), layer.base_layer.W_q.clone()
        with pytest.warns(UserWarning, match="8 bits"):
            layer.merge()
        assert relative_error(layer(x), before) < 0.02
        assert relative_error(layer(x), before) > 0
        layer.unmerge()
        assert torch.equal(layer.base_layer.W_q, codes)
        assert torch.equal(layer(x), before)
