"""Models whose checkpoints have other names than the model, or several weights in one; and
models that were quantized in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    assert_same_model,
    inputs_for,
    linear_names,
    quantized_names,
    save_tiny,
    tiny_bert,
    tiny_llama,
    tiny_llava,
    tiny_mixtral,
    tiny_qwen2,
    tiny_t5,
)

from hqqlora import BaseQuantizeConfig, HQQLinear, quantize_model  # noqa: E402
from hqqlora.transformers import HqqConfig, mark_quantized  # noqa: E402


def tiny_dinov2() -> Any:
    """Its checkpoints have gate and up in one weight and one bias."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        use_swiglu_ffn=True,
        mlp_ratio=2,
    )
    return transformers.Dinov2Model(config)


@pytest.mark.parametrize(
    ("make", "dense_layers"),
    [
        (tiny_llava, ["lm_head"]),
        (tiny_llava, ["lm_head", "vision_tower", "multi_modal_projector"]),
        (tiny_dinov2, []),
        (tiny_dinov2, ["gate_proj"]),
        (tiny_dinov2, ["up_proj"]),
        (tiny_mixtral, ["lm_head"]),  # a weight for each expert
    ],
)
def test_save_and_load(tmp_path: Path, make: Any, dense_layers: list[str]) -> None:
    dense = make()
    folder = save_tiny(dense, tmp_path / "dense")
    config = HqqConfig(group_size=32, skip_modules=dense_layers)
    model, info = type(dense).from_pretrained(
        folder, quantization_config=config, output_loading_info=True
    )
    assert not any(info.values())
    expected = {
        name for name in linear_names(dense) if not set(name.split(".")) & set(dense_layers)
    }
    assert set(quantized_names(model)) == expected
    for name in expected:
        before, after = dense.get_submodule(name), model.get_submodule(name)
        layer = HQQLinear(
            before, BaseQuantizeConfig(group_size=32), del_orig=False, compute_dtype=model.dtype
        )
        assert torch.equal(after.W_q, layer.W_q)
        assert after.bias is None or torch.equal(after.bias, before.bias)
    model.save_pretrained(tmp_path / "saved")
    again, info = type(dense).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert_same_model(again, model)
    again.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / f / "model.safetensors") for f in ("saved", "again")]
    assert files[0].keys() == files[1].keys()


class TestQuantizedInMemory:
    @pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_bert, tiny_t5])
    @pytest.mark.parametrize("mixed", [False, True])
    def test_it_saves_and_loads_like_one_that_came_so(
        self, tmp_path: Path, make: Any, mixed: bool
    ) -> None:
        folder = save_tiny(make(), tmp_path / "dense", torch.bfloat16)
        model = type(make()).from_pretrained(folder)
        four = BaseQuantizeConfig(nbits=4, group_size=32)
        config = {"*": BaseQuantizeConfig(nbits=2, group_size=16)} if mixed else four
        if mixed:
            kind = "query" if make is tiny_bert else "q*"
            config = {kind: four, **config}
        quantize_model(model, config, progress=False)
        said = mark_quantized(model)
        assert ("weight_quant_params" in said.quant_config) != mixed
        model.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved")
        assert_same_model(again, model)
        with torch.no_grad():
            inputs = inputs_for(model)
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)

    def test_it_can_be_dequantized(self) -> None:
        model = quantize_model(tiny_llama(), BaseQuantizeConfig(), progress=False)
        mark_quantized(model)
        assert model.is_quantized
        dense = model.dequantize()
        assert not quantized_names(dense)

    def test_a_dense_model_is_none(self) -> None:
        model = tiny_llama()
        with pytest.raises(ValueError, match="no layer of LlamaForCausalLM is quantized"):
            mark_quantized(model)
        assert getattr(model, "hf_quantizer", None) is None
