"""from_pretrained(..., quantization_config=HqqConfig(...)) quantizes a dense checkpoint."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    FAMILIES,
    assert_same_model,
    inputs_for,
    linear_names,
    quantized_names,
    save_tiny,
    tiny_bert,
    tiny_llama,
    tiny_mixtral,
    tiny_model,
    tiny_t5,
)

from hqqlora import (  # noqa: E402
    BaseQuantizeConfig,
    HQQExpertWeights,
    HQQLinear,
    input_importance,
    quantize_model,
)
from hqqlora.transformers import HqqConfig, HqqQuantizer  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def load(folder: Path, model: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    options.setdefault("quantization_config", HqqConfig(nbits=4, group_size=32))
    return model.from_pretrained(folder, **options)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny(tiny_llama(), tmp_path / "llama")


class TestWhatComesOut:
    def test_importance(self, llama: Path) -> None:
        dense = transformers.AutoModelForCausalLM.from_pretrained(llama)
        importance = input_importance(dense)
        config = HqqConfig(nbits=4, group_size=32, importance=importance)
        model = load(llama, quantization_config=config)
        plain = BaseQuantizeConfig(nbits=4, group_size=32)
        assert_same_model(
            model, quantize_model(dense, plain, progress=False, importance=importance)
        )
        assert config.importance is importance
        assert model.config.quantization_config.importance is None
        name = "model.layers.0.self_attn.q_proj"
        importance[name] = importance[name][1:]
        with pytest.raises(ValueError, match=re.escape(f"{name}: importance [")):
            load(llama, quantization_config=config)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_as_quantize_model_makes_it(
        self, tmp_path: Path, family: str, dtype: torch.dtype
    ) -> None:
        dense = tiny_model(family)
        folder = save_tiny(dense, tmp_path, dtype)
        model = load(folder, type(dense))
        expected = type(dense).from_pretrained(folder)
        quantize_model(expected, BaseQuantizeConfig(nbits=4, group_size=32), progress=False)
        for layer in expected.modules():
            if isinstance(layer, HQQLinear):
                layer.state_dict_metadata = False
        assert_same_model(model, expected)
        assert not model.training
        with torch.no_grad():
            inputs = inputs_for(model)
            assert torch.equal(model(**inputs).logits, expected(**inputs).logits)

    @pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_all_bits_and_axes_with_hqqs_own_solver(
        self, llama: Path, nbits: int, axis: int
    ) -> None:
        config = {"nbits": nbits, "group_size": 32, "axis": axis, "solver": "reference"}
        model = load(llama, quantization_config=HqqConfig(**config))
        dense = transformers.AutoModelForCausalLM.from_pretrained(llama)
        layer = model.model.layers[1].mlp.down_proj
        expected = HQQLinear(
            dense.model.layers[1].mlp.down_proj,
            BaseQuantizeConfig(**config),
            compute_dtype=torch.float32,
        )
        for key in ("W_q", "scale", "zero"):
            assert torch.equal(getattr(layer, key), getattr(expected, key))

    def test_the_dtype_asked_for_is_the_one_of_scales_and_computation(
        self, llama: Path
    ) -> None:
        model = load(llama, dtype=torch.bfloat16)
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.scale.dtype == layer.compute_dtype == model.dtype == torch.bfloat16
        assert model(**inputs_for(model)).logits.dtype == torch.bfloat16

    def test_nothing_quantized_asks_for_a_gradient(self, llama: Path) -> None:
        model = load(llama)
        quantized = set(quantized_names(model))
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name.rpartition(".")[0] not in quantized)

    def test_a_dict_will_do_and_the_users_configuration_stays_as_it_is(
        self, llama: Path
    ) -> None:
        config = HqqConfig(dynamic_config={"attn": {"nbits": 8}})
        before = copy.deepcopy(config.to_dict())
        load(llama, quantization_config=config)
        assert config.to_dict() == before
        model = load(llama, quantization_config={"quant_method": "hqq", "nbits": 2})
        assert model.model.layers[0].mlp.up_proj.nbits == 2

    def test_what_others_ask_such_a_model(self, llama: Path) -> None:
        """PEFT, Trainer and transformers itself."""
        model = load(llama)
        assert model.is_quantized
        assert model.hqq_quantized
        assert model.hf_quantizer.is_trainable
        assert not model.hf_quantizer.is_qat_trainable
        assert model.hf_quantizer.is_serializable()
        assert model.config.quantization_config.quant_method == "hqq"

    def test_it_is_moved_and_converted_without_the_package_hqq(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in [name for name in sys.modules if name.split(".")[0] == "hqq"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "hqq", None)  # an import of it fails
        model = load(llama).to("cpu").to(torch.bfloat16)
        layer = model.model.layers[0].mlp.up_proj
        assert layer.compute_dtype == layer.scale.dtype == torch.bfloat16
        assert layer.W_q.dtype == torch.uint8

    def test_generate(self, llama: Path) -> None:
        model = load(llama)
        tokens = inputs_for(model)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        with_cache = model.generate(**tokens, **options)
        assert with_cache.shape == (2, 11)
        assert torch.equal(with_cache, model.generate(**tokens, use_cache=False, **options))

    def test_it_compiles_without_a_break(self, llama: Path) -> None:
        model = load(llama)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        inputs = inputs_for(model)
        with torch.no_grad():
            assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)

    def test_progress_is_shown_and_can_be_switched_off(
        self, llama: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """transformers' own bar: each weight is quantized as it is loaded."""
        shown = transformers.utils.logging.is_progress_bar_enabled()
        try:
            transformers.utils.logging.enable_progress_bar()
            load(llama)
            assert "21/21" in capfd.readouterr().err
            transformers.utils.logging.disable_progress_bar()
            load(llama)
            assert capfd.readouterr().err == ""
        finally:
            if shown:
                transformers.utils.logging.enable_progress_bar()

    def test_a_hidden_state_has_the_gradient_of_the_dequantized_model(
        self, llama: Path
    ) -> None:
        model = load(llama)
        dense = copy.deepcopy(model).dequantize()
        gradients = []
        for each in (model, dense):
            x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
            x.requires_grad_()
            each(inputs_embeds=x).logits.square().sum().backward()
            gradients.append(x.grad)
        error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
        assert error <= 1e-4  # float32; two layers with a softmax each between


