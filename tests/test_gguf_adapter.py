"""A LoRA adapter is written as GGUF: llama.cpp's alpha, its names, and its order of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hqqlora import add_lora, save_adapter
from hqqlora.gguf import export_gguf_adapter

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
from gguf_models import dense, quantized, trained  # noqa: E402

HEADS, KV_HEADS = 4, 2


def adapted(model_type: str = "llama", **options: Any) -> Any:
    model = quantized(dense(model_type), nbits=4, group_size=32)
    return trained(add_lora(model, **options))


def read(path: Path) -> tuple[float, dict[str, Tensor]]:
    """alpha, and the tensors."""
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    tensors = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    return values["adapter.lora.alpha"], tensors


def updates(path: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each weight: alpha / r * B A."""
    alpha, tensors = read(path)
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    assert len(tensors) == 2 * len(names)
    return {
        name: alpha / tensors[f"{name}.lora_a"].size(0)
        * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        for name in names
    }  # fmt: skip


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Row by row: pair i of a head is rows i and i + half of it."""
    half = rows.size(0) // heads // 2
    order = []
    for head in range(heads):
        for i in range(half):
            first = head * 2 * half + i
            order += [first, first + half]
    return rows[order]


PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def check_updates(path: Path, model: Any, model_type: str = "llama", count: int = 14) -> None:
    """The file's updates are those of the model's adapters, in the file's order."""
    found = updates(path)
    assert len(found) == count
    for i in range(2):
        for place, role in PLACES.items():
            name = f"blk.{i}.{role}.weight"
            if name not in found:
                continue
            expected = model.get_submodule(f"model.layers.{i}.{place}").delta_weight()
            if model_type == "llama" and role in ("attn_q", "attn_k"):
                expected = interleaved(expected, HEADS if role == "attn_q" else KV_HEADS)
            difference = (found[name] - expected).abs().max()
            assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("options", "alpha"),
    [
        ({"r": 4, "lora_alpha": 8}, 8.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 16.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 3, "up_proj": 0}}, 8.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.1.mlp.up_proj": 2}}, 8.0),
        ({"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}}, 32.0),
    ],
)
def test_updates_are_the_adapters(
    options: dict[str, Any], alpha: float, model_type: str, tmp_path: Path
) -> None:
    model = adapted(model_type, **options)
    export_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert read(tmp_path / "adapter.gguf")[0] == alpha
    check_updates(tmp_path / "adapter.gguf", model, model_type)


def test_factors_of_the_common_scaling_are_kept_bit_for_bit(tmp_path: Path) -> None:
    model = adapted(r=4, lora_alpha=8, target_modules=["v_proj"])
    export_gguf_adapter(model, tmp_path / "adapter.gguf")
    _, tensors = read(tmp_path / "adapter.gguf")
    assert len(tensors) == 4
    layer = model.model.layers[1].self_attn.v_proj
    assert torch.equal(tensors["blk.1.attn_v.weight.lora_a"], layer.lora_A)
    assert torch.equal(tensors["blk.1.attn_v.weight.lora_b"], layer.lora_B)


@pytest.mark.parametrize(("kind", "share"), [("F16", 2.0**-10), ("BF16", 2.0**-7)])
def test_smaller_factors(kind: str, share: float, tmp_path: Path) -> None:
    model = adapted(r=4, target_modules=["v_proj"])
    export_gguf_adapter(model, tmp_path / "adapter.gguf", type=kind)
    types = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert types == {kind}
    layer = model.model.layers[0].self_attn.v_proj
    magnitude = layer.scaling * layer.lora_B.abs() @ layer.lora_A.abs()
    found = updates(tmp_path / "adapter.gguf")["blk.0.attn_v.weight"]
    assert ((found - layer.delta_weight()).abs() <= share * magnitude).all()


def test_a_saved_adapter(tmp_path: Path) -> None:
    model = adapted(r=4, lora_alpha=8)
    save_adapter(model, tmp_path / "adapter")
    for base in (dense(), dense().config, model.config):
        export_gguf_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf", base)
        check_updates(tmp_path / "adapter.gguf", model)


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_peft_s_adapters(adapter_name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(dense(), config, adapter_name=adapter_name)
    export_gguf_adapter(model, tmp_path / "adapter.gguf")
    _, tensors = read(tmp_path / "adapter.gguf")
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_a"], A)
    assert torch.equal(tensors["blk.1.ffn_up.weight.lora_b"], B)
    q = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B[adapter_name].weight
    assert torch.equal(tensors["blk.0.attn_q.weight.lora_b"], interleaved(q, HEADS))
    model.save_pretrained(tmp_path / "peft")
    folder = tmp_path / "peft"
    if adapter_name != "default":
        folder = folder / adapter_name
    export_gguf_adapter(folder, tmp_path / "again.gguf", dense())
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "adapter.gguf").read_bytes()


class TestRefused:
    @staticmethod
    def refuse(adapter: Any, folder: Path, message: str, *arguments: Any, **more: Any) -> None:
        path = folder / "adapter.gguf"
        with pytest.raises(ValueError, match=message):
            export_gguf_adapter(adapter, path, *arguments, **more)
        assert not path.exists()

    def test_what_is_no_plain_lora(self, tmp_path: Path) -> None:
        self.refuse(dense(), tmp_path, "the model has no adapter")
        model = adapted(r=2, lora_bias=True)
        self.refuse(model, tmp_path, "layers.0.mlp.down_proj has a lora_bias, which a GGUF")
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
        self.refuse(peft.get_peft_model(dense(), config), tmp_path, "DoRA is not supported")

    def test_a_base_that_does_not_fit(self, tmp_path: Path) -> None:
        folder = tmp_path / "saved"
        save_adapter(adapted(r=2), folder)
        self.refuse(folder, tmp_path, "base is needed to export an adapter from a folder")
        message = (
            r"layers.0.mlp.down_proj: lora_B and lora_A are \[64, 2\] and \[2, 128\], but the "
            r"layer is \[64, 96\]"
        )
        self.refuse(folder, tmp_path, message, dense(intermediate_size=96))
        message = "the base has no module 'model.layers.1"
        self.refuse(folder, tmp_path, message, dense(num_hidden_layers=1))

    def test_other_arguments(self, tmp_path: Path) -> None:
        self.refuse(
            adapted(r=2), tmp_path, "type='Q8_0' is not one of F32, F16, BF16", type="Q8_0"
        )
        with pytest.raises(FileNotFoundError, match="adapter_config"):
            export_gguf_adapter(tmp_path / "none", tmp_path / "adapter.gguf", dense())
