"""save_pretrained and from_pretrained of quantized models: bit for bit, in the form that hqq
and others read."""

from __future__ import annotations

import copy
import filecmp
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

transformers = pytest.importorskip("transformers")

from tiny_models import (  # noqa: E402
    FAMILIES,
    assert_same_model,
    early_transformers,
    inputs_for,
    linear_names,
    quantized_names,
    quantized_tiny,
    saved,
    tiny_bert,
    tiny_llama,
    tiny_model,
    tiny_qwen2,
    tiny_t5,
)

from hqqlora import HQQLinear  # noqa: E402
from hqqlora.state_encoding import METADATA_KEYS  # noqa: E402
from hqqlora.transformers import HqqConfig  # noqa: E402

AutoCausal = transformers.AutoModelForCausalLM
MIXED = HqqConfig(
    dynamic_config={
        "self_attn.q_proj": {"nbits": 8, "group_size": 16},
        "self_attn.k_proj": {"nbits": 3, "axis": 0, "group_size": 16},
        "mlp.up_proj": {"nbits": 2, "group_size": 32},
        "mlp.down_proj": {"nbits": 1, "group_size": None},
    }
)


def stored_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config["quantization_config"]


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    return quantized_tiny(tmp_path, tiny_llama(), dtype=torch.bfloat16)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_bit_for_bit(
        self, tmp_path: Path, family: str, dtype: torch.dtype
    ) -> None:
        model = quantized_tiny(tmp_path, tiny_model(family), dtype=dtype)
        folder = saved(model, tmp_path / "saved")
        again = type(model).from_pretrained(folder)
        assert_same_model(again, model)
        with torch.no_grad():
            inputs = inputs_for(model)
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)

    @pytest.mark.parametrize(
        "config",
        [
            MIXED,
            HqqConfig(skip_modules=[]),
            HqqConfig(nbits=3, group_size=None, axis=0),
            HqqConfig(view_as_float=True),
            HqqConfig(nbits=3, group_size=32, view_as_float=True),
            HqqConfig(skip_modules=["layers.0", "lm_head"]),
        ],
        ids=["mixed", "with lm_head", "columns", "as floats", "3 bits as floats", "skip"],
    )
    def test_every_configuration(self, tmp_path: Path, config: HqqConfig) -> None:
        model = quantized_tiny(tmp_path, tiny_llama(mlp_bias=True), config)
        folder = saved(model, tmp_path / "saved")
        again = AutoCausal.from_pretrained(folder)
        assert_same_model(again, model)
        assert again.config.quantization_config.to_dict() == stored_config(folder)

    def test_saving_again_writes_the_same_files(self, tmp_path: Path) -> None:
        model = quantized_tiny(tmp_path, tiny_llama(attention_bias=True), MIXED)
        first = saved(model, tmp_path / "first")
        second = saved(AutoCausal.from_pretrained(first), tmp_path / "second")
        same, different, odd = filecmp.cmpfiles(
            first, second, [path.name for path in first.iterdir()], shallow=False
        )
        assert not different
        assert not odd
        assert {"config.json", "model.safetensors"} <= set(same)

    def test_in_shards(self, tmp_path: Path, llama: Any) -> None:
        folder = saved(llama, tmp_path / "saved", max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
        assert_same_model(AutoCausal.from_pretrained(folder), llama)

    def test_tied_embeddings_are_stored_once(self, tmp_path: Path) -> None:
        model = quantized_tiny(tmp_path, tiny_qwen2())
        folder = saved(model, tmp_path / "saved")
        assert "lm_head.weight" not in load_file(folder / "model.safetensors")
        again = AutoCausal.from_pretrained(folder)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert_same_model(again, model)

    def test_in_pytorchs_old_format(self, tmp_path: Path, llama: Any) -> None:
        folder = saved(llama, tmp_path / "saved")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        assert_same_model(AutoCausal.from_pretrained(folder), llama)

    def test_nothing_is_reported_about_a_good_checkpoint(
        self, tmp_path: Path, llama: Any
    ) -> None:
        folder = saved(llama, tmp_path / "saved")
        _, info = AutoCausal.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())

    @pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
    def test_with_a_device_map(self, tmp_path: Path, llama: Any, device_map: Any) -> None:
        pytest.importorskip("accelerate")
        if device_map == "auto" and torch.cuda.is_available():
            pytest.skip("auto means the GPU here")
        folder = saved(llama, tmp_path / "saved")
        assert_same_model(AutoCausal.from_pretrained(folder, device_map=device_map), llama)

    @pytest.mark.parametrize("nbits", [4, 3])
    def test_partly_on_disk(self, tmp_path: Path, nbits: int) -> None:
        pytest.importorskip("accelerate")
        llama = quantized_tiny(tmp_path, tiny_llama(), HqqConfig(nbits=nbits, group_size=32))
        folder = saved(llama, tmp_path / "saved")
        device_map = dict.fromkeys(
            ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu"
        )
        device_map |= {"model.layers.1": "disk", "lm_head": "disk"}
        options = {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}
        if early_transformers():
            with pytest.raises(ValueError, match="this version of transformers cannot offload"):
                AutoCausal.from_pretrained(folder, **options)
            return
        model = AutoCausal.from_pretrained(folder, **options)
        assert model.model.layers[1].mlp.up_proj.W_q.is_meta
        assert model.model.layers[0].mlp.up_proj.W_q.dtype == torch.uint8  # 3 bits: in planes
        inputs = inputs_for(llama)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, llama(**inputs).logits)
        again = saved(model, tmp_path / "again")
        assert_same_model(AutoCausal.from_pretrained(again), llama)

    def test_copies(self, llama: Any) -> None:
        assert_same_model(copy.deepcopy(llama), llama)
        assert_same_model(pickle.loads(pickle.dumps(llama)), llama)

    def test_after_training_an_adapter_the_base_is_what_it_was(
        self, tmp_path: Path, llama: Any
    ) -> None:
        peft = pytest.importorskip("peft")
        before = copy.deepcopy(llama)
        adapted = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))
        folder = saved(adapted.unload(), tmp_path / "saved")
        assert_same_model(AutoCausal.from_pretrained(folder), before)


