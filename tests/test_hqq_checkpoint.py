"""qmodel.pt: hqq's own files are read, ours are read by hqq, and both mean the same weights.

The files under test are made by the hqq package. Where it no longer makes an old form, the
form is made by hand from what it does make; those tests say so.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hqqlora
from hqqlora import AutoHQQHFModel, HQQLinear
from hqqlora.auto_hqq_model import HQQModelForCausalLM

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
hqq = pytest.importorskip("hqq.core.quantize")

from hqq_models import (  # noqa: E402 (it needs all of these)
    BITS_OF_TAGS,
    IDS,
    TAGS,
    assert_same_weights,
    by_hqq,
    by_hqq_in_all_bits,
    change,
    dense_llama,
    loaded,
    loaded_by_hqq,
    quantized_by_hqq,
    quantized_layers,
)


class TestHqqsFilesAreRead:
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("view_as_float", [False, True])
    def test_the_weights_are_hqqs_bit_for_bit(
        self, tmp_path: Path, axis: int, view_as_float: bool
    ) -> None:
        by_hqq_in_all_bits(tmp_path, axis, view_as_float)
        ours, theirs = loaded(tmp_path), loaded_by_hqq(tmp_path)
        assert_same_weights(ours, theirs)
        layers = quantized_layers(ours, HQQLinear)
        bits = {name.removeprefix("model.layers.0."): m.nbits for name, m in layers.items()}
        assert bits == BITS_OF_TAGS
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_16_bits_the_codes_scales_and_zeros_are_hqqs(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        by_hqq(tmp_path, dtype)
        ours, theirs = loaded(tmp_path, dtype), loaded_by_hqq(tmp_path, dtype)
        u = torch.finfo(dtype).eps / 2
        for name, layer in quantized_layers(ours, HQQLinear).items():
            other = theirs.get_submodule(name)
            assert layer.compute_dtype == layer.scale.dtype == dtype
            assert torch.equal(layer.W_q, other.W_q)
            assert torch.equal(layer.scale, other.meta["scale"])
            assert torch.equal(layer.zero, other.meta["zero"])
            # hqq rounds q - zero and the product, this library the product alone.
            exact = layer.dequantize(torch.float32)
            error = (other.dequantize().float() - exact).abs()
            scale = layer.scale.float().repeat_interleave(32).reshape(exact.shape).abs()
            assert (error <= u * (2 * exact.abs() + 16 * scale)).all()
            assert torch.equal(layer.dequantize(), exact.to(dtype))

    @pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16])
    def test_a_16_bit_file_can_be_loaded_in_float32(
        self, tmp_path: Path, saved: torch.dtype
    ) -> None:
        by_hqq(tmp_path, saved, view_as_float=True)
        assert_same_weights(loaded(tmp_path), loaded_by_hqq(tmp_path))

    def test_layers_of_several_formats(self, tmp_path: Path) -> None:
        config = {
            "self_attn.q_proj": hqq.BaseQuantizeConfig(nbits=8, group_size=64),
            "self_attn.v_proj": None,
            "mlp.up_proj": hqq.BaseQuantizeConfig(nbits=2, group_size=16, axis=0),
            "mlp.down_proj": hqq.BaseQuantizeConfig(nbits=3, group_size=None),
        }
        theirs = quantized_by_hqq(config)
        theirs.base_class.save_quantized(theirs, str(tmp_path))
        ours = loaded(tmp_path)
        assert_same_weights(ours, theirs)
        bits = {
            n.rpartition(".")[2]: m.nbits for n, m in quantized_layers(ours, HQQLinear).items()
        }
        assert bits == {"q_proj": 8, "up_proj": 2, "down_proj": 3}

    @pytest.mark.parametrize(
        "quant_config",
        [
            {"nbits": 2, "group_size": 16, "quant_zero": False, "quant_scale": False},
            hqqlora.BaseQuantizeConfig(nbits=2, group_size=16),
        ],
        ids=["flat", "nested"],
    )
    def test_the_file_decides_not_a_quantization_config_of_either_age(
        self, tmp_path: Path, quant_config: dict[str, Any]
    ) -> None:
        theirs = by_hqq(tmp_path, nbits=4)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "hqq",
            "quant_config": quant_config,
            "skip_modules": ["lm_head"],
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        ours = loaded(tmp_path)
        assert_same_weights(ours, theirs)
        assert ours.model.layers[0].mlp.up_proj.nbits == 4

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_weights_are_one_parameter_again(self, tmp_path: Path, tied: bool) -> None:
        theirs = by_hqq(tmp_path, model=dense_llama(tie_word_embeddings=tied))
        ours = loaded(tmp_path)
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
        assert_same_weights(ours, theirs)

    def test_a_tied_weight_may_be_stored_once(self, tmp_path: Path) -> None:
        by_hqq(tmp_path, model=dense_llama(tie_word_embeddings=True))
        change(tmp_path, lambda states: states.pop("lm_head"))
        ours = loaded(tmp_path)
        assert ours.lm_head.weight is ours.model.embed_tokens.weight

    def test_computed_buffers_are_as_transformers_makes_them(self, tmp_path: Path) -> None:
        by_hqq(tmp_path, torch.bfloat16)
        ours = loaded(tmp_path, torch.bfloat16)
        inv_freq = dense_llama().model.rotary_emb.inv_freq
        assert inv_freq.dtype == torch.float32
        assert torch.equal(ours.model.rotary_emb.inv_freq, inv_freq)

    def test_a_loaded_model_is_frozen_on_its_device_and_generates(self, tmp_path: Path) -> None:
        by_hqq(tmp_path)
        model = loaded(tmp_path, attn_implementation="eager")
        assert not model.training
        assert model.hqq_quantized
        assert model.linear_tags == TAGS
        assert model.config._attn_implementation == "eager"
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 15)

    def test_the_older_interface_reads_them_too(self, tmp_path: Path) -> None:
        by_hqq(tmp_path / "theirs")
        model: Any = HQQModelForCausalLM.from_quantized(
            str(tmp_path / "theirs"), compute_dtype=torch.float32, device="cpu"
        )
        model.save_quantized(tmp_path / "ours")
        assert_same_weights(model, loaded_by_hqq(tmp_path / "ours"))

    def test_the_folder_may_lie_in_a_cache_dir(self, tmp_path: Path) -> None:
        by_hqq(tmp_path / "models" / "tiny")
        ours = loaded(Path("tiny"), cache_dir=tmp_path / "models")
        assert len(quantized_layers(ours, HQQLinear)) == 7


class TestOldFilesOfHqqsAreRead:
    """Forms that older versions of hqq wrote and version 0.2.8 still reads."""

    @pytest.mark.parametrize("axis", [0, 1])
    def test_metadata_nested_by_hand(self, tmp_path: Path, axis: int) -> None:
        by_hqq_in_all_bits(tmp_path, axis)

        def nest(states: dict[str, Any]) -> None:
            known_since = ("stores_quant_config", "offload_meta", "channel_wise", "optimize")
            later = ("round_zero", "unpack_view_dtype", "view_as_float")
            for name, state in states.items():
                if "W_q" in state:
                    W_q, bias = state.pop("W_q"), state.pop("bias", None)
                    for key in (*known_since, *later):
                        del state[key]
                    states[name] = {"W_q": W_q, "meta": state, "bias": bias}

        change(tmp_path, nest)
        assert_same_weights(loaded(tmp_path), loaded_by_hqq(tmp_path))

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("quantized", ["zero", "scale", "both"])
    def test_scales_and_zeros_quantized_by_hqqs_quantizer(
        self, tmp_path: Path, axis: int, quantized: str
    ) -> None:
        by_hqq_in_all_bits(tmp_path, axis)
        dense = dense_llama()

        def quantize_meta(states: dict[str, Any]) -> None:
            # hqq's constructor has come to ignore the two settings, its `quantize` has not.
            for name, state in states.items():
                if "W_q" in state:
                    config = hqq.BaseQuantizeConfig(
                        nbits=state["nbits"],
                        group_size=16,
                        axis=axis,
                        quant_zero=quantized != "scale",
                        quant_scale=quantized != "zero",
                    )
                    layer = hqq.HQQLinear(
                        None,
                        config,
                        compute_dtype=torch.float32,
                        device="cpu",
                        initialize=False,
                    )
                    layer.quantize(dense.get_submodule(name).weight.data, **layer.quant_config)
                    assert ("zero_q" in layer.meta) == (quantized != "scale")
                    assert ("scale_q" in layer.meta) == (quantized != "zero")
                    states[name] = {
                        "W_q": layer.W_q,
                        "meta": layer.meta,
                        "bias": state.get("bias"),
                    }

        change(tmp_path, quantize_meta)
        assert_same_weights(loaded(tmp_path), loaded_by_hqq(tmp_path))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_quantized_scales_and_zeros_of_a_16_bit_layer_are_hqqs(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        by_hqq(tmp_path, dtype, group_size=16)
        config = hqq.BaseQuantizeConfig(group_size=16, quant_zero=True, quant_scale=True)
        layer = hqq.HQQLinear(None, config, compute_dtype=dtype, device="cpu", initialize=False)
        name = "model.layers.0.mlp.up_proj"
        layer.quantize(dense_llama().get_submodule(name).weight.data, **layer.quant_config)
        layer.encoded_state_dict = False
        change(tmp_path, lambda states: states.update({name: layer.state_dict()}))
        ours = loaded(tmp_path, dtype).get_submodule(name)
        for key in ("scale", "zero"):
            quantized = layer.meta[f"{key}_q"], layer.meta[f"meta_{key}"]
            assert torch.equal(getattr(ours, key), hqq.Quantizer.dequantize(*quantized))

    def test_scales_and_zeros_stacked_by_hand(self, tmp_path: Path) -> None:
        # (hqq's offload_meta pins memory, which takes a GPU.)
        theirs = by_hqq(tmp_path)

        def stack(states: dict[str, Any]) -> None:
            for state in states.values():
                if "W_q" in state:
                    state["zero_scale"] = torch.stack((state.pop("zero"), state.pop("scale")))

        change(tmp_path, stack)
        assert_same_weights(loaded(tmp_path), theirs)

    def test_rotary_frequencies_once_kept_in_each_layer_are_left_out(
        self, tmp_path: Path
    ) -> None:
        theirs = by_hqq(tmp_path)
        wrong = {"inv_freq": torch.full((16,), 7.0)}
        name = "model.layers.0.self_attn.rotary_emb"
        change(tmp_path, lambda states: states.update({name: wrong}))
        ours = loaded(tmp_path)
        assert_same_weights(ours, theirs)
        expected = dense_llama().model.rotary_emb.inv_freq
        assert torch.equal(ours.model.rotary_emb.inv_freq, expected)

    def test_a_file_in_torchs_format_from_before_2020(self, tmp_path: Path) -> None:
        theirs = by_hqq(tmp_path)
        states = torch.load(tmp_path / "qmodel.pt", weights_only=True)
        torch.save(states, tmp_path / "qmodel.pt", _use_new_zipfile_serialization=False)
        assert_same_weights(loaded(tmp_path), theirs)


class TestOurFilesAreReadByHqq:
    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("view_as_float", [False, True])
    def test_the_weights_are_ours_bit_for_bit(
        self, tmp_path: Path, axis: int, view_as_float: bool
    ) -> None:
        config = {
            tag: hqqlora.BaseQuantizeConfig(
                nbits=nbits, group_size=16, axis=axis, view_as_float=view_as_float
            )
            for tag, nbits in BITS_OF_TAGS.items()
        }
        ours = AutoHQQHFModel.quantize_model(dense_llama(), config, torch.float32, "cpu")
        AutoHQQHFModel.save_quantized(ours, tmp_path / "model")
        theirs = loaded_by_hqq(tmp_path / "model")
        assert_same_weights(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)

    def test_entries_have_the_names_dtypes_and_shapes_of_hqqs(self, tmp_path: Path) -> None:
        by_hqq(tmp_path / "theirs")
        AutoHQQHFModel.save_quantized(loaded(tmp_path / "theirs"), tmp_path / "ours")

        def described(value: object) -> object:
            tensor = isinstance(value, Tensor)
            return (value.dtype, value.shape) if tensor else value  # type: ignore[attr-defined]

        files = []
        for name in ("ours", "theirs"):
            states = torch.load(tmp_path / name / "qmodel.pt", weights_only=True)
            files.append(
                {n: {k: described(v) for k, v in s.items()} for n, s in states.items()}
            )
        assert files[0] == files[1]

    def test_what_is_read_is_written_again_bit_for_bit(self, tmp_path: Path) -> None:
        by_hqq(tmp_path / "theirs", nbits=3, axis=0)
        AutoHQQHFModel.save_quantized(loaded(tmp_path / "theirs"), tmp_path / "ours")
        assert_same_weights(loaded(tmp_path / "ours"), loaded_by_hqq(tmp_path / "theirs"))

    def test_a_folder_can_be_written_over_while_its_model_is_loaded(
        self, tmp_path: Path
    ) -> None:
        by_hqq(tmp_path)
        model = loaded(tmp_path)
        AutoHQQHFModel.save_quantized(model, tmp_path)
        assert_same_weights(model, loaded_by_hqq(tmp_path))
        assert sorted(os.listdir(tmp_path)) == [
            "config.json",
            "generation_config.json",
            "qmodel.pt",
        ]

    def test_config_json_names_the_class_and_no_quantization(self, tmp_path: Path) -> None:
        ours: Any = AutoHQQHFModel.quantize_model(
            dense_llama(), hqqlora.BaseQuantizeConfig(), torch.float32, "cpu"
        )
        ours.config.quantization_config = {"quant_method": "hqq"}
        AutoHQQHFModel.save_quantized(ours, tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert "quantization_config" not in config
        assert ours.config.quantization_config == {"quant_method": "hqq"}

    def test_adapters_are_refused_and_nothing_is_written(self, tmp_path: Path) -> None:
        model = AutoHQQHFModel.quantize_model(
            dense_llama(), hqqlora.BaseQuantizeConfig(), torch.float32, "cpu"
        )
        hqqlora.add_lora(model, target_modules=["q_proj"])
        with pytest.raises(ValueError, match="q_proj is a LoRALinear: save the adapter on its"):
            AutoHQQHFModel.save_quantized(model, tmp_path / "model")
        with pytest.raises(ValueError, match="LlamaForCausalLM has no quantized layer"):
            AutoHQQHFModel.save_quantized(dense_llama(), tmp_path / "model")
        assert not (tmp_path / "model").exists()
