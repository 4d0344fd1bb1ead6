"""What cannot be written as GGUF is refused by name, and leaves the file that was there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hqqlora.gguf import export_gguf

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gguf_files import byte_tokenizer, write_model  # noqa: E402
from gguf_models import (  # noqa: E402
    assert_near_q8,
    dense,
    load,
    quantized,
    quantized_layers,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


class TestRefused:
    @staticmethod
    def refuse(
        model: Any, tokenizer: Any, folder: Path, message: str, **arguments: Any
    ) -> None:
        path = folder / "model.gguf"
        path.write_bytes(b"what was there")
        with pytest.raises(ValueError, match=message):
            export_gguf(model, path, tokenizer, **arguments)
        assert path.read_bytes() == b"what was there"
        assert [file.name for file in folder.iterdir()] == ["model.gguf"]

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"axis": 0}, "axis=0"),
            ({"group_size": 16}, "group_size=16"),
            ({"nbits": 2, "group_size": 8}, "group_size=8"),
        ],
    )
    def test_groups_that_are_no_blocks(
        self, config: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path
    ) -> None:
        model = quantized(**config)
        message = (
            f"model.layers.0.self_attn.q_proj: {message}, but GGUF's blocks are 32 weights"
        )
        self.refuse(model, tokenizer, tmp_path, message)
        with pytest.warns(UserWarning, match="14 layers were rounded anew to Q8_0"):
            export_gguf(model, tmp_path / "model.gguf", tokenizer, requantize=True)
        again = quantized_layers(load(tmp_path / "model.gguf"))
        for name, layer in quantized_layers(model).items():
            assert_near_q8(layer, again[name])

    def test_rows_that_are_no_blocks(self, tokenizer: Any, tmp_path: Path) -> None:
        model = quantized(dense(hidden_size=48, head_dim=16), nbits=4, group_size=32)
        message = "q_proj: in_features=48 is not a multiple of 32"
        self.refuse(model, tokenizer, tmp_path, message)

    def test_numbers_beyond_fp16(self, tokenizer: Any, tmp_path: Path) -> None:
        model = quantized(nbits=4, group_size=32)
        layer = model.model.layers[1].mlp.up_proj
        layer.scale.data[5] = 1e5
        message = "layers.1.mlp.up_proj: scale of group 5 is 100000, which the fp16 of a GGUF"
        self.refuse(model, tokenizer, tmp_path, message)
        layer.scale.data[5], layer.zero.data[5] = 6e4, 2.0
        message = r"up_proj: scale \* zero of group 5 is 120000"
        self.refuse(model, tokenizer, tmp_path, message)
        layer.zero.data[5] = 0.0
        model.model.embed_tokens.weight.data[3, 3] = 7e4
        self.refuse(model, tokenizer, tmp_path, "embed_tokens.weight: 70000 is more than F16")

    def test_other_models_and_settings(self, tokenizer: Any, tmp_path: Path) -> None:
        config = transformers.GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        self.refuse(model, tokenizer, tmp_path, "a 'gpt2' model cannot be stored as GGUF")
        rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
        model = dense(rope_parameters=rope)
        self.refuse(model, tokenizer, tmp_path, "rope_type='yarn' cannot be stored as GGUF")
        message = "dense_type='Q4_1' is not one of F32, F16, BF16, Q8_0"
        self.refuse(dense(), tokenizer, tmp_path, message, dense_type="Q4_1")

    def test_tokenizers(self, tokenizer: Any, tmp_path: Path) -> None:
        model = quantized(nbits=4, group_size=32)
        self.refuse(model, None, tmp_path, "a tokenizer is needed for a model that load_gguf")
        self.refuse(model, object(), tmp_path, "a object cannot be stored as GGUF: give a fast")
        small = quantized(dense(vocab_size=100), nbits=4, group_size=32)
        self.refuse(small, tokenizer, tmp_path, "has a token 257, the model only 100 tokens")

    def test_a_tokenizer_file_of_another_model(
        self, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = write_model(tmp_path_factory.mktemp("other") / "other.gguf")
        model = quantized(dense(vocab_size=100), nbits=4, group_size=32)
        self.refuse(model, path, tmp_path, "other.gguf has 258 tokens, the model 100")

    def test_a_sentencepiece_tokenizer(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer, models

        bytes_ = {f"<0x{i:02X}>": i for i in range(256)}
        backend = Tokenizer(models.BPE(bytes_, merges=[], byte_fallback=True))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
        model = quantized(nbits=4, group_size=32)
        self.refuse(model, fast, tmp_path, "this one's model is BPE with byte fallback")

    def test_a_folder_that_is_not_there(self, tokenizer: Any, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"nowhere/model\.gguf"):
            export_gguf(dense(), tmp_path / "nowhere" / "model.gguf", tokenizer)


def test_a_failure_half_way_leaves_the_old_file(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what was there")
    written = gguf.GGUFWriter.write_tensor_data

    def fail(self: Any, tensor: np.ndarray) -> None:
        written(self, tensor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match=r"cannot write: No space left on device: .*/model\.gguf"):
        export_gguf(quantized(nbits=4, group_size=32), path, tokenizer)
    assert path.read_bytes() == b"what was there"
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
