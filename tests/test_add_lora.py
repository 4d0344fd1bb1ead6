"""add_lora puts adapters on the layers of a quantized model."""

from typing import Any

import pytest
import torch
from little_model import FOUR_BITS, TOKENS, Model, quiet
from tiny_models import quantized_names
from torch import nn

from hqqlora import LoRALinear, add_lora, lora_parameters


class TestAddLora:
    @pytest.fixture
    def model(self) -> nn.Module:
        return quiet(Model(), FOUR_BITS)

    @staticmethod
    def adapted(model: nn.Module) -> list[str]:
        return [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]

    def test_it_adapts_every_quantized_layer_and_trains_nothing_else(
        self, model: nn.Module
    ) -> None:
        names = quantized_names(model)
        assert add_lora(model, r=4, lora_alpha=8, lora_dropout=0.1) is model
        assert self.adapted(model) == names
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{n}.{f}" for n in names for f in ("lora_A", "lora_B")}
        layer = model.get_submodule(names[0])
        assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (4, 8, 0.1)

    def test_the_model_computes_the_same_at_first_and_can_be_trained(
        self, model: nn.Module
    ) -> None:
        expected = model(TOKENS)
        add_lora(model, r=4)
        assert torch.equal(model(TOKENS), expected)
        optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
        model(TOKENS).pow(2).mean().backward()
        optimizer.step()
        assert not torch.equal(model(TOKENS), expected)

    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            (["q_proj", "v_proj"], ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
            (["layers.1.q_proj"], ["1.q_proj"]),
            (r"layers\.0\.(up|down)_proj", ["0.up_proj", "0.down_proj"]),
            (r".*1\.[qv]_proj", ["1.q_proj", "1.v_proj"]),
            (r"layers\.0\.q_proj|q_pro", ["0.q_proj"]),
            (["0.q_proj", "_proj", "proj"], ["0.q_proj"]),
        ],
    )
    def test_targets_are_lists_of_endings_or_a_regular_expression(
        self, model: nn.Module, targets: Any, expected: list[str]
    ) -> None:
        add_lora(model, target_modules=targets)
        assert self.adapted(model) == ["layers." + name for name in expected]

    def test_patterns_give_single_layers_another_rank_or_alpha(self, model: nn.Module) -> None:
        add_lora(
            model,
            r=4,
            lora_alpha=8,
            rank_pattern={"up_proj": 2, r"layers\.0\..*": 6},
            alpha_pattern={r"^layers\.1\.q_proj": 32},
        )
        values = {name: model.get_submodule(name) for name in self.adapted(model)}
        assert {n.removeprefix("layers."): m.r for n, m in values.items()} == {
            "0.q_proj": 6,
            "0.v_proj": 6,
            "0.up_proj": 2,
            "0.down_proj": 6,
            "1.q_proj": 4,
            "1.v_proj": 4,
            "1.up_proj": 2,
            "1.down_proj": 4,
        }
        assert values["layers.1.q_proj"].scaling == 32 / 4
        assert values["layers.1.up_proj"].scaling == 8 / 2

    def test_options_reach_the_layers(self, model: nn.Module) -> None:
        add_lora(model, r=4, use_rslora=True, lora_bias=True, dtype=torch.bfloat16)
        layer = model.get_submodule("layers.0.q_proj")
        assert layer.scaling == 16 / 2
        assert layer.lora_bias is not None
        assert all(p.dtype == torch.bfloat16 for p in lora_parameters(model))

    def test_lora_parameters_come_once_each(self, model: nn.Module) -> None:
        model.layers[1].q_proj = model.layers[0].q_proj  # type: ignore[index, union-attr]
        add_lora(model, lora_bias=True)
        assert model.layers[1].q_proj is model.layers[0].q_proj  # type: ignore[index, union-attr]
        parameters = list(lora_parameters(model))
        assert len(parameters) == len({id(p) for p in parameters}) == 3 * 7
        assert all(p.requires_grad for p in parameters)

    def test_a_second_adapter_is_refused(self, model: nn.Module) -> None:
        add_lora(model, target_modules=["q_proj"])
        with pytest.raises(ValueError, match=r"layers\.0\.q_proj has an adapter already"):
            add_lora(model)
        with pytest.raises(ValueError, match=r"layers\.0\.q_proj has an adapter already"):
            add_lora(model, target_modules=["q_proj"])
        add_lora(model, target_modules=["v_proj"])
        assert len(self.adapted(model)) == 4

    def test_dense_layers_are_refused_by_name(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="lm_head is not quantized"):
            add_lora(model, target_modules=["q_proj", "lm_head"])
        assert self.adapted(model) == []

    def test_nothing_to_adapt_is_refused(self, model: nn.Module) -> None:
        with pytest.raises(ValueError, match="means no quantized layer"):
            add_lora(model, target_modules=["k_proj"])
        with pytest.raises(ValueError, match="call quantize_model first"):
            add_lora(Model())
        with pytest.raises(ValueError, match="r=0 is not between"):
            add_lora(model, r=0)
        assert self.adapted(model) == []
