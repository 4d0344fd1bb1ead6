"""The layer that PEFT puts around an HQQLinear: one operation where it can, always right."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from hqq_layers import quantized_layer
from oracle import (
    Adapter,
    Oracle,
    as_rows,
    assert_close,
    product_bound,
    summation,
)
from peft import LoraConfig, get_peft_model
from peft_models import fill_adapters, is_fused, operations, relative_error
from torch.utils.checkpoint import checkpoint

import hqqlora
from hqqlora.peft import HQQLoraLinear

N, K, R = 64, 128, 4


def adapted(
    base: hqqlora.HQQLinear | None = None, keep_dtype: bool = False, **options: Any
) -> HQQLoraLinear:
    """A layer whose adapter is not zero. keep_dtype: that of the base, for the adapter too."""
    base = base or quantized_layer(N, K, group_size=32)
    config = LoraConfig(**{"r": R, "lora_alpha": 8, "target_modules": ["0"], **options})
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=not keep_dtype)
    layer = fill_adapters(model).base_model.model[0]
    assert isinstance(layer, HQQLoraLinear)
    return layer.eval()


def with_second(layer: HQQLoraLinear, **options: Any) -> HQQLoraLinear:
    """Adds an adapter "second", not active."""
    config = LoraConfig(**{"r": 2 * R, "lora_alpha": 4, **options})
    numbers = {"r": config.r, "lora_alpha": config.lora_alpha}
    try:
        layer.update_layer("second", config=config, **numbers)
    except TypeError:  # PEFT before 0.19
        names = ("lora_dropout", "init_lora_weights", "use_rslora", "use_dora", "lora_bias")
        layer.update_layer(
            "second", **numbers, **{name: getattr(config, name) for name in names}
        )
    nn.init.normal_(layer.lora_B["second"].weight, std=0.1)
    return layer.eval()


def check_forward(
    layer: HQQLoraLinear, x: Tensor, y: Tensor, names: Any = ("default",)
) -> None:
    """y = x W^T + bias + the adapters', in float64, element by element."""
    weight = Oracle(layer.get_base_layer().packed)
    rows = as_rows(x).double()
    bias = layer.get_base_layer().bias
    addend = torch.zeros(rows.shape[0], N, dtype=torch.float64)
    addend = addend if bias is None else addend + bias.double()
    error = torch.zeros_like(addend)
    for name in names:
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        s = layer.scaling[name]
        addend = addend + s * rows @ A.T @ B.T
        if layer.lora_B[name].bias is not None:
            addend = addend + s * layer.lora_B[name].bias.double()
        terms = abs(s) * rows.abs() @ A.abs().T @ B.abs().T
        error = error + (summation(K) + summation(A.shape[0])) * terms
    exact = rows @ weight.W.T + addend
    bound = product_bound(as_rows(x), exact, weight.W, weight.magnitude, addend) + error
    assert y.dtype == x.dtype
    assert_close(as_rows(y).detach(), exact.detach(), bound.detach())


