"""LoRALinear trains a low-rank update on a frozen quantized layer."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lora_layers import K, N, adapted_layer, assert_close, formula, quantized_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from hqqlora import LoRALinear


class TestConstruction:
    def test_only_the_adapter_is_trained(self) -> None:
        layer = LoRALinear(quantized_layer(), lora_bias=True)
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == {"lora_A", "lora_B", "lora_bias"}

    def test_shapes_dtypes_and_defaults(self) -> None:
        layer = LoRALinear(quantized_layer(compute_dtype=torch.bfloat16))
        assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (8, 16, 0.0)
        assert layer.scaling == 2.0
        assert tuple(layer.lora_A.shape) == (8, K)
        assert tuple(layer.lora_B.shape) == (N, 8)
        assert layer.lora_bias is None
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
        assert layer.enabled
        assert not layer.merged

    def test_rslora_divides_by_the_root_of_the_rank(self) -> None:
        layer = LoRALinear(quantized_layer(), r=16, lora_alpha=32, use_rslora=True)
        assert layer.scaling == 32 / math.sqrt(16)

    def test_it_starts_as_its_base_with_a_as_peft_initialises_it(self) -> None:
        base = quantized_layer()
        torch.manual_seed(1)
        layer = LoRALinear(base, r=4)
        torch.manual_seed(1)
        expected = nn.Linear(K, 4, bias=False).weight
        assert torch.equal(layer.lora_A, expected)
        assert layer.lora_B.eq(0).all()
        x = torch.randn(3, K)
        assert torch.equal(layer(x), base(x))

    def test_other_initialisations(self) -> None:
        layer = LoRALinear(quantized_layer(), r=64, init_lora_weights="gaussian")
        assert layer.lora_A.std().item() == pytest.approx(1 / 64, rel=0.1)
        assert layer.lora_B.eq(0).all()
        layer = LoRALinear(quantized_layer(), init_lora_weights=False)
        assert layer.lora_B.ne(0).any()
        with pytest.raises(ValueError, match="init_lora_weights='pissa' is not True, False"):
            LoRALinear(quantized_layer(), init_lora_weights="pissa")

    def test_it_shows_the_bases_shape_to_code_that_asks(self) -> None:
        layer = LoRALinear(quantized_layer(compute_dtype=torch.bfloat16))
        assert (layer.in_features, layer.out_features) == (K, N)
        assert layer.weight.shape == (N, K)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.bias is layer.base_layer.bias

    @pytest.mark.parametrize("r", [1, 256])
    def test_ranks_from_1_to_256(self, r: int) -> None:
        layer = LoRALinear(quantized_layer(), r=r, init_lora_weights=False)
        x = torch.randn(3, K)
        assert_close(layer(x), formula(layer, x))

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"r": 0}, ValueError, "r=0 is not between 1 and 256"),
            ({"r": -8}, ValueError, "r=-8 is not between"),
            ({"r": 257}, ValueError, "r=257 is not between"),
            ({"r": 8.0}, TypeError, "r must be an integer, not 8.0"),
            ({"r": True}, TypeError, "r must be an integer, not True"),
            ({"lora_alpha": float("nan")}, ValueError, "lora_alpha=nan is not finite"),
            ({"lora_dropout": 1.0}, ValueError, r"lora_dropout=1.0 is not in \[0, 1\)"),
            ({"lora_dropout": -0.1}, ValueError, r"lora_dropout=-0.1 is not in \[0, 1\)"),
            ({"dtype": torch.float64}, TypeError, "float16 or bfloat16, not torch.float64"),
        ],
    )
    def test_numbers_out_of_range_are_refused(
        self, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            LoRALinear(quantized_layer(), **options)

    def test_a_dense_base_is_refused(self) -> None:
        with pytest.raises(TypeError, match="needs an HQQLinear, not Linear"):
            LoRALinear(nn.Linear(4, 4))  # type: ignore[arg-type]


class TestForwardAndBackward:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_it_is_the_formula_in_every_pairing_of_dtypes(
        self, dtype: torch.dtype, lora_dtype: torch.dtype
    ) -> None:
        layer = adapted_layer(dtype=lora_dtype)
        x = torch.randn(2, 3, K).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert y.shape == (2, 3, N)
        assert_close(y, formula(layer, x))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("lora_bias", [True, False])
    def test_gradients_are_those_of_the_formula(self, bias: bool, lora_bias: bool) -> None:
        layer = adapted_layer(bias, lora_bias=lora_bias)
        x = torch.randn(5, K, requires_grad=True)
        dy = torch.randn(5, N)
        trained = [p for p in layer.parameters() if p.requires_grad]
        actual = torch.autograd.grad(layer(x), [x, *trained], dy)
        expected = torch.autograd.grad(formula(layer, x), [x, *trained], dy.double())
        assert len(actual) == (4 if lora_bias else 3)
        for gradient, reference in zip(actual, expected, strict=True):
            assert gradient.dtype == torch.float32
            assert_close(gradient, reference)

    def test_gradients_do_not_reach_the_base(self) -> None:
        layer = adapted_layer()
        layer(torch.randn(5, K)).sum().backward()
        assert all(p.grad is None for p in layer.base_layer.parameters())
        assert layer.lora_A.grad is not None

    def test_autocast_computes_in_its_dtype_and_keeps_the_adapter_in_float32(self) -> None:
        layer = adapted_layer(lora_bias=True)
        x = torch.randn(5, K)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert_close(y, formula(layer, x.bfloat16()))
        y.sum().backward()
        assert layer.lora_A.grad is not None
        assert layer.lora_A.grad.dtype == torch.float32

    def test_a_few_steps_of_training_lower_the_loss(self) -> None:
        torch.manual_seed(0)
        layer = LoRALinear(quantized_layer(), r=8)
        codes = layer.base_layer.W_q.clone()
        x = torch.randn(64, K)
        target = layer.base_layer(x) + 0.5 * x @ torch.randn(K, 2) @ torch.randn(2, N)
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 0.02)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.mse_loss(layer(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.1 * losses[0]
        assert torch.equal(layer.base_layer.W_q, codes)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_gives_the_same_gradients_also_with_dropout(
        self, use_reentrant: bool
    ) -> None:
        layer = adapted_layer(lora_dropout=0.5).train()
        x = torch.randn(5, K, requires_grad=True)
        gradients = []
        for replayed in (False, True):
            torch.manual_seed(3)
            layer.zero_grad()
            y = checkpoint(layer, x, use_reentrant=use_reentrant) if replayed else layer(x)
            y.pow(2).sum().backward()
            gradients.append((layer.lora_A.grad, layer.lora_B.grad))
        for plain, replay in zip(*gradients, strict=True):
            assert torch.equal(plain, replay)

    def test_torch_compile_sees_one_graph(self) -> None:
        layer = adapted_layer(lora_dropout=0.1).eval()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(5, K)
        y = compiled(x)
        assert torch.equal(y, layer(x))
        y.sum().backward()
        assert layer.lora_B.grad is not None


class TestDropout:
    def test_it_applies_in_training_alone(self) -> None:
        layer = adapted_layer(lora_dropout=0.5)
        x = torch.randn(5, K)
        layer.eval()
        assert torch.equal(layer(x), layer(x))
        assert_close(layer(x), formula(layer, x))
        layer.train()
        assert not torch.equal(layer(x), layer(x))

    def test_manual_seed_governs_it(self) -> None:
        layer = adapted_layer(lora_dropout=0.5).train()
        x = torch.randn(5, K)
        torch.manual_seed(7)
        first = layer(x)
        torch.manual_seed(7)
        assert torch.equal(layer(x), first)

    def test_what_remains_is_scaled_so_that_the_mean_stays(self) -> None:
        layer = adapted_layer(lora_dropout=0.25).train()
        x = torch.randn(1, K)
        torch.manual_seed(0)
        draws = torch.stack([layer(x)[0] for _ in range(2000)]).double()
        error = (draws.mean(0) - formula(layer, x)[0]).abs()
        assert (error <= 5 * draws.std(0) / math.sqrt(2000)).all()

    def test_the_base_sees_all_of_x(self) -> None:
        layer = LoRALinear(quantized_layer(), r=4, lora_dropout=0.9).train()  # B is zero
        x = torch.randn(5, K)
        assert torch.equal(layer(x), layer.base_layer(x))


class TestAsAModule:
    def test_state_dict_round_trip(self) -> None:
        layer, other = adapted_layer(lora_bias=True), adapted_layer(lora_bias=True)
        state = layer.state_dict()
        assert {key for key in state if not key.startswith("base_layer.")} == {
            "lora_A",
            "lora_B",
            "lora_bias",
        }
        with torch.no_grad():
            other.lora_A.zero_()
        other.load_state_dict(state, strict=True)
        x = torch.randn(5, K)
        assert torch.equal(layer(x), other(x))

    def test_deepcopy_and_pickle(self) -> None:
        layer = adapted_layer(lora_dropout=0.1, use_rslora=True).eval()
        x = torch.randn(5, K)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(layer(x), other(x))
            assert other.lora_A.data_ptr() != layer.lora_A.data_ptr()

    def test_conversion_reaches_adapter_and_base(self) -> None:
        layer = adapted_layer().to(torch.bfloat16)
        assert layer.lora_A.dtype == layer.base_layer.compute_dtype == torch.bfloat16
        x = torch.randn(5, K).bfloat16()
        assert_close(layer(x), formula(layer, x))

    def test_its_text_says_what_it_is(self) -> None:
        text = repr(LoRALinear(quantized_layer(), r=4, lora_alpha=8, lora_dropout=0.1))
        assert "r=4, lora_alpha=8, scaling=2, lora_dropout=0.1" in text
        assert "nbits=4" in text
