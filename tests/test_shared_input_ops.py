"""The halves of an adapter as ops, against the float64 product of the dequantized weights."""

import pytest
import torch
from oracle import assert_close, random_adapter, random_weight, summation

ops = torch.ops.hqqlora


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("factors", [torch.float32, None], ids=["fp32 factors", "x's own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 7, 150])
def test_halves_are_as_accurate_as_the_whole(M, dtype, factors, axis):
    N, K, R = 48, 80, 5
    weight = random_weight(N, K, 16, 4, axis)
    adapter = random_adapter(N, K, R, dtype=factors or dtype)
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    bias = torch.randn(N)
    W, shape = weight.packed[:3], weight.packed[3:]

    xa = ops.lora_project(x, adapter.A)
    y = ops.lora_linear_from_xa(x, *W, bias, xa, adapter.B, adapter.scaling, *shape)
    adapter.check_forward(x, y, xa, weight, bias)

    dyb, dB = ops.lora_factor_gradients(dy, xa, adapter.B, adapter.scaling, True, True)
    exact, sizes = (
        dy.double() @ adapter.B.double(),
        dy.double().abs() @ adapter.B.double().abs(),
    )
    assert_close(dyb, exact, summation(N) * sizes)
    dx, dA = ops.lora_input_gradients(
        dy, dyb, x, *W, adapter.A, adapter.scaling, *shape, True, True
    )
    adapter.check_backward(dy, x, (dx, dA, dB), weight)


def test_columns_of_a_larger_xa_and_rows_of_a_larger_x():
    weight, adapter = random_weight(48, 80, 16), random_adapter(48, 80, 4)
    x = torch.randn(6, 2, 90)[:, :, 5:85]
    xas = ops.lora_project(x, torch.cat([torch.randn(3, 80), adapter.A]))
    y = ops.lora_linear_from_xa(
        x, *weight.packed[:3], None, xas[:, 3:], adapter.B, adapter.scaling, *weight.packed[3:]
    )
    adapter.check_forward(x, y, xas[:, 3:], weight)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_what_is_not_needed_is_empty(needs):
    weight, adapter = random_weight(48, 80, 16), random_adapter(48, 80, 4)
    x, dy, dyb = torch.randn(6, 80), torch.randn(6, 48), torch.randn(6, 4)
    found = ops.lora_factor_gradients(dy, torch.randn(6, 4), adapter.B, 0.5, *needs)
    assert [t.shape for t in found] == [
        (6, 4) if needs[0] else (0,),
        (48, 4) if needs[1] else (0,),
    ]
    found = ops.lora_input_gradients(
        dy, dyb, x, *weight.packed[:3], adapter.A, 0.5, *weight.packed[3:], *needs
    )
    assert [t.shape for t in found] == [
        (6, 80) if needs[0] else (0,),
        (4, 80) if needs[1] else (0,),
    ]