class TestForward:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("keep_dtype", [True, False])
    def test_it_is_the_formula_in_one_operation(
        self, dtype: torch.dtype, keep_dtype: bool, bias: bool
    ) -> None:
        base = quantized_layer(N, K, bias, dtype, group_size=32)
        layer = adapted(base, keep_dtype)
        assert layer.lora_A["default"].weight.dtype == (dtype if keep_dtype else torch.float32)
        x = torch.randn(2, 3, K).to(dtype)
        y = layer(x)
        assert y.shape == (2, 3, N)
        check_forward(layer, x, y)
        assert is_fused(lambda: layer(x))

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    def test_in_every_format(self, nbits: int, axis: int) -> None:
        layer = adapted(quantized_layer(N, K, nbits=nbits, axis=axis, group_size=32))
        x = torch.randn(5, K)
        check_forward(layer, x, layer(x))

    @pytest.mark.parametrize(
        "options",
        [
            {"use_rslora": True},
            {"r": 16, "lora_alpha": 3},
            {"rank_pattern": {"0": 7}, "alpha_pattern": {"0": 21}},
            {"init_lora_weights": "gaussian"},
            {"init_lora_weights": False},
            {"init_lora_weights": "orthogonal"},
            {"r": 256},
        ],
        ids=str,
    )
    def test_pefts_options_reach_it(self, options: dict[str, Any]) -> None:
        layer = adapted(**options)
        x = torch.randn(5, K)
        check_forward(layer, x, layer(x))
        assert is_fused(lambda: layer(x))
        if "use_rslora" in options:
            assert layer.scaling["default"] == 8 / math.sqrt(R)

    @pytest.mark.parametrize("bias", [True, False])
    def test_a_lora_bias_goes_along(self, bias: bool) -> None:
        layer = adapted(quantized_layer(N, K, bias, group_size=32), lora_bias=True)
        assert layer.lora_B["default"].bias.abs().min() > 0
        x = torch.randn(5, K)
        check_forward(layer, x, layer(x))
        assert is_fused(lambda: layer(x))

    def test_several_adapters_are_one_of_their_ranks(self) -> None:
        layer = with_second(adapted(), lora_bias=True)
        layer.set_adapter(["default", "second"])
        x = torch.randn(5, K)
        check_forward(layer, x, layer(x), ("default", "second"))
        assert is_fused(lambda: layer(x))

    def test_only_the_active_adapter_takes_part(self) -> None:
        layer = with_second(adapted())
        x = torch.randn(5, K)
        check_forward(layer, x, layer(x), ("default",))
        layer.set_adapter("second")
        check_forward(layer, x, layer(x), ("second",))
        assert is_fused(lambda: layer(x))
        layer.set_adapter([])
        assert torch.equal(layer(x), layer.base_layer(x))

    def test_disabled_it_is_its_base(self) -> None:
        layer = adapted()
        x = torch.randn(5, K)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))

    def test_autocast_computes_in_its_dtype(self) -> None:
        layer = adapted(lora_bias=True)
        x = torch.randn(5, K)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert is_fused(lambda: layer(x))
        check_forward(layer, x.bfloat16(), y)

    def test_no_copy_of_x_or_the_weight_is_made(self) -> None:
        base = quantized_layer(N, K, compute_dtype=torch.bfloat16, group_size=32)
        layer = adapted(base)
        x = torch.randn(1000, K).bfloat16()
        with operations() as seen:
            layer(x)
        assert seen.elements == [] or max(seen.elements) <= N * R


