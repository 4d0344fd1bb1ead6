"""quantize_model replaces linear layers in place."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from little_model import FOUR_BITS, TOKENS, TWO_BITS, Model, bits, quiet
from tiny_models import quantized_names
from torch import nn

from hqqlora import BaseQuantizeConfig, HQQLinear, quantize_model
from hqqlora.module_names import matches


class TestQuantizeModel:
    def test_it_replaces_every_linear_layer_but_the_head_and_returns_the_model(self) -> None:
        model = Model()
        assert quiet(model, FOUR_BITS) is model
        assert quantized_names(model) == [
            f"layers.{i}.{name}_proj" for i in (0, 1) for name in ("q", "v", "up", "down")
        ]
        assert type(model.lm_head) is nn.Linear

    def test_each_layer_is_what_hqqlinear_makes_of_it(self) -> None:
        model, expected = Model(), Model()
        quiet(model, FOUR_BITS)
        dense = expected.layers[1].up_proj
        layer = HQQLinear(dense, FOUR_BITS, compute_dtype=torch.float32)  # type: ignore[arg-type]
        quantized = model.layers[1].up_proj
        assert isinstance(quantized, HQQLinear)
        for mine, other in zip(quantized.parameters(), layer.parameters(), strict=True):
            assert torch.equal(mine, other)

    def test_the_model_computes_nearly_the_same(self) -> None:
        model = Model()
        expected = model(TOKENS)
        quiet(model, BaseQuantizeConfig(nbits=8, group_size=32))
        assert (model(TOKENS) - expected).norm() <= 0.02 * expected.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_compute_dtype_is_the_weights_own_unless_asked(
        self, dtype: torch.dtype
    ) -> None:
        model = quiet(Model().to(dtype), FOUR_BITS)
        layer = model.get_submodule("layers.0.v_proj")
        assert layer.compute_dtype == layer.scale.dtype == dtype
        assert layer.bias.dtype == dtype  # type: ignore[union-attr]
        assert model(TOKENS).dtype == dtype
        model = quiet(
            Model(), FOUR_BITS, compute_dtype=torch.bfloat16, meta_dtype=torch.float16
        )
        layer = model.get_submodule("layers.0.v_proj")
        assert layer.compute_dtype == torch.bfloat16
        assert layer.scale.dtype == torch.float16

    def test_the_model_can_be_converted_afterwards(self) -> None:
        model = quiet(Model(), FOUR_BITS).to(torch.bfloat16)
        assert model(TOKENS).dtype == torch.bfloat16

    def test_skipped_modules_stay_dense(self) -> None:
        model = quiet(Model(), FOUR_BITS, skip_modules=["layers.0", "q_proj"])
        assert quantized_names(model) == [
            "layers.1.v_proj",
            "layers.1.up_proj",
            "layers.1.down_proj",
            "lm_head",
        ]

    def test_a_second_call_does_what_is_left(self) -> None:
        model = quiet(Model(), FOUR_BITS, skip_modules=["lm_head", "layers.1"])
        codes = model.get_submodule("layers.0.q_proj").W_q
        quiet(model, TWO_BITS)
        assert model.get_submodule("layers.0.q_proj").W_q is codes
        assert set(bits(model).values()) == {4, 2}
        assert quiet(model, TWO_BITS) is model

    def test_a_module_in_two_places_stays_one_module(self) -> None:
        model = Model()
        model.layers[1].q_proj = model.layers[0].q_proj
        quiet(model, FOUR_BITS)
        assert isinstance(model.layers[0].q_proj, HQQLinear)
        assert model.layers[1].q_proj is model.layers[0].q_proj

    def test_training_mode_is_kept(self) -> None:
        assert quiet(Model().eval(), FOUR_BITS).get_submodule("layers.0.q_proj").training is (
            False
        )

    def test_each_dense_weight_is_freed_before_the_next_layer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = Model(layers=3)
        parameters = [
            weakref.ref(m.weight)
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and n != "lm_head"
        ]
        counts = []
        original = HQQLinear.__init__

        def counting(self: HQQLinear, *arguments: Any, **options: Any) -> None:
            counts.append(sum(parameter() is not None for parameter in parameters))
            original(self, *arguments, **options)

        monkeypatch.setattr(HQQLinear, "__init__", counting)
        gc.disable()
        try:
            quiet(model, FOUR_BITS)
        finally:
            gc.enable()
        assert counts == [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]

    def test_the_progress_bar_goes_to_stderr_or_nowhere(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        quantize_model(Model(), FOUR_BITS)
        captured = capfd.readouterr()
        assert captured.out == ""
        assert "8/8" in captured.err
        quantize_model(Model(), FOUR_BITS, progress=False)
        captured = capfd.readouterr()
        assert captured.out == captured.err == ""


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("q_proj", True),
            ("layers.0.self_attn.q_proj", True),
            ("layers.0", True),
            ("self_attn", True),
            ("self_attn.*", True),
            ("self_attn.?_proj", True),
            ("layers.[01]", True),
            ("*", True),
            ("proj", False),
            ("q_pro", False),
            ("layers.0.q_proj", False),
            ("layers.1", False),
            ("attn.q_proj", False),
            ("Q_proj", False),
            ("", False),
        ],
    )
    def test_a_pattern_means_whole_parts_of_a_name(self, pattern: str, expected: bool) -> None:
        assert matches("layers.0.self_attn.q_proj", pattern) == expected

    def test_the_first_pattern_that_matches_decides(self) -> None:
        config = {"layers.0.q_proj": None, "layers.0": TWO_BITS, "*_proj": FOUR_BITS}
        model = quiet(Model(), config)
        assert bits(model) == {
            "layers.0.v_proj": 2,
            "layers.0.up_proj": 2,
            "layers.0.down_proj": 2,
            "layers.1.q_proj": 4,
            "layers.1.v_proj": 4,
            "layers.1.up_proj": 4,
            "layers.1.down_proj": 4,
        }

    def test_what_no_pattern_matches_stays_dense(self) -> None:
        assert bits(quiet(Model(), {"down_proj": TWO_BITS})) == {
            "layers.0.down_proj": 2,
            "layers.1.down_proj": 2,
        }

    def test_a_pattern_that_matches_nothing_is_reported(self) -> None:
        with pytest.warns(UserWarning, match="no module's name matches the pattern 'qproj'"):
            quiet(Model(), {"qproj": TWO_BITS, "*": FOUR_BITS})


class TestWhatStaysDense:
    def test_tied_weights_with_a_warning(self) -> None:
        model = Model(tied=True)
        with pytest.warns(UserWarning, match="lm_head stays dense: .* tied to embed.weight"):
            quiet(model, FOUR_BITS, skip_modules=[])
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.embed.weight

    def test_tied_weights_that_are_skipped_anyway_without_one(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quiet(Model(tied=True), FOUR_BITS)

    def test_weights_tied_by_memory_alone(self) -> None:
        model = Model()
        model.layers[0].q_proj.weight = nn.Parameter(model.layers[1].q_proj.weight.data)
        with pytest.warns(UserWarning, match="stays dense: its weight is tied to"):
            quiet(model, FOUR_BITS)
        assert "layers.0.q_proj" not in quantized_names(model)
        assert "layers.1.q_proj" not in quantized_names(model)

    def test_other_classes_than_linear(self) -> None:
        pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
        model = nn.ModuleDict(
            {
                "conv1d": pytorch_utils.Conv1D(32, 32),
                "attention": nn.MultiheadAttention(32, 4),
                "convolution": nn.Conv2d(32, 32, 1),
                "fc": nn.Linear(32, 32),
            }
        )
        quiet(model, FOUR_BITS)
        assert quantized_names(model) == ["fc"]

    def test_layers_whose_parent_reads_their_weight(self) -> None:
        encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        model = nn.ModuleDict({"encoder": encoder, "fc": nn.Linear(32, 32)})
        with pytest.warns(UserWarning, match="reads the weight itself") as caught:
            quiet(model, FOUR_BITS)
        assert [str(w.message).partition(":")[0] for w in caught] == [
            "encoder.linear1 stays dense",
            "encoder.linear2 stays dense",
        ]
        assert quantized_names(model) == ["fc"]
        with torch.no_grad():
            assert torch.isfinite(encoder(torch.randn(1, 3, 32))).all()

    def test_expert_parameters_with_a_warning(self) -> None:
        model = Model()
        model.experts = nn.Module()
        model.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 16))
        with pytest.warns(
            UserWarning, match=r"1 expert parameters .*experts.gate_up_proj \[4, 8, 16\]"
        ):
            quiet(model, FOUR_BITS)

    def test_an_adapter_of_pefts_is_not_quantized(self) -> None:
        model = nn.ModuleDict(
            {
                "base_layer": nn.Linear(32, 32),
                "lora_A": nn.ModuleDict({"default": nn.Linear(32, 8)}),
                "lora_B": nn.ModuleDict({"default": nn.Linear(8, 32)}),
            }
        )
        quiet(model, FOUR_BITS)
        assert quantized_names(model) == ["base_layer"]


class TestRefusals:
    def test_a_group_size_that_does_not_fit_before_anything_is_changed(self) -> None:
        model = Model()
        model.layers[1].down_proj = nn.Linear(3, 5)
        with pytest.raises(
            ValueError, match=r"layers.1.down_proj: group_size=32 .* weight \[5, 3\]"
        ):
            quiet(model, FOUR_BITS)
        assert quantized_names(model) == []

    def test_a_weight_that_is_not_finite_with_the_layers_name(self) -> None:
        model = Model()
        with torch.no_grad():
            model.layers[1].v_proj.weight[2, 3] = float("inf")  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"^layers.1.v_proj: weight\[2, 3\] is inf"):
            quiet(model, FOUR_BITS)
        assert quantized_names(model)[-1] == "layers.1.q_proj"

    def test_a_model_without_data(self) -> None:
        with torch.device("meta"):
            model = Model()
        with pytest.raises(TypeError, match=r"layers.0.q_proj: .*meta device"):
            quiet(model, FOUR_BITS)

    def test_a_model_with_nothing_to_quantize(self) -> None:
        with pytest.raises(ValueError, match="no layer of Sequential is to be quantized"):
            quiet(nn.Sequential(nn.Embedding(4, 4)), FOUR_BITS)
        with pytest.raises(ValueError, match=r"skip_modules=\['layers', 'lm_head'\]"):
            quiet(Model(), FOUR_BITS, skip_modules=["layers", "lm_head"])

    def test_a_linear_layer_itself(self) -> None:
        with pytest.raises(TypeError, match="use HQQLinear"):
            quiet(nn.Linear(32, 32), FOUR_BITS)

    @pytest.mark.parametrize("config", [None, "4bit", 4])
    def test_what_is_no_configuration(self, config: Any) -> None:
        with pytest.raises(TypeError, match="config must be a configuration dict"):
            quiet(Model(), config)

    def test_a_misspelt_option_is_no_pattern(self) -> None:
        with pytest.raises(ValueError, match=r"unknown keys \['bits'\]"):
            quiet(Model(), {"bits": 4, "group_size": 32})
