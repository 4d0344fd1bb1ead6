"""PEFT's adapters on quantized experts (`target_parameters`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import EXPERTS, check_same_outputs, dequantized, quantized
from safetensors.torch import load_file
from tiny_models import inputs_for

from hqqlora import HQQExperts

pytestmark = pytest.mark.usefixtures("one_thread")


def peft_model(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    config = {
        "r": 4,
        "target_modules": ["q_proj", "down_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "init_lora_weights": False,
        **options,
    }
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**config))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_peft_adapts_target_parameters(family: str, tmp_path: Path) -> None:
    """Outputs, gradients, names and counts are those of PEFT on the dequantized model."""
    from peft import PeftModel

    plain = quantized(family)
    mine, dense_one = peft_model(quantized(family)), peft_model(dequantized(plain))
    dense_one.load_state_dict(
        {k: v for k, v in mine.state_dict().items() if "lora_" in k}, strict=False
    )
    inputs = inputs_for(plain)
    check_same_outputs(mine, dense_one, inputs)
    for model in (mine, dense_one):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for model in (mine, dense_one)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert mine.get_nb_trainable_parameters() == dense_one.get_nb_trainable_parameters()

    mine.save_pretrained(tmp_path / "mine")
    dense_one.save_pretrained(tmp_path / "dense")
    files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("mine", "dense")]
    assert files[0].keys() == files[1].keys()
    again = PeftModel.from_pretrained(quantized(family), tmp_path / "mine")
    assert torch.equal(again(**inputs).logits, mine.eval()(**inputs).logits)


def test_peft_merges_and_unmerges_bit_for_bit() -> None:
    model = peft_model(quantized("mixtral", nbits=8)).eval()
    inputs = inputs_for(model)
    before = model(**inputs).logits
    with model.disable_adapter():
        check_same_outputs(model, quantized("mixtral", nbits=8), inputs)
    model.merge_adapter()
    merged = model(**inputs).logits
    assert not torch.equal(merged, before)
    assert (merged - before).norm() <= 0.1 * before.norm()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(**inputs).logits, before)


def test_peft_merges_into_a_dense_model_what_is_not_of_experts() -> None:
    from hqqlora.peft import merge_and_unload

    with pytest.raises(ValueError, match="does not merge adapters of experts"):
        merge_and_unload(peft_model(quantized("mixtral")), dequantize=True)
    model = peft_model(quantized("mixtral"), target_parameters=None, target_modules=["q_proj"])
    inputs = inputs_for(model)
    expected = model.eval()(**inputs).logits
    merged = merge_and_unload(model, dequantize=True)
    assert not isinstance(merged.get_submodule(EXPERTS), HQQExperts)
    assert (merged(**inputs).logits - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_peft_several_adapters_at_once() -> None:
    from peft import LoraConfig

    model = peft_model(quantized("mixtral")).eval()
    config = LoraConfig(
        r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=["q_proj", "down_proj"], init_lora_weights=False,
    )  # fmt: skip
    model.add_adapter("other", config)
    inputs = inputs_for(model)
    outputs = {}
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        outputs[len(outputs)] = model(**inputs).logits
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
