"""A layer whose parameters DeepSpeed's ZeRO-3 has partitioned loads DeepSpeed's placeholders,
and nothing else. Here without DeepSpeed: what it leaves behind, by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear
from hqqlora.expert_weights import HQQExpertWeights
from hqqlora.lora import LoRALinear


def layer_of(nbits: int = 4, N: int = 32, axis: int = 1, **config: Any) -> HQQLinear:
    dense = nn.Linear(64, N)
    config = BaseQuantizeConfig(nbits=nbits, group_size=32, axis=axis, **config)
    return HQQLinear(dense, config, compute_dtype=torch.float32)


def partition(module: nn.Module, persistent: tuple[str, ...] = ()) -> Any:
    """Leaves what ZeRO-3 leaves: `persistent` ones, small ones, stay whole."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        if name not in persistent:
            parameter.data = torch.empty(0, dtype=parameter.dtype)
    return module


@pytest.mark.parametrize("nbits", [4, 3])
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("persistent", [(), ("scale", "zero", "bias")])
def test_placeholders_are_loaded_into_placeholders(
    nbits: int, metadata: bool, persistent: tuple[str, ...]
) -> None:
    layer, other = layer_of(nbits), layer_of(nbits)
    other.state_dict_metadata = metadata
    state = partition(other, persistent).state_dict()
    assert state["W_q"].numel() == 0
    before = dict(partition(layer, persistent).named_parameters())
    layer.load_state_dict(state)
    for name, parameter in layer.named_parameters():
        assert parameter is before[name]  # ZeRO knows these
        assert (parameter.numel() == 0) == (name not in persistent)
        assert torch.equal(parameter, state[name])


def test_placeholders_of_a_float_view() -> None:
    layer = partition(layer_of(view_as_float=True))
    state = partition(layer_of(view_as_float=True)).state_dict()
    assert state["W_q"].is_floating_point()
    layer.load_state_dict(state)
    assert layer.W_q.dtype == torch.uint8


def test_an_adapter_around_it() -> None:
    layer = partition(LoRALinear(layer_of(), r=4))
    state = partition(LoRALinear(layer_of(), r=4)).state_dict()
    assert layer.load_state_dict(state).missing_keys == []


def test_an_adapter_of_pefts_around_it() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        config = peft.LoraConfig(r=4, target_modules=["0"])
        return peft.get_peft_model(nn.Sequential(layer_of()), config)

    whole, layer = adapted().state_dict(), partition(adapted())
    layer.load_state_dict(partition(adapted()).state_dict())
    with pytest.raises(RuntimeError, match=r"lora_A.*\[4, 64\]"):
        layer.load_state_dict(whole)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (layer_of(nbits=8), r"W_q is torch.uint8 \[32, 32\].* 8 bits"),
        (layer_of(axis=0), r"scale is|W_q is"),
        (layer_of(N=16), r"W_q is torch.uint8 \[32, 32\].*\[16, 64\]"),
    ],
)
def test_placeholders_of_another_format_are_refused(other: HQQLinear, problem: str) -> None:
    layer = partition(layer_of())
    before, metadata = dict(layer.named_parameters()), layer.metadata
    with pytest.raises((ValueError, RuntimeError), match=problem):
        layer.load_state_dict(partition(copy.deepcopy(other)).state_dict())
    assert layer.metadata is metadata
    assert all(p is before[name] for name, p in layer.named_parameters())


def test_whole_tensors_are_not_loaded_into_placeholders() -> None:
    layer = partition(layer_of())
    with pytest.raises(RuntimeError, match=r"W_q is \[32, 32\].*GatheredParameters"):
        layer.load_state_dict(layer_of().state_dict())
    assert layer.W_q.numel() == 0
    assert hasattr(layer.W_q, "ds_id")


def test_placeholders_are_not_loaded_into_a_layer_that_is_whole() -> None:
    state = partition(layer_of()).state_dict()
    for layer in (layer_of(), partition(layer_of(), ("W_q", "scale", "zero", "bias"))):
        with pytest.raises(ValueError, match=r"W_q is torch.uint8 \[0\], but"):
            layer.load_state_dict(state)


def test_an_empty_tensor_in_a_layer_without_zero_is_no_placeholder() -> None:
    layer = layer_of()
    layer.W_q.data = torch.empty(0, dtype=torch.uint8)
    state = {**layer_of().state_dict(), "W_q": torch.empty(0, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"W_q is torch.uint8 \[0\], but"):
        layer.load_state_dict(state)


def test_a_gathered_layer_loads_whole_tensors_of_its_format_and_no_other() -> None:
    names = ("W_q", "scale", "zero", "bias")
    layer, other = partition(layer_of(), names), layer_of()
    before = dict(layer.named_parameters())
    layer.load_state_dict(other.state_dict())
    for name, parameter in other.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter)
        assert layer.get_parameter(name) is before[name]
    with pytest.raises(ValueError, match=r"W_q of a layer under DeepSpeed's ZeRO-3"):
        layer.load_state_dict(layer_of(nbits=8).state_dict())
    assert torch.equal(layer.W_q, other.W_q)


def test_experts_load_placeholders_of_their_format_and_no_other() -> None:
    def experts(nbits: int, N: int = 32) -> Any:
        made = HQQExpertWeights(2, layer_of(nbits, N).metadata, device="cpu")
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(1)
        return made

    layer = partition(experts(4))
    layer.load_state_dict(partition(experts(4)).state_dict())
    before = dict(layer.named_parameters())
    with pytest.raises(ValueError, match="under DeepSpeed's ZeRO-3"):
        layer.load_state_dict(partition(experts(8)).state_dict())
    assert all(p is before[name] for name, p in layer.named_parameters())


def test_an_adapter_is_not_saved_from_placeholders(tmp_path: Any) -> None:
    model = nn.Sequential(partition(LoRALinear(layer_of(), r=4)))
    with pytest.raises(ValueError, match=r"lora_A.weight is partitioned .*GatheredParameters"):
        hqqlora.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
