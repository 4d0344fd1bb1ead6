"""Cross entropy behind an output layer, in chunks, against that of all logits in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hqqlora
from hqqlora import head_cross_entropy as room
from hqqlora.head_cross_entropy import head_cross_entropy

FEATURES, VOCABULARY = 32, 50
# What a token's gradient may be off, next to the largest: the logits' rounding, that of
# softmax, and of products of VOCABULARY terms.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2**-8,
    torch.bfloat16: 2**-5,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(room, "_CHUNK", 4)


def layer(dtype=torch.float32, bias=True, spread=1.0):
    torch.manual_seed(3)
    made = nn.Linear(FEATURES, VOCABULARY, bias=bias)
    made.weight.data.mul_(spread)
    return made.to(dtype)


def data(tokens, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    states = torch.randn(tokens, FEATURES, generator=generator).to(dtype)
    return states.requires_grad_(), torch.randint(VOCABULARY, (tokens,), generator=generator)


def expected(states, targets, head):
    """The sum, and its gradient with respect to states, weight and bias, in float64."""
    head = copy.deepcopy(head).double().requires_grad_()
    states = states.detach().double().requires_grad_()
    total = F.cross_entropy(head(states), targets, reduction="sum")
    return total, torch.autograd.grad(total, [states, *head.parameters()])


def assert_near(found, wanted, bound):
    assert (found.double() - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("tokens", [1, 4, 9])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_sum_and_gradients_are_those_of_all_logits(dtype, tokens):
    head, (states, targets) = layer(dtype), data(tokens, dtype)
    total, gradients = expected(states, targets, head)
    found = head_cross_entropy(states, targets, head)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(found.detach(), total, BOUNDS[dtype])
    (3 * found).backward()
    for tensor, wanted in zip([states, *head.parameters()], gradients, strict=True):
        assert tensor.grad.dtype == dtype
        assert_near(tensor.grad, 3 * wanted, BOUNDS[dtype])


def test_no_token_has_no_loss():
    head, (states, targets) = layer(), data(0)
    found = head_cross_entropy(states, targets, head)
    found.backward()
    assert found == 0
    assert states.grad.shape == (0, FEATURES)
    assert head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("trained", ["states", "head", "both", "none"])
def test_only_what_is_trained_gets_a_gradient(trained):
    head, (states, targets) = layer(), data(6)
    total, gradients = expected(states, targets, head)
    states.requires_grad_(trained in ("states", "both"))
    head.requires_grad_(trained in ("head", "both"))
    found = head_cross_entropy(states, targets, head)
    assert_near(found.detach(), total, 1e-5)
    assert found.requires_grad is (trained != "none")
    if trained == "none":
        return
    found.backward()
    for tensor, wanted in zip([states, *head.parameters()], gradients, strict=True):
        assert (tensor.grad is not None) is tensor.requires_grad
        if tensor.requires_grad:
            assert_near(tensor.grad, wanted, 2e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_a_chunk_of_logits_exists_at_a_time(grad):
    head, (states, targets) = layer(), data(9)
    rows = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    with torch.set_grad_enabled(grad):
        head_cross_entropy(states, targets, head)
    assert rows == [4, 4, 1]


def test_a_target_whose_probability_is_zero_in_float32_has_its_loss():
    logits = torch.tensor([[0.0, -300.0, 5.0], [300.0, 0.0, 0.0]], requires_grad=True)
    found = head_cross_entropy(logits, torch.tensor([1, 0]), nn.Identity())
    assert found.item() == pytest.approx(305.0067, rel=1e-6)
    found.backward()
    assert logits.grad[0].tolist() == pytest.approx([0.0066929, -1, 0.9933071], abs=1e-6)
    assert logits.grad[1].abs().max() == 0


def test_what_is_not_finite_stays_visible():
    head, (states, targets) = layer(), data(6)
    with torch.no_grad():
        states[2, 0] = float("nan")
    assert head_cross_entropy(states, targets, head).isnan()


def test_the_gradient_can_be_asked_for_twice_but_not_differentiated():
    head, (states, targets) = layer(), data(6)
    found = head_cross_entropy(states, targets, head)
    first = torch.autograd.grad(found, states, retain_graph=True)[0]
    factor = torch.ones((), requires_grad=True)
    second = torch.autograd.grad(found, states, factor, create_graph=True)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize("adapted", [False, True])
def test_behind_a_quantized_layer(adapted):
    dense, (states, targets) = layer(bias=False), data(9)
    config = hqqlora.BaseQuantizeConfig(nbits=4, group_size=32)
    head = hqqlora.HQQLinear(dense, config, compute_dtype=torch.float32)
    whole = nn.Linear(FEATURES, VOCABULARY, bias=False)
    whole.weight.data = head.dequantize()
    if adapted:
        head = hqqlora.LoRALinear(head, r=4, lora_alpha=8)
        nn.init.normal_(head.lora_B)
        whole.weight.data += 2 * head.lora_B.detach() @ head.lora_A.detach()
    total, gradients = expected(states, targets, whole)
    found = head_cross_entropy(states, targets, head)
    found.backward()
    assert_near(found.detach(), total, 1e-5)
    assert_near(states.grad, gradients[0], 2e-5)
    if adapted:
        assert_near(head.lora_B.grad, 2 * gradients[1] @ head.lora_A.detach().double().T, 2e-5)


def test_a_mean_of_many_is_not_rounded_to_the_dtype_of_states():
    """1/1020 in bfloat16 is off by 0.2 %, all gradients alike."""
    head, (states, targets) = layer(torch.bfloat16), data(9, torch.bfloat16)
    total = head_cross_entropy(states, targets, head)
    whole = torch.autograd.grad(total, states, retain_graph=True)[0]
    (mean,) = torch.autograd.grad(total / 1020, states)
    assert torch.equal(mean, (whole.float() / 1020).bfloat16())