class TestOtherHeads:
    def test_the_base_model_of_a_causal_one_and_the_way_back(
        self, tmp_path: Path, llama: Any
    ) -> None:
        folder = saved(llama, tmp_path / "saved")
        base = transformers.AutoModel.from_pretrained(folder)
        assert_same_model(base, llama.model)
        folder = saved(base, tmp_path / "base")
        again = AutoCausal.from_pretrained(folder)
        assert_same_model(again.model, llama.model)

    def test_a_new_classifier_on_a_quantized_model(self, tmp_path: Path, llama: Any) -> None:
        folder = saved(llama, tmp_path / "saved")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=3, pad_token_id=0
        )
        assert_same_model(model.model, llama.model)
        assert type(model.score) is nn.Linear
        assert model.score.weight.requires_grad
        again = type(model).from_pretrained(saved(model, tmp_path / "again"))
        assert_same_model(again, model)

    def test_a_classifier_that_came_with_the_checkpoint(self, tmp_path: Path) -> None:
        model = quantized_tiny(tmp_path, tiny_bert(), HqqConfig(group_size=32, skip_modules=[]))
        assert isinstance(model.classifier, HQQLinear)
        folder = saved(model, tmp_path / "saved")
        again = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert_same_model(again, model)
        base = transformers.AutoModel.from_pretrained(folder)
        assert_same_model(base, model.bert)


class TestAnotherDtype:
    def test_the_codes_and_scales_stay_and_the_computation_changes(
        self, tmp_path: Path, llama: Any
    ) -> None:
        folder = saved(llama, tmp_path / "saved")
        model = AutoCausal.from_pretrained(folder, dtype=torch.float32)
        layer, before = model.model.layers[0].mlp.up_proj, llama.model.layers[0].mlp.up_proj
        assert layer.compute_dtype == torch.float32
        assert layer.scale.dtype == torch.bfloat16
        assert torch.equal(layer.dequantize(), before.dequantize(torch.float32))
        assert model(**inputs_for(model)).logits.dtype == torch.float32

    def test_t5_in_float16_keeps_some_layers_in_float32(self, tmp_path: Path) -> None:
        model = quantized_tiny(tmp_path, tiny_t5(), dtype=torch.float32)
        folder = saved(model, tmp_path / "saved")
        half = type(model).from_pretrained(folder, dtype=torch.float16)
        feed_forward = half.encoder.block[0].layer[1].DenseReluDense
        assert feed_forward.wo.compute_dtype == torch.float32
        assert feed_forward.wi.compute_dtype == torch.float16
        with torch.no_grad():
            assert torch.isfinite(half(**inputs_for(half)).logits).all()


