"""Adapters are saved in PEFT's format: PEFT reads ours, and we read PEFT's."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layers import trained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hqqlora import (
    BaseQuantizeConfig,
    add_lora,
    load_adapter,
    lora_parameters,
    quantize_model,
    save_adapter,
)
from hqqlora.model import lora_layers


class Net(nn.Module):
    """Two stacked layers, so that names have a dot in them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"fc1": nn.Linear(32, 48), "fc2": nn.Linear(48, 32)})
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body["fc2"](torch.relu(self.body["fc1"](x))))
        return y


def net(**options: Any) -> nn.Module:
    """A Net with its body quantized and, given options, adapted."""
    config = BaseQuantizeConfig(nbits=4, group_size=16)
    model = quantize_model(Net(), config, skip_modules=["head"], progress=False)
    return trained(add_lora(model, **options)) if options else model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


X = torch.linspace(-1, 1, 5 * 32).reshape(5, 32)


class TestFiles:
    def test_they_are_pefts(self, tmp_path: Path) -> None:
        model = net(r=4, lora_alpha=8, lora_dropout=0.1)
        save_adapter(model, tmp_path / "adapter", "somebody/model")
        assert sorted(os.listdir(tmp_path)) == ["adapter"]
        assert sorted(os.listdir(tmp_path / "adapter")) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config == {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": "somebody/model",
            "inference_mode": True,
            "target_modules": ["fc1", "fc2"],
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {},
            "alpha_pattern": {},
            "lora_dropout": 0.1,
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
        }
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
            "base_model.model.body.fc1.lora_A.weight": (4, 32),
            "base_model.model.body.fc1.lora_B.weight": (48, 4),
            "base_model.model.body.fc2.lora_A.weight": (4, 48),
            "base_model.model.body.fc2.lora_B.weight": (32, 4),
        }

    def test_the_targets_are_full_names_where_endings_would_mean_more(
        self, tmp_path: Path
    ) -> None:
        model = Net()
        model.other = nn.ModuleDict({"fc1": nn.Linear(4, 4)})
        config = BaseQuantizeConfig(nbits=4, group_size=16)
        quantize_model(model, config, skip_modules=["head", "other"], progress=False)
        save_adapter(add_lora(model, target_modules=["body.fc1"]), tmp_path)
        targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
        assert targets == ["body.fc1"]

    def test_ranks_and_alphas_that_differ_become_patterns(self, tmp_path: Path) -> None:
        model = net(r=4, lora_alpha=8, rank_pattern={"fc2": 2}, alpha_pattern={"fc2": 6})
        save_adapter(model, tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 8)
        assert config["rank_pattern"] == {r"^body\.fc2": 2}
        assert config["alpha_pattern"] == {r"^body\.fc2": 6}

    def test_what_pefts_format_cannot_say_is_refused(self, tmp_path: Path) -> None:
        for attribute, value in (("lora_dropout", 0.5), ("use_rslora", True)):
            model = net(r=4)
            setattr(model.get_submodule("body.fc1"), attribute, value)
            with pytest.raises(ValueError, match=f"{attribute} differs between layers"):
                save_adapter(model, tmp_path / "adapter")
        model = add_lora(
            net(r=4, target_modules=["fc1"]), lora_bias=True, target_modules=["fc2"]
        )
        with pytest.raises(ValueError, match="lora_bias differs between layers"):
            save_adapter(model, tmp_path / "adapter")
        with pytest.raises(ValueError, match="no LoRALinear to save"):
            save_adapter(net(), tmp_path / "adapter")
        assert os.listdir(tmp_path) == []

    def test_a_failure_to_write_leaves_the_adapter_from_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_adapter(net(r=4), tmp_path)
        before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

        def full(*arguments: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("hqqlora.files.save_file", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            save_adapter(net(r=8), tmp_path)
        assert caught.value.filename == str(tmp_path / "adapter_model.safetensors")
        after = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
        assert after == before


class TestRoundTrip:
    @pytest.mark.parametrize(
        "options",
        [
            {"r": 4, "lora_alpha": 8},
            {"r": 4, "lora_alpha": 8.5, "use_rslora": True},
            {"r": 4, "lora_dropout": 0.25, "lora_bias": True},
            {"r": 4, "rank_pattern": {"fc2": 2}, "alpha_pattern": {"fc1": 3}},
            {"r": 4, "target_modules": ["fc2"]},
            {"r": 4, "dtype": torch.bfloat16},
        ],
    )
    def test_a_saved_adapter_loads_into_the_quantized_model(
        self, options: dict[str, Any], tmp_path: Path
    ) -> None:
        model, other = net(**options), net()
        save_adapter(model, tmp_path)
        assert load_adapter(other, tmp_path, dtype=options.get("dtype", torch.float32)) is other
        adapters = dict(lora_layers(other))
        assert adapters.keys() == dict(lora_layers(model)).keys()
        for name, expected in lora_layers(model):
            loaded = adapters[name]
            for attribute in ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora"):
                assert getattr(loaded, attribute) == getattr(expected, attribute)
        assert torch.equal(other.eval()(X), model.eval()(X))

    def test_the_loaded_model_is_ready_for_more_training(self, tmp_path: Path) -> None:
        save_adapter(net(r=4), tmp_path)
        other = load_adapter(net(), tmp_path)
        trainable = {name for name, p in other.named_parameters() if p.requires_grad}
        assert trainable == {f"body.{n}.lora_{f}" for n in ("fc1", "fc2") for f in "AB"}
        other(X).sum().backward()
        assert all(p.grad is not None for p in lora_parameters(other))

    def test_it_loads_into_adapters_that_are_there(self, tmp_path: Path) -> None:
        model, other = net(r=4), net(r=4)
        save_adapter(model, tmp_path)
        layers = dict(lora_layers(other))
        with torch.no_grad():
            for parameter in lora_parameters(other):
                parameter.zero_()
        load_adapter(other, tmp_path)
        assert dict(lora_layers(other)) == layers
        assert torch.equal(other(X), model(X))

    def test_a_merged_model_saves_the_same_adapter(self, tmp_path: Path) -> None:
        model = net(r=4)
        save_adapter(model, tmp_path / "before")
        for _, layer in lora_layers(model):
            layer.merge()
        save_adapter(model, tmp_path / "after")
        for name in os.listdir(tmp_path / "before"):
            before = (tmp_path / "before" / name).read_bytes()
            assert before == (tmp_path / "after" / name).read_bytes()

    def test_compiled_and_distributed_models_save_the_same_names(self, tmp_path: Path) -> None:
        model = net(r=4)
        save_adapter(model, tmp_path / "plain")
        expected = (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
        body = model.get_submodule("body")
        body.fc1 = torch.compile(body.fc1)  # type: ignore[assignment]
        save_adapter(torch.compile(model), tmp_path / "compiled")  # type: ignore[arg-type]
        for name in os.listdir(tmp_path / "plain"):
            expected = (tmp_path / "plain" / name).read_bytes()
            assert (tmp_path / "compiled" / name).read_bytes() == expected

    def test_it_loads_into_a_compiled_model(self, tmp_path: Path) -> None:
        model = net(r=4)
        save_adapter(model, tmp_path)
        other = net()
        load_adapter(torch.compile(other), tmp_path)  # type: ignore[arg-type]
        assert torch.equal(other(X), model(X))

    def test_a_pickled_adapter_of_older_versions_loads(self, tmp_path: Path) -> None:
        model, other = net(r=4), net()
        save_adapter(model, tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        torch.save(tensors, tmp_path / "adapter_model.bin")
        (tmp_path / "adapter_model.safetensors").unlink()
        load_adapter(other, tmp_path)
        assert torch.equal(other(X), model(X))


class TestRefusals:
    """What does not fit is refused by name, and the model stays as it was."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        save_adapter(net(r=4, lora_alpha=8), tmp_path)
        return tmp_path

    @staticmethod
    def refuse(folder: Path, message: str, model: nn.Module | None = None) -> None:
        model = net() if model is None else model
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            load_adapter(model, folder)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"use_dora": True}, "DoRA is not supported, only plain LoRA and rsLoRA are"),
            ({"use_qalora": True}, "QALoRA is not supported"),
            ({"modules_to_save": ["head"]}, r"modules_to_save=\['head'\] is not supported"),
            ({"bias": "all"}, "bias='all' is not supported"),
            ({"layer_replication": [[0, 1]]}, "layer_replication="),
            ({"target_parameters": ["w"]}, "target_parameters="),
            ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
            ({"r": None}, "r is None, not a number"),
            ({"r": 8}, r"body.fc1: lora_A is \[4, 32\], but the layer and r=8 call for \[8"),
            ({"rank_pattern": {"fc2": 2}}, r"body.fc2: lora_A is \[4, 48\], but .* r=2"),
            ({"lora_bias": True}, "body.fc1 and the configuration disagree on lora_bias"),
        ],
    )
    def test_another_kind_of_adapter(
        self, folder: Path, changes: dict[str, Any], message: str
    ) -> None:
        edit_config(folder, **changes)
        self.refuse(folder, message)

    @pytest.mark.parametrize(
        ("key", "shape", "message"),
        [
            ("body.fc9.lora_A.weight", (4, 32), "body.fc9 has only one of lora_A and lora_B"),
            ("body.fc1.lora_magnitude_vector", (48,), "not part of a plain LoRA adapter"),
            ("body.fc1.lora_A.weight", (4, 31), r"lora_A is \[4, 31\]"),
            ("body.fc2.lora_B.weight", (31, 4), r"lora_B is \[31, 4\]"),
        ],
    )
    def test_tensors_that_do_not_fit(
        self, folder: Path, key: str, shape: tuple[int, ...], message: str
    ) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({**load_file(path), f"base_model.model.{key}": torch.zeros(shape)}, path)
        self.refuse(folder, message)

    def test_layers_that_are_missing_or_dense(self, folder: Path) -> None:
        self.refuse(folder, "body.fc1 is a Linear: only quantized layers", Net())
        path = folder / "adapter_model.safetensors"
        tensors = {k.replace("fc2", "fc9"): v for k, v in load_file(path).items()}
        save_file(tensors, path)
        self.refuse(folder, "the model has no module 'body.fc9'")

    def test_adapters_there_that_differ(self, folder: Path) -> None:
        self.refuse(
            folder, r"body.fc1 has an adapter with .* = \(8, 8, ", net(r=8, lora_alpha=8)
        )
        model = net(r=4, lora_alpha=8)
        model.get_submodule("body.fc2").merge()  # type: ignore[operator]
        self.refuse(folder, "body.fc2 has a merged adapter", model)

    def test_files_that_are_missing_or_broken(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "other")
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
            load_adapter(net(), folder)
        (folder / "adapter_config.json").write_text("{")
        self.refuse(folder, "adapter_config.json is not JSON")
        with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
            load_adapter(net(), folder / "none")
