"""Where NaN and infinity begin: the first layer that makes them, and of what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft_models import operations, tiny_llama, token_ids
from torch import Tensor, nn

import hqqlora
from hqqlora import find_nonfinite

pytest.importorskip("transformers")

LAYER = "model.layers.1.mlp.up_proj"


def model_with(adapters: str | None) -> Any:
    torch.manual_seed(0)
    model: Any = hqqlora.quantize_model(
        tiny_llama(), hqqlora.BaseQuantizeConfig(group_size=32), progress=False
    )
    if adapters == "own":
        hqqlora.add_lora(model, r=4, lora_dropout=0.2)
    elif adapters == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    return model.train()


def inputs() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "labels": token_ids()}


def layer_of(model: Any, name: str = LAYER) -> Any:
    (found,) = (m for n, m in model.named_modules() if n.endswith(name))
    return found


@pytest.mark.parametrize("adapters", ["own", "peft"])
def test_a_finite_step_has_nothing_to_find_and_leaves_no_trace(adapters):
    model = model_with(adapters)
    model(**inputs()).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    assert find_nonfinite(model, inputs()) is None
    assert torch.equal(torch.get_rng_state(), state)
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


@pytest.mark.parametrize("adapters", [None, "own", "peft"])
@pytest.mark.parametrize("tensor", ["scale", "zero"])
def test_weights(adapters, tensor):
    model = model_with(adapters)
    layer = layer_of(model)
    getattr(getattr(layer, "base_layer", layer), tensor).data[3] = torch.inf
    layer_of(model, "model.layers.1.mlp.down_proj")  # comes later, and gets what is infinite
    found = find_nonfinite(model, inputs())
    assert found is not None
    assert found.layer.endswith(LAYER)
    assert found.kind == "weights"
    assert tensor in found.detail
    assert "1 infinite of " in found.detail


@pytest.mark.parametrize("adapters", ["own", "peft"])
def test_an_adapter(adapters):
    model = model_with(adapters)
    for name, parameter in model.named_parameters():
        if f"{LAYER}.lora_A" in name:
            parameter.data[1, 2] = torch.nan
        if ".layers.1.mlp.down_proj.lora_A" in name:
            parameter.data.fill_(torch.nan)
    found = find_nonfinite(model, inputs())
    assert found.layer.endswith(LAYER)
    assert found.kind == "adapter"
    assert "lora_A" in found.detail
    assert "1 NaN of 256 elements" in found.detail
    assert str(found).startswith(f"it begins in the adapter of {found.layer}: lora_A")


def test_activations_that_overflow():
    model = model_with("own")
    layer_of(model).lora_A.data.mul_(1e20)
    nn.init.constant_(layer_of(model).lora_B, 1e20)
    found = find_nonfinite(model, inputs())
    assert (found.layer, found.kind) == (LAYER, "activations")
    assert "infinite of" in found.detail
    assert "for inputs of at most" in found.detail


def test_what_a_module_computes_between_its_layers():
    model = model_with("own")
    # 0 * inf between silu and the product: gate and up themselves are finite
    for name, size in (("gate_proj", 1e30), ("up_proj", 1e30)):
        layer = layer_of(model, f"model.layers.0.mlp.{name}")
        layer.lora_A.data.mul_(size**0.5)
        nn.init.constant_(layer.lora_B, size**0.5)
    found = find_nonfinite(model, inputs())
    assert (found.layer, found.kind) == ("model.layers.0.mlp", "activations")
    assert found.detail.endswith("in what it computes for down_proj")


class Root(nn.Module):
    """Finite everywhere; its derivative is not, at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 0).abs().sqrt() + x


def test_gradients():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Root(), nn.Linear(4, 4)))

    def step() -> None:
        model(torch.ones(2, 4)).sum().backward()

    found = find_nonfinite(model, step)
    assert (found.layer, found.kind) == ("1.0", "gradients")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_not_finite_over_logits_that_are():
    """No label at all: the mean of nothing."""
    model = model_with("own")
    nothing = torch.full_like(token_ids(), -100)
    found = find_nonfinite(model, {"input_ids": token_ids(), "labels": nothing})
    assert str(found) == (
        "it begins in the activations of the model: 1 NaN of 1 elements in its output"
    )

    def step() -> None:
        (model(token_ids()).logits * torch.nan).sum().backward()

    found = find_nonfinite(model, step)
    assert found.kind == "gradients"
    assert found.detail.endswith("not finite as backward arrives there")


def test_inputs_that_are_not_finite():
    model = nn.Sequential(nn.Linear(4, 4))
    for given in (torch.full((1, 4), torch.nan), (torch.full((1, 4), torch.nan),)):
        found = find_nonfinite(model, given)
        assert (found.layer, found.kind) == ("", "inputs")
        assert str(found).startswith("it begins in the inputs of the model: 4 NaN of 4")


def test_masks_may_be_infinite():
    model = model_with(None)
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf)
    assert find_nonfinite(model, {"input_ids": token_ids(), "attention_mask": mask}) is None


@pytest.mark.parametrize("adapters", ["own", "peft"])
def test_the_step_is_taken_as_it_was_fused(adapters):
    model = model_with(adapters)
    with operations() as seen:
        find_nonfinite(model, inputs())
    assert seen.counts["lora_linear"] == 14
    assert seen.counts["linear"] == 0
