"""HqqConfig: version 4's arguments, the two forms of config.json, and what is refused."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from hqqlora import BaseQuantizeConfig  # noqa: E402
from hqqlora.transformers import HqqConfig, HqqQuantizer  # noqa: E402
from hqqlora.transformers.layer_plan import LayerSettings, linear_tag  # noqa: E402

FLAT = {"nbits": 2, "group_size": 32, "axis": 0}


def nested(**values: Any) -> dict[str, Any]:
    return BaseQuantizeConfig(**values)


def bits(config: HqqConfig, *names: str) -> list[int | None]:
    of = LayerSettings(config)
    return [s.nbits if (s := of.for_layer(name)) else None for name in names]


class TestArguments:
    def test_the_defaults_are_version_4s(self) -> None:
        config = HqqConfig()
        assert config.quant_config == nested(nbits=4, group_size=64, axis=1)
        assert config.skip_modules == ["lm_head"]
        assert config.quant_method == "hqq"

    def test_they_come_in_version_4s_order(self) -> None:
        config = HqqConfig(3, 32, True, 0, None, ["score"])
        expected = nested(nbits=3, group_size=32, view_as_float=True, axis=0)
        assert config.quant_config == expected
        assert config.skip_modules == ["score"]

    def test_no_axis_is_axis_1(self) -> None:
        assert HqqConfig(axis=None).quant_config == HqqConfig(axis=1).quant_config

    @pytest.mark.parametrize("name", ["quant_zero", "quant_scale", "offload_meta"])
    def test_old_arguments_may_be_false_and_are_refused_by_name_otherwise(
        self, name: str
    ) -> None:
        assert HqqConfig(**{name: False}).to_dict() == HqqConfig().to_dict()
        with pytest.raises(ValueError, match=f"{name}=True is not supported"):
            HqqConfig(**{name: True})

    def test_no_modules_to_skip(self) -> None:
        assert HqqConfig(skip_modules=None).skip_modules == []
        assert HqqConfig(skip_modules=[]).skip_modules == []

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"nbit": 4}, TypeError, r"no arguments \['nbit'\]; it has .*'nbits'"),
            ({"nbits": 7}, ValueError, "nbits=7 is not supported; supported are 8, 4, 3, 2, 1"),
            ({"group_size": 0}, ValueError, "group_size=0 must be positive"),
            ({"axis": 2}, ValueError, "axis=2 must be 1"),
            ({"skip_modules": "lm_head"}, TypeError, "must be a list of names, not 'lm_head'"),
            ({"dynamic_config": {}}, TypeError, "dynamic_config must be a dict"),
            ({"dynamic_config": {"mlp": 4}}, TypeError, r"\['mlp'\] must be a dict or None"),
            (
                {"dynamic_config": {"mlp": {"bits": 4}}},
                ValueError,
                r"dynamic_config\['mlp'\]: unknown keys \['bits'\]; known are .*'nbits'",
            ),
            (
                {"dynamic_config": {"attn": {}, "mlp": {"nbits": 5}}},
                ValueError,
                r"dynamic_config\['mlp'\]: nbits=5 is not supported",
            ),
            (
                {"dynamic_config": {"mlp": {"quant_zero": True}}},
                ValueError,
                r"dynamic_config\['mlp'\]: quant_zero=True is not supported",
            ),
        ],
    )
    def test_what_is_wrong_is_named(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            HqqConfig(**arguments)


class TestDynamicConfig:
    def test_each_key_has_a_configuration_of_its_own(self) -> None:
        config = HqqConfig(
            dynamic_config={"self_attn.q_proj": FLAT, "mlp.up_proj": nested(nbits=3), "x": None}
        )
        assert config.quant_config == {
            "self_attn.q_proj": nested(**FLAT),
            "mlp.up_proj": nested(nbits=3),
            "x": None,
        }

    def test_what_an_entry_leaves_out_is_as_in_the_other_arguments(self) -> None:
        config = HqqConfig(nbits=8, axis=0, dynamic_config={"mlp": {"group_size": 16}})
        assert config.quant_config == {"mlp": nested(nbits=8, group_size=16, axis=0)}

    def test_a_tag_is_a_name_without_model_layers_and_numbers(self) -> None:
        assert linear_tag("model.layers.3.self_attn.q_proj") == "self_attn.q_proj"
        assert (
            linear_tag("bert.encoder.layer.0.output.dense") == "bert.encoder.layer.output.dense"
        )

    def test_tags_patterns_and_attention_under_any_name(self) -> None:
        config = HqqConfig(
            dynamic_config={"attn": {"nbits": 4}, "mlp.*_proj": {"nbits": 2}, "layers.1": None}
        )
        names = ["model.layers.0.self_attn.q_proj", "h.0.attn.c_proj", "layer.0.attention.key"]
        assert bits(config, *names, "decoder.block.0.SelfAttention.q") == [4, 4, 4, 4]
        assert bits(config, "model.layers.1.mlp.up_proj", "model.layers.1.other") == [2, None]
        assert bits(config, "pooler.dense") == [None]

    def test_a_tag_is_stronger_than_patterns_and_the_first_pattern_than_others(self) -> None:
        config = HqqConfig(
            dynamic_config={
                "attn": {"nbits": 8},
                "*": {"nbits": 4},
                "self_attn.q_proj": {"nbits": 2},
                "mlp": {"nbits": 1},
            }
        )
        assert bits(config, "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj") == [2, 8]
        assert bits(config, "layers.0.mlp.up_proj") == [4]

    def test_skip_modules_are_stronger_than_patterns_but_not_than_tags(self) -> None:
        """In version 4, a tag in dynamic_config decided, whatever skip_modules said."""
        skipping = {"skip_modules": ["lm_head", "layers.1"]}
        config = HqqConfig(dynamic_config={"*": {}}, **skipping)
        assert bits(config, "lm_head", "layers.1.q", "layers.10.q") == [None, None, 4]
        config = HqqConfig(dynamic_config={"lm_head": {"nbits": 8}}, **skipping)
        assert bits(config, "lm_head") == [8]

    def test_one_configuration_is_for_all_but_skipped_layers(self) -> None:
        config = HqqConfig(nbits=3, skip_modules=["lm_head", "self_attn.q_proj"])
        assert bits(config, "lm_head", "model.layers.0.self_attn.q_proj") == [None, None]
        assert bits(config, "model.layers.0.self_attn.k_proj", "lm_head2") == [3, 3]


class TestAsADict:
    @pytest.mark.parametrize(
        "config",
        [
            HqqConfig(),
            HqqConfig(nbits=3, group_size=None, axis=0, skip_modules=[]),
            HqqConfig(dynamic_config={"self_attn.q_proj": {"nbits": 2}, "mlp": None}),
        ],
    )
    def test_it_survives_json_and_pickle(self, config: HqqConfig) -> None:
        stored = json.loads(json.dumps(config.to_dict()))
        assert set(stored) == {"quant_config", "quant_method", "skip_modules"}
        assert HqqConfig.from_dict(stored).to_dict() == config.to_dict()
        assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()

    def test_it_says_nothing_that_hqq_does_not_know(self) -> None:
        """The solver is ours, and done when the checkpoint is written."""
        config = HqqConfig(solver="reference")
        assert config.quant_config["solver"] == "reference"
        hqq = pytest.importorskip("hqq.core.quantize")
        theirs = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
        assert config.to_dict()["quant_config"] == theirs

    def test_a_flat_quant_config_of_old(self) -> None:
        old = {
            "quant_config": {**FLAT, "quant_zero": True, "quant_scale": False},
            "quant_method": "hqq",
            "skip_modules": ["lm_head"],
        }
        assert HqqConfig.from_dict(old).quant_config == nested(**FLAT)

    def test_a_nested_quant_config_of_old_with_quantized_scales(self) -> None:
        """The tensors of the checkpoint tell whether they are."""
        stored = nested(**FLAT)
        stored["zero_quant_params"] = {"nbits": 8, "group_size": 128}
        config = HqqConfig.from_dict({"quant_method": "hqq", "quant_config": stored})
        assert config.quant_config == nested(**FLAT)
        assert config.skip_modules == ["lm_head"]

    def test_keyword_arguments_as_a_dict(self) -> None:
        values = {"quant_method": "hqq", "nbits": 2, "group_size": 16}
        config = HqqConfig.from_dict(values)
        assert config.quant_config == nested(nbits=2, group_size=16)
        with pytest.raises(ValueError, match="quant_scale=True is not supported"):
            HqqConfig.from_dict({**values, "quant_scale": True})

    def test_a_diff_has_what_is_not_by_default(self) -> None:
        assert HqqConfig().to_diff_dict() == {"quant_method": "hqq"}
        diff = HqqConfig(skip_modules=[]).to_diff_dict()
        assert diff == {"quant_method": "hqq", "skip_modules": []}
        assert '"nbits": 2' in repr(HqqConfig(nbits=2))

    @pytest.mark.parametrize(
        ("stored", "message"),
        [
            ({"quant_method": "awq"}, "quant_method is 'awq', not 'hqq'"),
            ({"quant_config": FLAT, "bits": 4}, r"unknown keys \['bits'\]; known are"),
            ({"quant_config": {"nbits": 4, "bits": 4}}, r"unknown keys \['bits'\]"),
            ({"quant_config": {"nbits": 6}}, "quant_config: nbits=6 is not supported"),
            (
                {"quant_config": {"mlp": {"nbits": 6}, "attn": FLAT}},
                r"quant_config\['mlp'\]: nbits=6",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, stored: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            HqqConfig.from_dict(stored)


class TestTransformersRegistry:
    def test_hqq_means_our_classes(self) -> None:
        from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

        stored = {"quant_method": "hqq", "quant_config": FLAT, "skip_modules": []}
        config = AutoQuantizationConfig.from_dict(stored)
        assert isinstance(config, HqqConfig)
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        assert isinstance(quantizer, HqqQuantizer)
        assert quantizer.quantization_config is not config  # the user's stays as it is

    def test_transformers_own_configuration_is_taken_for_ours(self) -> None:
        pytest.importorskip("hqq")
        theirs = transformers.utils.quantization_config.HqqConfig(
            nbits=3, group_size=32, axis=0, skip_modules=["score"]
        )
        ours = HqqQuantizer(theirs, pre_quantized=False).quantization_config
        expected = HqqConfig(nbits=3, group_size=32, axis=0, skip_modules=["score"])
        assert ours.to_dict() == expected.to_dict()

    def test_another_method_stays_as_it_was(self) -> None:
        from transformers.quantizers import auto

        assert auto.AUTO_QUANTIZER_MAPPING["awq"].__module__.startswith("transformers.")
