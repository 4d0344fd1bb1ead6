"""Columns that matter more: measuring how much, and quantizing by it."""

from typing import Any

import pytest
import torch
from little_model import FOUR_BITS, TOKENS, Model, quiet
from torch import Tensor, nn

from hqqlora import BaseQuantizeConfig, HQQLinear, input_importance
from hqqlora.config import QuantSettings
from hqqlora.ops import PackedWeight
from hqqlora.packed_codes import unpack_codes
from hqqlora.quantizing import quantize_weight


def uneven(K: int) -> Tensor:
    """Importance [K] that differs by factors of hundreds."""
    return torch.exp(2 * torch.randn(K, generator=torch.Generator().manual_seed(1)))


def normal(N: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(dtype)


def quantized(weight: Tensor, nbits: int, importance: Tensor | None, **format: Any) -> Tensor:
    """Read back, float32."""
    settings = QuantSettings.parse(BaseQuantizeConfig(nbits=nbits, **format))
    parts = quantize_weight(weight, settings, torch.float16, importance)
    layout = (*weight.shape, nbits, settings.group_size, settings.axis)
    result: Tensor = torch.ops.hqqlora.dequantize(*parts, *layout, torch.float32)
    return result


class TestQuantizeWeight:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    def test_the_weighted_error_falls(self, nbits: int, dtype: torch.dtype) -> None:
        weight, m = normal(48, 128, dtype), uneven(128)
        plain = quantized(weight, nbits, None)
        weighted = quantized(weight, nbits, m)
        before, after = (((w - weight.float()) ** 2 * m).sum() for w in (plain, weighted))
        assert after < 0.9 * before

    def test_groups_that_straddle_rows(self) -> None:
        weight, m = normal(6, 96), uneven(96)
        plain, weighted = quantized(weight, 4, None), quantized(weight, 4, m)
        assert ((weighted - weight) ** 2 * m).sum() < 0.9 * ((plain - weight) ** 2 * m).sum()

    def test_codes_are_the_nearest_under_what_is_stored(self) -> None:
        weight = normal(16, 64)
        settings = QuantSettings.parse(FOUR_BITS)
        W_q, scale, zero = quantize_weight(weight, settings, torch.float16, uneven(64))
        codes = unpack_codes(PackedWeight(W_q, scale, zero, 16, 64, 4, 32, 1)).float()
        t = weight.view(-1, 32) / scale.float() + zero.float()
        assert torch.equal(codes.view(-1, 32), t.clamp(0, 15).round())

    @pytest.mark.parametrize("size", [0.0, 1e-38, 1e-6, 1.0, 1e38])
    def test_flat_and_extreme_groups_stay_finite_and_as_near(self, size: float) -> None:
        weight = normal(4, 64) * size
        weight[0] = size  # a flat group
        m = uneven(64)
        plain, weighted = quantized(weight, 4, None), quantized(weight, 4, m)
        assert weighted.isfinite().all()
        unit = weight.abs().max().clamp_min(1e-38).double()
        error = [(((w - weight) / unit) ** 2 * m).sum(1) for w in (plain, weighted)]
        assert (error[1] <= 1.02 * error[0] + 1e-30).all()

    def test_columns_that_are_never_used(self) -> None:
        weight, m = normal(8, 128), uneven(128)
        m[:64] = 0
        assert (quantized(weight, 4, m) - weight)[:, :64].abs().max() < 0.5

    def test_axis_0_is_as_without(self) -> None:
        weight = normal(64, 32)
        plain = quantized(weight, 4, None, axis=0)
        assert torch.equal(quantized(weight, 4, uneven(32), axis=0), plain)

    @pytest.mark.parametrize("value", [0.0, 0.3, 1e30])
    def test_columns_that_matter_the_same_are_as_without(self, value: float) -> None:
        weight, m = normal(8, 64), torch.full((64,), value)
        assert torch.equal(quantized(weight, 4, m), quantized(weight, 4, None))

    @pytest.mark.parametrize(
        ("bad", "error", "says"),
        [
            (torch.ones(32), ValueError, r"\[32\] is not \[64\]"),
            (-torch.ones(64), ValueError, "not negative"),
            (torch.full((64,), float("nan")), ValueError, "finite"),
            (torch.full((64,), float("inf")), ValueError, "finite"),
            (torch.ones(64, dtype=torch.int64), TypeError, "float32"),
            ([1.0] * 64, TypeError, "tensor"),
        ],
    )
    def test_bad_importance(self, bad: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=says):
            quantized(normal(4, 64), 4, bad)

    @pytest.mark.parametrize("solver", ["reference", "minmax"])
    def test_another_solver_is_refused(self, solver: str) -> None:
        with pytest.raises(ValueError, match=f"default', not '{solver}'"):
            quantized(normal(4, 64), 4, uneven(64), solver=solver)


class Reader(Model):
    """With what a transformers model has."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


class TestInputImportance:
    def test_it_is_the_mean_square_of_the_inputs(self) -> None:
        model: Any = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        x = normal(10, 8)
        found = input_importance(model, [x[:3], x[3:]])
        assert set(found) == {"0", "2"}
        torch.testing.assert_close(found["0"], x.square().mean(0))
        torch.testing.assert_close(found["2"], model[:2](x).square().mean(0).detach())

    def test_by_keyword_and_layers_without_rows(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.empty = nn.Linear(8, 4), nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                return torch.cat([self.used(input=x), self.empty(x[:0])])

        assert set(input_importance(Twice(), [normal(3, 8)])) == {"used"}

    def test_the_first_position_is_left_out(self) -> None:
        model = nn.Sequential(nn.Linear(8, 4))
        x = normal(6, 8).view(2, 3, 8)
        found = input_importance(model, [{"input": x}])
        torch.testing.assert_close(found["0"], x[:, 1:].square().mean((0, 1)))

    def test_random_tokens_are_the_default(self) -> None:
        model = Reader().train()
        state = torch.get_rng_state()
        found = input_importance(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
        assert set(found) == set(layers)
        again, other = input_importance(model), input_importance(model, seed=1)
        for name, values in found.items():
            assert values.shape == (layers[name].in_features,)
            assert torch.equal(values, again[name])
            assert not torch.equal(values, other[name])

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="Model has no input embeddings"):
            input_importance(Model())
        model: Any = nn.Sequential(nn.Linear(8, 4))
        with pytest.raises(ValueError, match="0: what goes in is not finite"):
            input_importance(model, [torch.full((2, 8), 1e30)])
        assert not model[0]._forward_pre_hooks


class TestQuantizeModel:
    def test_each_layer_is_fitted_to_its_inputs(self) -> None:
        dense = Model()
        importance = input_importance(dense, [TOKENS])
        del importance["layers.0.q_proj"]
        model = quiet(Model(), FOUR_BITS, importance=importance)
        for name in ("layers.0.q_proj", "layers.0.up_proj", "layers.1.down_proj"):
            layer, given = dense.get_submodule(name), importance.get(name)
            assert isinstance(layer, nn.Linear)
            expected = HQQLinear(
                layer, FOUR_BITS, compute_dtype=torch.float32, importance=given
            )
            got = model.get_submodule(name)
            for mine, other in zip(got.parameters(), expected.parameters(), strict=True):
                assert torch.equal(mine, other)

    def test_a_bad_one_names_the_layer(self) -> None:
        with pytest.raises(ValueError, match=r"layers\.0\.q_proj: importance \[3\]"):
            quiet(Model(), FOUR_BITS, importance={"layers.0.q_proj": torch.ones(3)})
