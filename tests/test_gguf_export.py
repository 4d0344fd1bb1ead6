"""A quantized model is written as GGUF with its own codes, and read by others."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqlora import add_lora
from hqqlora.gguf import export_gguf, load_gguf
from hqqlora.model import lora_layers

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gguf_files import (  # noqa: E402
    VOCABULARY,
    byte_tokenizer,
    byte_tokens,
    dense_model,
    file_tensors,
    tokens,
    write_model,
)
from gguf_models import (  # noqa: E402
    LLAMA3_ROPE,
    assert_near_q8,
    dense,
    load,
    quantized,
    quantized_layers,
)

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def assert_same_logits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.isfinite().all()
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def assert_rounded(model: Any, again: Any) -> None:
    """`again` is `model` with scale and scale * zero rounded to fp16, by 2^-11 of each (and
    fp16 ends at 2^-24), and in everything else the same."""
    layers, others = quantized_layers(model), quantized_layers(again)
    assert layers
    assert layers.keys() == others.keys()
    for name, layer in layers.items():
        metas = layer.scale.abs() * (2**layer.nbits - 1 + layer.zero.abs())
        bound = 1.01 * (2.0**-11 * metas + 8 * 2.0**-24)
        difference = layer.dequantize() - others[name].dequantize()
        assert (difference.reshape(-1, layer.group_size).abs() <= bound).all()
        assert difference.abs().max() > 0
    expected = deepcopy(model)
    for name, layer in others.items():
        expected.set_submodule(name, layer)
    assert_same_logits(logits(again), logits(expected))


# ---- there and back ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_what_was_loaded_is_written_byte_for_byte(
    kind: str, architecture: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", kind, architecture, tied=False)
    export_gguf(load(path), tmp_path / "again.gguf", dense_type="F32")
    before, after = file_tensors(path), file_tensors(tmp_path / "again.gguf")
    assert sum(type_ == kind for type_, _ in before.values()) == 15
    assert after == before


@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("nbits", [4, 2, 3])
def test_codes_survive_and_so_do_the_weights_up_to_fp16_metas(
    nbits: int, group_size: int | None, tokenizer: Any, tmp_path: Path
) -> None:
    model = quantized(nbits=nbits, group_size=group_size)
    export_gguf(model, tmp_path / "model.gguf", tokenizer, dense_type="F32")
    again = load(tmp_path / "model.gguf")
    assert {(la.nbits, la.group_size) for la in quantized_layers(again).values()} == {(4, 32)}
    assert_rounded(model, again)


def test_fp16_metas_lose_nothing_of_the_scale(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(dtype=torch.float16, nbits=4, group_size=64)
    export_gguf(model, tmp_path / "model.gguf", tokenizer)
    again = quantized_layers(load(tmp_path / "model.gguf"))
    for name, layer in quantized_layers(model).items():
        assert torch.equal(again[name].scale, layer.scale.float().repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": LINEAR_ROPE}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ],
)
def test_every_architecture_computes_the_same_after_the_way_back(
    model_type: str, config: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = quantized(dense(model_type, **config), nbits=4, group_size=32)
    export_gguf(model, tmp_path / "model.gguf", tokenizer, dense_type="F32")
    again = load(tmp_path / "model.gguf")
    assert_rounded(model, again)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert ("output.weight" in file_tensors(tmp_path / "model.gguf")) is not (
        model.config.tie_word_embeddings
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_transformers_reads_the_file(model_type: str, tokenizer: Any, tmp_path: Path) -> None:
    """An independent reader, with its own idea of the order of rows."""
    model = quantized(dense(model_type), nbits=4, group_size=32)
    export_gguf(model, tmp_path / "model.gguf", tokenizer, dense_type="F32")
    theirs, ours = dense_model(tmp_path / "model.gguf"), load(tmp_path / "model.gguf")
    assert_rounded(model, ours)
    assert_same_logits(logits(theirs), logits(ours))


# ---- 8 bits ------------------------------------------------------------------------------


def test_8_bit_layers_are_rounded_anew_and_that_is_said(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(nbits=8, group_size=64)
    with pytest.warns(
        UserWarning, match="14 layers were rounded anew to Q8_0, which has no ze"
    ):
        export_gguf(model, tmp_path / "model.gguf", tokenizer)
    again = quantized_layers(load(tmp_path / "model.gguf"))
    for name, layer in quantized_layers(model).items():
        assert_near_q8(layer, again[name])


# ---- dense tensors -----------------------------------------------------------------------


@pytest.mark.parametrize("dense_type", ["F32", "F16", "BF16", "Q8_0"])
def test_dense_tensors(dense_type: str, tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(nbits=4, group_size=32)
    export_gguf(model, tmp_path / "model.gguf", tokenizer, dense_type=dense_type)
    types = {name: type_ for name, (type_, _) in file_tensors(tmp_path / "model.gguf").items()}
    assert types["token_embd.weight"] == types["output.weight"] == dense_type
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    again = load(tmp_path / "model.gguf").model.embed_tokens.weight
    weight = model.model.embed_tokens.weight
    share = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.005}[dense_type]
    assert (again - weight).abs().max() <= share * weight.abs().max()


def test_bfloat16_parameters_stay_what_they_are(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(dense().to(torch.bfloat16), None, nbits=4, group_size=32)
    export_gguf(model, tmp_path / "model.gguf", tokenizer)
    again = load(tmp_path / "model.gguf", dtype=torch.bfloat16)
    assert file_tensors(tmp_path / "model.gguf")["token_embd.weight"][0] == "BF16"
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


# ---- adapters in the model ---------------------------------------------------------------


def test_an_adapter_that_is_not_merged_is_left_out_and_that_is_said(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = quantized(nbits=4, group_size=32)
    export_gguf(model, tmp_path / "base.gguf", tokenizer)
    add_lora(model, r=2, init_lora_weights=False)
    with pytest.warns(
        UserWarning, match="14 adapters, such as that of model.layers.0.self_att"
    ):
        export_gguf(model, tmp_path / "adapted.gguf", tokenizer)
    base = file_tensors(tmp_path / "base.gguf")
    assert file_tensors(tmp_path / "adapted.gguf") == base
    for _, layer in lora_layers(model):
        layer.merge()
    export_gguf(model, tmp_path / "merged.gguf", tokenizer, dense_type="F32")
    bases = {name: layer.base_layer for name, layer in lora_layers(model)}
    for name, layer in bases.items():
        model.set_submodule(name, layer)
    assert_rounded(model, load(tmp_path / "merged.gguf"))
    assert file_tensors(tmp_path / "merged.gguf").keys() == base.keys()


def test_peft_s_model_is_written_as_its_base(tokenizer: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = quantized(nbits=4, group_size=32)
    export_gguf(model, tmp_path / "base.gguf", tokenizer)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with pytest.warns(UserWarning, match="14 adapters, such as that of model.layers.0"):
        export_gguf(adapted, tmp_path / "adapted.gguf", tokenizer)
    assert file_tensors(tmp_path / "adapted.gguf") == file_tensors(tmp_path / "base.gguf")


# ---- tokenizer and values ----------------------------------------------------------------


def test_the_tokenizer_comes_from_the_file_the_model_came_from(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    export_gguf(load(path), tmp_path / "again.gguf")
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "again.gguf")
    keys = [key for key in before.fields if key.startswith("tokenizer.")]
    assert len(keys) == 7
    for key in keys:
        assert after.fields[key].contents() == before.fields[key].contents()
        assert after.fields[key].types == before.fields[key].types
    for key in (key for key in before.fields if key.startswith("llama.")):
        assert after.fields[key].contents() == before.fields[key].contents()


def test_a_fast_tokenizer_is_converted(tokenizer: Any, tmp_path: Path) -> None:
    export_gguf(quantized(nbits=4, group_size=32), tmp_path / "model.gguf", tokenizer)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == byte_tokens()
    assert fields["tokenizer.ggml.token_type"].contents() == [3] + [1] * 257
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert again("Is it abc?")["input_ids"] == tokenizer("Is it abc?")["input_ids"]


def test_unused_rows_of_the_embedding_get_tokens(tokenizer: Any, tmp_path: Path) -> None:
    model = quantized(dense(vocab_size=VOCABULARY + 7), nbits=4, group_size=32)
    export_gguf(model, tmp_path / "model.gguf", tokenizer)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[VOCABULARY:][0] == "[PAD258]"
    assert fields["tokenizer.ggml.token_type"].contents()[VOCABULARY:] == [5] * 7


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}"
         "\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", "llama-bpe"),
        ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}"
         "\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", "qwen2"),
        ("digits", "smollm"),
        ("\\w+", None),
    ],
)  # fmt: skip
def test_how_text_is_cut_into_words(
    splitter: str, name: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    from tokenizers import Regex, pre_tokenizers

    other = deepcopy(tokenizer)
    split: Any = pre_tokenizers.Digits(individual_digits=True)
    if splitter != "digits":
        split = pre_tokenizers.Split(Regex(splitter), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter == "digits")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    model = quantized(nbits=4, group_size=32)
    if name is None:
        with pytest.raises(ValueError, match="cuts text into words in a way that has no name"):
            export_gguf(model, tmp_path / "model.gguf", other)
        return
    export_gguf(model, tmp_path / "model.gguf", other)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == name


def test_load_gguf_reads_what_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    model = load_gguf(str(path), progress=False)
    assert model.gguf_path == str(path)