class TestWhatIsWritten:
    def test_hqqs_nineteen_keys_a_layer(self, tmp_path: Path) -> None:
        model = quantized_tiny(tmp_path, tiny_llama(mlp_bias=True), MIXED)
        folder = saved(model, tmp_path / "saved")
        state = load_file(folder / "model.safetensors")
        for name in quantized_names(model):
            prefix = f"{name}."
            keys = {key[len(prefix) :] for key in state if key.startswith(prefix)}
            expected = {"W_q", "scale", "zero", *METADATA_KEYS}
            assert keys == expected | ({"bias"} if "mlp" in name else set())
            assert len(expected) == 19
        others = {key for key in state if not key.startswith(tuple(quantized_names(model)))}
        assert all(key.endswith(".weight") or "mlp" in key for key in others)

    def test_config_json_has_what_hqq_and_vllm_read_and_no_more(
        self, tmp_path: Path, llama: Any
    ) -> None:
        stored = stored_config(saved(llama, tmp_path / "saved"))
        assert stored == {
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": {
                    "nbits": 4,
                    "channel_wise": True,
                    "group_size": 32,
                    "optimize": True,
                    "round_zero": True,
                    "axis": 1,
                    "view_as_float": False,
                },
                "scale_quant_params": None,
                "zero_quant_params": None,
                "offload_meta": False,
            },
            "skip_modules": ["lm_head"],
        }

    def test_what_push_to_hub_would_upload(
        self, tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        uploaded = tmp_path / "uploaded"

        def upload(
            self: Any, working_dir: Any, repo_id: str, *rest: Any, **options: Any
        ) -> None:
            import shutil

            shutil.copytree(working_dir, uploaded)

        class Hub:
            def create_repo(self, repo_id: str, **options: Any) -> Any:
                return type("Url", (), {"repo_id": repo_id})

        hub = transformers.utils.hub
        monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
        for module in (hub, transformers.modeling_utils):
            if hasattr(module, "hf_api"):
                monkeypatch.setattr(module, "hf_api", lambda *a, **k: Hub())
            if hasattr(module, "create_repo"):
                monkeypatch.setattr(module, "create_repo", Hub().create_repo)
        card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})
        for module in (hub, transformers.modeling_utils):
            monkeypatch.setattr(module, "create_and_tag_model_card", lambda *a, **k: card())
        llama.push_to_hub("someone/some-model")
        assert_same_model(AutoCausal.from_pretrained(uploaded), llama)

    @pytest.mark.parametrize("config", [MIXED, HqqConfig(view_as_float=True)])
    def test_hqq_reads_every_layer(self, tmp_path: Path, config: HqqConfig) -> None:
        hqq = pytest.importorskip("hqq.core.quantize")
        model = quantized_tiny(tmp_path, tiny_llama(), config, torch.float16)
        folder = saved(model, tmp_path / "saved")
        state = load_file(folder / "model.safetensors")
        for name in quantized_names(model):
            prefix = f"{name}."
            own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            theirs = hqq.HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")
            theirs.load_state_dict(own)
            ours = model.get_submodule(name)
            assert ours.compute_dtype == torch.float16
            # hqq subtracts and multiplies in float16, with a rounding after each.
            bound = 2**-10 * (2**ours.nbits) * ours.scale.abs().max()
            error = (theirs.dequantize() - ours.dequantize()).abs().max()
            assert error <= bound


class TestDequantize:
    @pytest.mark.parametrize("family", ["llama", "t5", "bert"])
    def test_the_model_is_dense_again(self, tmp_path: Path, family: str) -> None:
        model = quantized_tiny(tmp_path, tiny_model(family))
        dense = copy.deepcopy(model).dequantize()
        assert not quantized_names(dense)
        assert all(type(m) is nn.Linear for m in map(dense.get_submodule, linear_names(dense)))
        for name in quantized_names(model):
            assert torch.equal(
                dense.get_submodule(name).weight, model.get_submodule(name).dequantize()
            )
        assert not dense.is_quantized
        assert not hasattr(dense, "hqq_quantized")
        again = type(dense).from_pretrained(saved(dense, tmp_path / "saved"))
        assert_same_model(again, dense)

    def test_into_another_dtype_and_after_saving(self, tmp_path: Path, llama: Any) -> None:
        saved(llama, tmp_path / "saved")  # leaves a string for the dtype in the configuration
        dense = copy.deepcopy(llama).dequantize()
        assert dense.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
        dense = llama.dequantize(dtype=torch.float32)
        assert dense.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_the_files_are_not_read_into_memory(tmp_path: Path, llama: Any) -> None:
    """What decides about a layer is read; the tensors stay where they are."""
    from hqqlora.transformers.checkpoint_layers import contents_of

    folder = saved(llama, tmp_path / "saved")
    contents = contents_of([str(folder / "model.safetensors")])
    assert set(contents.layers) == set(quantized_names(llama))
    assert all(layer.W_q.is_meta and layer.scale.is_meta for layer in contents.layers.values())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert contents.other_keys < set(file.keys())