class TestBackward:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("lora_bias", [True, False])
    def test_gradients_are_those_of_the_formula(
        self, dtype: torch.dtype, lora_bias: bool
    ) -> None:
        layer = adapted(quantized_layer(N, K, compute_dtype=dtype), lora_bias=lora_bias).train()
        x = torch.randn(2, 3, K).to(dtype).requires_grad_()
        dy = torch.randn(2, 3, N).to(dtype)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        trained = [A, B] + ([layer.lora_B["default"].bias] if lora_bias else [])
        with operations() as seen:
            gradients = torch.autograd.grad(layer(x), [x, *trained], dy)
        assert seen.counts == {"lora_linear": 1, "lora_linear_backward": 1}
        adapter = Adapter(A.detach(), B.detach(), layer.scaling["default"])
        weight = Oracle(layer.base_layer.packed)
        adapter.check_backward(dy, x.detach(), gradients[:3], weight)
        if lora_bias:
            exact = layer.scaling["default"] * as_rows(dy).double().sum(0)
            assert_close(gradients[3], exact, 1e-6 * as_rows(dy).double().abs().sum(0))

    def test_gradients_of_two_active_adapters(self) -> None:
        layer = with_second(adapted())
        layer.set_adapter(["default", "second"])
        x, dy = torch.randn(5, K), torch.randn(5, N)
        weights = [layer.lora_A["second"].weight, layer.lora_B["second"].weight]
        gradients = torch.autograd.grad(layer(x), weights, dy)
        adapter = Adapter(*(w.detach() for w in weights), layer.scaling["second"])
        adapter.check_backward(dy, x, (None, *gradients), Oracle(layer.base_layer.packed))

    def test_the_base_gets_none(self) -> None:
        layer = adapted(lora_bias=True).train()
        layer(torch.randn(5, K)).sum().backward()
        assert all(p.grad is None for p in layer.base_layer.parameters())
        assert layer.lora_B["default"].bias.grad is not None

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_gives_the_same_also_with_dropout(self, use_reentrant: bool) -> None:
        layer = adapted(lora_dropout=0.5).train()
        x = torch.randn(5, K, requires_grad=True)
        gradients = []
        for replayed in (False, True):
            torch.manual_seed(3)
            layer.zero_grad()
            y = checkpoint(layer, x, use_reentrant=use_reentrant) if replayed else layer(x)
            y.pow(2).sum().backward()
            gradients.append([layer.lora_A["default"].weight.grad, x.grad.clone()])
            x.grad = None
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class TestDropout:
    def test_it_is_the_operations_own(self) -> None:
        layer = adapted(lora_dropout=0.5, use_rslora=True).train()
        twin = hqqlora.LoRALinear(
            layer.base_layer, R, 8, lora_dropout=0.5, use_rslora=True
        ).train()
        twin.lora_A.data = layer.lora_A["default"].weight.data
        twin.lora_B.data = layer.lora_B["default"].weight.data
        x = torch.randn(5, K)
        outputs = []
        for module in (layer, twin):
            torch.manual_seed(5)
            outputs.append(module(x))
        assert torch.equal(*outputs)
        assert not torch.equal(outputs[0], layer(x))
        assert is_fused(lambda: layer(x))

    def test_it_applies_in_training_alone(self) -> None:
        layer = adapted(lora_dropout=0.5)
        x = torch.randn(5, K)
        check_forward(layer, x, layer(x))

    def test_the_mean_stays(self) -> None:
        layer = adapted(lora_dropout=0.25).train()
        x = torch.randn(1, K)
        draws = torch.stack([layer(x)[0] for _ in range(2000)]).double()
        exact = layer.eval()(x)[0].double()
        assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / math.sqrt(2000)).all()


