"""A qmodel.pt or config.json that cannot be: one error that names what is wrong."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
hqq = pytest.importorskip("hqq.core.quantize")

from hqq_models import (  # noqa: E402 (it needs all of these)
    by_hqq,
    change,
    dense_llama,
    loaded,
)


class TestBadFiles:
    @pytest.fixture(scope="class")
    def good(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("good")
        by_hqq(folder)
        return folder

    @pytest.fixture
    def folder(self, good: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(good, tmp_path / "checkpoint"))

    def test_code_in_a_file_is_not_run(self, folder: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(folder / "attacked"),)

        torch.save({"lm_head": {"weight": Attack()}}, folder / "qmodel.pt")
        with pytest.raises(ValueError, match=r"qmodel.pt is damaged, or holds other things"):
            loaded(folder)
        assert not (folder / "attacked").exists()

    @pytest.mark.parametrize("text", ["open('attacked', 'w')", "torch.int4", "uint8"])
    def test_a_dtype_is_looked_up_not_evaluated(self, folder: Path, text: str) -> None:
        name = "model.layers.0.mlp.up_proj"
        change(folder, lambda states: states[name].update(unpack_view_dtype=text))
        with pytest.raises(
            ValueError, match=rf"{name}: layer: unpack_view_dtype .* is not one"
        ):
            loaded(folder)

    @pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
    def test_a_truncated_file(self, folder: Path, keep: float) -> None:
        data = (folder / "qmodel.pt").read_bytes()
        length = keep if keep > 1 else math.floor(keep * len(data))
        (folder / "qmodel.pt").write_bytes(data[: int(length)])
        with pytest.raises(ValueError, match=r"qmodel\.pt is damaged"):
            loaded(folder)

    @pytest.mark.parametrize(
        "states",
        [
            *([1, 2], {}, {"lm_head": torch.ones(1)}, {3: {"weight": torch.ones(1)}}),
            {"lm_head": {"weight": torch.ones(1), (1,): 2}},
        ],
    )
    def test_something_else_in_a_file(self, folder: Path, states: object) -> None:
        torch.save(states, folder / "qmodel.pt")
        with pytest.raises(ValueError, match=r"qmodel.pt is not a checkpoint of hqq"):
            loaded(folder)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("nbits", 7, r"nbits=7 is not supported"),
            ("nbits", 2, r"packing '4bit_u8' does not fit nbits=2"),
            ("group_size", 48, r"group_size=48 does not divide"),
            ("axis", 2, r"axis=2 must be"),
            (
                "shape",
                torch.Size((128, 256)),
                r"\[128, 256\] with.* the model has \[256, 128\]",
            ),
            ("W_q", torch.zeros(5, 32, dtype=torch.uint8), r"W_q is torch.uint8 \[5, 32\]"),
            ("scale", torch.ones(3, 1), r"scale is torch.float32 \[3, 1\]"),
            ("bias", torch.ones(256), r"\[256, 128\] with a bias.* has \[256, 128\] without"),
            ("extra", 1, r'Unexpected key\(s\) in state_dict: "extra"'),
        ],
    )
    def test_a_layer_that_does_not_fit(
        self, folder: Path, key: str, value: object, message: str
    ) -> None:
        name = "model.layers.0.mlp.up_proj"
        change(folder, lambda states: states[name].update({key: value}))
        with pytest.raises(ValueError, match=rf"(?s)qmodel.pt: {name}.*{message}"):
            loaded(folder)

    @pytest.mark.parametrize("key", ["W_q", "scale", "zero", "nbits", "shape"])
    def test_a_layer_that_lacks_something(self, folder: Path, key: str) -> None:
        name = "model.layers.0.mlp.up_proj"
        change(folder, lambda states: states[name].pop(key))
        with pytest.raises(ValueError, match=rf"qmodel.pt.*{name}"):
            loaded(folder)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda s: s.pop("model.norm"), r"lacks model\.norm\.weight"),
            (
                lambda s: s.pop("model.layers.0.self_attn.q_proj"),
                r"lacks model\.layers\.0\.self_attn\.q_proj\.weight",
            ),
            (
                lambda s: s.update({"model.layers.7.mlp.up_proj": s.popitem()[1]}),
                r"LlamaForCausalLM has no model\.layers\.7\.mlp\.up_proj\.weight",
            ),
            (
                lambda s: s.update({"up": s["model.layers.0.mlp.up_proj"]}),
                r"up is a quantized layer, but no module in the model",
            ),
            (
                lambda s: s.update({"model.norm": s["model.layers.0.mlp.up_proj"]}),
                r"model\.norm is a quantized layer, but a LlamaRMSNorm in the model",
            ),
            (
                lambda s: s.update({"model.norm": {"weight": torch.ones(4)}}),
                r"model\.norm\.weight is \[4\], but the model has \[128\]",
            ),
            (
                lambda s: s.update({"model.norm": {"weight": "ones"}}),
                r"model\.norm\.weight is str, but the model has \[128\]",
            ),
        ],
    )
    def test_a_model_that_does_not_fit(
        self, folder: Path, edit: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        change(folder, edit)
        with pytest.raises(ValueError, match=message):
            loaded(folder)

    def test_tied_weights_that_differ(self, tmp_path: Path) -> None:
        by_hqq(tmp_path, model=dense_llama(tie_word_embeddings=True))
        change(tmp_path, lambda s: s["lm_head"].update(weight=torch.ones(64, 128)))
        with pytest.raises(ValueError, match=r"lm_head.weight.*differ, but config.json ties"):
            loaded(tmp_path)

    @pytest.mark.parametrize(
        "architectures", [[], None, ["NoSuchModel"], ["pipeline"], ["A", "B"]]
    )
    def test_a_class_that_transformers_does_not_have(
        self, folder: Path, architectures: object
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = architectures
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="is not one model class that"):
            loaded(folder)

    @pytest.mark.parametrize("name", ["qmodel.pt", "config.json"])
    def test_a_file_that_is_not_there(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            loaded(folder)

    def test_a_model_that_neither_the_disk_nor_the_hub_has(self) -> None:
        with pytest.raises(OSError, match="no-such-user/no-such-model"):
            loaded(Path("no-such-user/no-such-model"), local_files_only=True)

    def test_hqqs_adapter_files_are_refused(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"adapter='lora.pt' is not supported"):
            loaded(folder, adapter="lora.pt")
