"""PEFT's other methods on quantized layers: they train, and no merge is lost without a word."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from hqq_layers import assert_same_layer
from peft import LoraConfig, get_peft_model
from peft_models import (
    adapter_layer,
    dense_twin,
    fill_adapters,
    relative_error,
    tiny_quantized,
    token_ids,
)

import hqqlora
from hqqlora.peft import merge_and_unload

pytestmark = pytest.mark.filterwarnings("ignore:a changed weight:UserWarning")

EIGHT_BITS = hqqlora.BaseQuantizeConfig(nbits=8, group_size=32)
TARGETS = {"target_modules": ["q_proj", "o_proj"]}
READS_THE_WEIGHT = {
    "VeraConfig": {"r": 8},
    "MissConfig": {"r": 8},
    "OFTConfig": {"oft_block_size": 8, "r": 0},
    "ShiraConfig": {"r": 4},
}
WRITES_TO_THE_WEIGHT = {
    "IA3Config": {"feedforward_modules": []},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 50},
    "RandLoraConfig": {"r": 8},
    "AdaLoraConfig": {"init_r": 6, "target_r": 4, "total_step": 10},
}


def adapted(base: nn.Module, method: str) -> nn.Module:
    if not hasattr(peft, method):
        pytest.skip(f"this PEFT has no {method}")
    if method == "ShiraConfig" and not backends():
        pytest.skip("SHiRA computes with base_layer.weight before PEFT 0.20")
    options = {**READS_THE_WEIGHT, **WRITES_TO_THE_WEIGHT}[method]
    torch.manual_seed(0)
    model = get_peft_model(base, getattr(peft, method)(**TARGETS, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_E" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def backends() -> bool:
    return hasattr(peft.utils, "resolve_quantization_backend")


@pytest.mark.parametrize("method", [*READS_THE_WEIGHT, *WRITES_TO_THE_WEIGHT])
class TestAllOfThem:
    def test_they_give_what_they_give_on_the_dense_model(self, method: str) -> None:
        base = tiny_quantized(quant=EIGHT_BITS)
        twin = adapted(dense_twin(base, torch.float32), method)
        model = adapted(base, method)
        assert relative_error(logits(model), logits(twin)) < 1e-4
        ids = token_ids()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert any(g is not None and g.abs().max() > 0 for g in gradients)

    def test_they_merge_exactly_into_dense_layers(self, method: str) -> None:
        model = adapted(tiny_quantized(quant=EIGHT_BITS), method)
        before = logits(model)
        merged = merge_and_unload(model, dequantize=True)
        assert relative_error(logits(merged), before) < 1e-4
        assert not any(isinstance(m, hqqlora.HQQLinear) for m in merged.modules())


@pytest.mark.skipif(not backends(), reason="needs PEFT 0.20")
@pytest.mark.parametrize("method", list(READS_THE_WEIGHT))
class TestThoseThatAskForTheWeight:
    def test_they_merge_into_few_bits_and_back(self, method: str) -> None:
        if method == "OFTConfig" and peft.__version__.startswith("0.20."):
            pytest.skip("OFT asks for the weight since PEFT 0.21")
        model = adapted(tiny_quantized(quant=EIGHT_BITS), method)
        layer = adapter_layer(model)
        before, codes = logits(model), copy.deepcopy(layer.base_layer)
        model.merge_adapter()
        assert not torch.equal(layer.base_layer.W_q, codes.W_q)
        assert 0 < layer.requantization_error < 0.05
        assert 0 < relative_error(logits(model), before) < 0.1
        model.unmerge_adapter()
        assert_same_layer(layer.base_layer, codes)
        assert torch.equal(logits(model), before)
        model.merge_adapter()  # and once more
        assert 0 < relative_error(logits(model), before) < 0.1


@pytest.mark.parametrize("method", list(WRITES_TO_THE_WEIGHT))
def test_a_merge_that_would_be_lost_is_refused(method: str) -> None:
    model = adapted(tiny_quantized(quant=EIGHT_BITS), method)
    before = logits(model)
    with pytest.raises(ValueError, match=r"q_proj: PEFT cannot merge .*dequantize=True"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="PEFT cannot merge"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


def test_dense_models_merge_as_before() -> None:
    from peft_models import tiny_llama

    options: dict[str, Any] = {"feedforward_modules": [], **TARGETS}
    model = get_peft_model(tiny_llama(), peft.IA3Config(**options))
    model.merge_and_unload()


VARIANTS = {
    "alora_invocation_tokens": token_ids()[0, 4:6].tolist(),
    "velora_config": ("VeloraConfig", {}),
    "monteclora_config": ("MontecloraConfig", {}),
    "use_bdlora": (
        "BdLoraConfig",
        {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2},
    ),
}


@pytest.mark.parametrize("option", list(VARIANTS))
def test_variants_of_lora_give_what_they_give_on_the_dense_model(option: str) -> None:
    from peft.tuners.lora import config as configs

    value = VARIANTS[option]
    if isinstance(value, tuple):
        if not hasattr(configs, value[0]):
            pytest.skip(f"this PEFT has no {value[0]}")
        value = getattr(configs, value[0])(**value[1])
    base = tiny_quantized()
    outputs = []
    for model in (base, dense_twin(base, torch.float32)):
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **{option: value}
        )
        torch.manual_seed(0)
        model = fill_adapters(get_peft_model(model, config)).eval()
        torch.manual_seed(1)
        outputs.append(logits(model))
    assert relative_error(*outputs) < 1e-5
    assert not torch.equal(outputs[0], logits(tiny_quantized()))