class TestFallingBack:
    """What keeps the operation from being used is computed by PEFT's separate ones."""

    def check(self, layer: HQQLoraLinear, names: Any = ("default",)) -> None:
        x = torch.randn(5, K)
        check_forward(layer, x, layer(x), names)
        with operations() as seen:
            layer(x)
        assert seen.counts == {"linear": 1}

    def test_ranks_above_256(self) -> None:
        self.check(adapted(r=257))
        layer = with_second(adapted(r=200), r=100)
        layer.set_adapter(["default", "second"])
        self.check(layer, ("default", "second"))

    @pytest.mark.parametrize("which", ["base_layer", "lora_A", "lora_B"])
    def test_hooks_are_called(self, which: str) -> None:
        layer = adapted()
        module = layer.base_layer if which == "base_layer" else getattr(layer, which)["default"]
        calls = []
        handle = module.register_forward_hook(lambda *_: calls.append(1))
        self.check(layer)
        assert len(calls) == 2
        handle.remove()
        assert is_fused(lambda: layer(torch.randn(5, K)))

    def test_a_replaced_forward_is_called(self) -> None:
        layer = adapted()
        module = layer.lora_A["default"]
        module.forward = lambda x: nn.functional.linear(x, module.weight)
        self.check(layer)

    def test_a_parametrized_factor(self) -> None:
        layer = adapted()
        doubled = layer.lora_A["default"].weight.detach() * 2

        class Twice(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(2 * x)

        layer.lora_A["default"].__class__ = Twice
        x = torch.randn(5, K)
        y = layer(x)
        assert not is_fused(lambda: layer(x))
        layer.lora_A["default"].__class__ = nn.Linear
        layer.lora_A["default"].weight.data = doubled
        check_forward(layer, x, y)

    def test_accelerates_hooks_unless_they_have_nothing_to_do(self) -> None:
        hooks = pytest.importorskip("accelerate.hooks")
        layer = adapted()
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
        x = torch.randn(5, K)
        y = layer(x)
        check_forward(layer, x, y)
        assert is_fused(lambda: layer(x))
        hooks.remove_hook_from_module(layer.lora_A["default"])
        hooks.add_hook_to_module(
            layer.lora_A["default"], hooks.AlignDevicesHook("cpu", offload=True)
        )
        assert layer.lora_A["default"].weight.is_meta
        assert relative_error(layer(x), y) < 1e-5
        assert not is_fused(lambda: layer(x))

    def test_several_adapters_with_dropout(self) -> None:
        layer = with_second(adapted(lora_dropout=0.5), lora_dropout=0.1)
        layer.set_adapter(["default", "second"])
        layer.train()
        x = torch.randn(5, K)
        with operations() as seen:
            layer(x)
        assert seen.counts == {"linear": 1}
        layer.eval()
        assert is_fused(lambda: layer(x))

    def test_dropout_of_all(self) -> None:
        layer = adapted()
        layer.lora_dropout["default"] = nn.Dropout(1.0)
        layer.train()
        x = torch.randn(5, K)
        assert torch.equal(layer(x), layer.base_layer(x))

    def test_dropout_of_another_kind(self) -> None:
        layer = adapted()
        layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
        assert not is_fused(lambda: layer(torch.randn(5, K)))

    def test_mixed_batches(self) -> None:
        layer = with_second(adapted())
        x = torch.randn(3, 4, K)
        y = layer(x, adapter_names=["second", "__base__", "default"])
        check_forward(layer, x[0], y[0], ("second",))
        check_forward(layer, x[1], y[1], ())
        check_forward(layer, x[2], y[2], ("default",))

    def test_factors_of_two_other_dtypes(self) -> None:
        layer = adapted()
        layer.lora_A["default"].to(torch.float16)
        layer.lora_B["default"].to(torch.bfloat16)
        x = torch.randn(5, K)
        check_forward(layer, x, layer(x))
        assert layer.lora_A["default"].weight.dtype != torch.float32


class TestAsAModule:
    @pytest.mark.parametrize("use_dora", [True, False])
    def test_deepcopy_and_pickle(self, use_dora: bool) -> None:
        layer = adapted(use_dora=use_dora)
        x = torch.randn(5, K)
        y = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), y)
            assert other.base_layer.W_q.data_ptr() != layer.base_layer.W_q.data_ptr()

    def test_conversion_reaches_base_and_adapter(self) -> None:
        layer = adapted().to(torch.bfloat16)
        assert layer.base_layer.compute_dtype == torch.bfloat16
        x = torch.randn(5, K).bfloat16()
        check_forward(layer, x, layer(x))
        assert is_fused(lambda: layer(x))

    @pytest.mark.parametrize("use_dora", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_torch_compile_sees_one_graph(self, training: bool, use_dora: bool) -> None:
        layer = adapted(lora_dropout=0.1, lora_bias=not use_dora, use_dora=use_dora)
        layer.train(training)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        x = torch.randn(5, K, requires_grad=True)
        results = []
        for module in (layer, compiled):
            torch.manual_seed(11)
            layer.zero_grad()
            y = module(x)
            y.pow(2).sum().backward()
            results.append([y, layer.lora_A["default"].weight.grad.clone()])
        if training and use_dora:  # torch draws another mask for its own dropout when compiled
            return
        for eager, graph in zip(*results, strict=True):
            assert torch.equal(eager, graph)