class TestWhichLayers:
    def test_the_output_layer_stays_dense_by_default(self, llama: Path) -> None:
        model = load(llama)
        assert linear_names(model)[:-1] == quantized_names(model)
        assert type(model.lm_head) is nn.Linear

    def test_it_is_quantized_if_nothing_is_to_be_skipped(self, llama: Path) -> None:
        model = load(llama, quantization_config=HqqConfig(skip_modules=[]))
        assert linear_names(model) == quantized_names(model)

    def test_tied_weights_stay_dense_always(self, tmp_path: Path) -> None:
        folder = save_tiny(tiny_llama(tie_word_embeddings=True), tmp_path)
        with pytest.warns(UserWarning, match="lm_head stays dense: its weight is tied to"):
            model = load(folder, quantization_config=HqqConfig(skip_modules=[]))
        assert "lm_head" not in quantized_names(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_each_kind_in_its_own_way(self, llama: Path) -> None:
        config = HqqConfig(
            dynamic_config={
                "self_attn.q_proj": {"nbits": 8},
                "attn": {"nbits": 4},
                "mlp": {"nbits": 2, "group_size": 32},
                "mlp.down_proj": None,
            }
        )
        model = load(llama, quantization_config=config)
        block = model.model.layers[1]
        assert (block.self_attn.q_proj.nbits, block.self_attn.k_proj.nbits) == (8, 4)
        assert (block.mlp.up_proj.nbits, block.mlp.up_proj.group_size) == (2, 32)
        assert type(block.mlp.down_proj) is nn.Linear
        assert type(model.lm_head) is nn.Linear

    def test_patterns_are_written_out_as_tags_for_other_readers(self, llama: Path) -> None:
        eight, two = {"nbits": 8}, {"nbits": 2, "group_size": 32}
        model = load(
            llama, quantization_config=HqqConfig(dynamic_config={"*_proj": two, "attn": eight})
        )
        written = model.config.quantization_config.to_dict()["quant_config"]
        assert set(written) == {f"self_attn.{n}_proj" for n in "qkvo"} | {
            f"mlp.{n}_proj" for n in ("gate", "up", "down")
        }
        assert written["mlp.up_proj"] == BaseQuantizeConfig(**two)

    def test_patterns_stay_where_a_tag_does_not_say_all(self, llama: Path) -> None:
        config = HqqConfig(dynamic_config={"layers.0": {"nbits": 8}, "*": {"nbits": 4}})
        model = load(llama, quantization_config=config)
        assert set(model.config.quantization_config.quant_config) == {"layers.0", "*"}

    def test_a_classifier_that_is_not_in_the_checkpoint_stays_dense(
        self, tmp_path: Path
    ) -> None:
        folder = save_tiny(tiny_bert(transformers.BertModel), tmp_path)
        model = load(folder, transformers.AutoModelForSequenceClassification, num_labels=3)
        assert type(model.classifier) is nn.Linear
        assert torch.isfinite(model.classifier.weight).all()
        assert model.classifier.weight.requires_grad
        assert set(linear_names(model)) - set(quantized_names(model)) == {"classifier"}

    def test_experts_in_one_tensor_are_quantized_and_their_router_is_not(
        self, tmp_path: Path
    ) -> None:
        folder = save_tiny(tiny_mixtral(), tmp_path)
        model = load(folder)
        assert "model.layers.0.self_attn.q_proj" in quantized_names(model)
        assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, HQQExpertWeights)
        assert isinstance(model.model.layers[0].mlp.gate.weight, torch.nn.Parameter)
        assert torch.isfinite(model(**inputs_for(model)).logits).all()

    def test_nothing_is_said_where_nothing_is_unusual(self, llama: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(llama)


class TestWhere:
    def test_on_the_cpu_by_any_device_map(self, llama: Path) -> None:
        pytest.importorskip("accelerate")
        expected = load(llama)
        for device_map in ("cpu", {"": "cpu"}, "auto"):
            if device_map == "auto" and torch.cuda.is_available():
                continue
            assert_same_model(load(llama, device_map=device_map), expected)

    @pytest.mark.parametrize("nbits", [4, 3])
    def test_partly_on_disk(self, llama: Path, tmp_path: Path, nbits: int) -> None:
        pytest.importorskip("accelerate")
        device_map = {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        }
        options = {"quantization_config": HqqConfig(nbits=nbits, group_size=32)}
        offload = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
        model = load(llama, **options, **offload)
        assert model.model.layers[1].mlp.up_proj.W_q.is_meta
        assert model.model.layers[0].mlp.up_proj.W_q.dtype == torch.uint8  # 3 bits: in planes
        expected = load(llama, **options)
        inputs = inputs_for(model)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert_same_model(again, expected)
        with pytest.raises(RuntimeError, match=r"layers\.1\..* is offloaded"):
            model.dequantize()

    def test_device_maps_count_quantized_sizes(self, llama: Path) -> None:
        config = HqqConfig(dynamic_config={"mlp": {"nbits": 3}, "attn": {"group_size": 32}})
        counted: dict[str, float] = {}

        quantizer = HqqQuantizer(config, pre_quantized=False)
        with torch.device("meta"):
            skeleton = transformers.LlamaForCausalLM(tiny_llama().config)
        quantizer.preprocess_model(skeleton, dtype=torch.float32)
        for name, parameter in skeleton.named_parameters():
            size = quantizer.param_element_size(skeleton, name, parameter) * parameter.numel()
            module = name.rpartition(".")[0]
            counted[module] = counted.get(module, 0) + size
        model = load(llama, quantization_config=config)
        for name in quantized_names(model):
            layer = model.get_submodule(name)
            layer.repack(planes=False)  # as it is while the loader fills the devices
            real = sum(p.numel() * p.element_size() for p in layer.parameters())
            assert counted[name] == pytest.approx(real, rel=0.02)  # 3 bits: whole words


class TestBadInput:
    @pytest.mark.parametrize("key", ["self_attn.qproj", "layers.7", "mpl"])
    def test_a_key_that_means_nothing(self, llama: Path, key: str) -> None:
        config = HqqConfig(dynamic_config={"mlp": {"nbits": 2}, key: {"nbits": 4}})
        message = re.escape(f"dynamic_config['{key}'] means no linear layer of Llama")
        with pytest.raises(ValueError, match=message + r".*'self_attn\.q_proj'"):
            load(llama, quantization_config=config)

    def test_a_group_size_that_does_not_fit(self, llama: Path) -> None:
        with pytest.raises(
            ValueError, match=r"model\.layers\.0\.\S+: group_size=96 does not divide"
        ):
            load(llama, quantization_config=HqqConfig(group_size=96))

    def test_nothing_to_quantize(self, llama: Path) -> None:
        with pytest.raises(ValueError, match="no layer of LlamaForCausalLM is to be quantized"):
            load(llama, quantization_config=HqqConfig(skip_modules=["*"]))

    def test_a_dtype_that_is_none_of_the_three(self, llama: Path) -> None:
        with pytest.raises(
            TypeError, match=r"float32, float16 or bfloat16, not torch\.float64"
        ):
            load(llama, dtype=torch.float64)

    @pytest.mark.parametrize("key", ["up_proj", "down_proj"])
    def test_a_weight_that_is_not_finite(self, llama: Path, key: str) -> None:
        state = load_file(llama / "model.safetensors")
        state[f"model.layers.1.mlp.{key}.weight"][3, 5] = float("inf")
        save_file(state, llama / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.{key}: weight\[3, 5\] is inf"):
            load(llama)

    def test_a_weight_that_is_missing(self, llama: Path) -> None:
        state = load_file(llama / "model.safetensors")
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, llama / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"layers\.1\.mlp\.up_proj: the checkpoint has no such weight"
        ):
            load(llama)

    def test_a_weight_of_another_shape(self, llama: Path) -> None:
        state = load_file(llama / "model.safetensors")
        state["model.layers.1.mlp.up_proj.weight"] = torch.randn(64, 64)
        save_file(state, llama / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((RuntimeError, ValueError), match=r"mismatch|weight is \[64, 64\]"):
            load(llama)
        # Early versions of transformers make no new weight, whatever one asks for.
        with suppress(ValueError):
            model = load(llama, ignore_mismatched_sizes=True)
            assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
            assert model.model.layers[1].mlp.up_proj.weight.shape == (128, 64)

    def test_after_a_failure_the_next_load_works(self, llama: Path) -> None:
        for bad in (HqqConfig(group_size=96), {"quant_method": "hqq", "nbits": 9}):
            with pytest.raises(ValueError, match=r"group_size=96|nbits=9"):
                load(llama, quantization_config=bad)
        assert quantized_names(load(llama))


def test_t5_keeps_in_float32_what_transformers_keeps(tmp_path: Path) -> None:
    folder = save_tiny(tiny_t5(), tmp_path, torch.float16)
    model = load(folder, transformers.AutoModelForSeq2SeqLM)
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert feed_forward.wo.compute_dtype == feed_forward.wo.scale.dtype == torch.float32
    assert feed_forward.wi.compute_dtype == torch.float16
