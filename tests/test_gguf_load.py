"""A GGUF file is loaded as it is: its codes, and the logits of its dequantized form."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hqq_layers import assert_same_layer

from hqqlora import BaseQuantizeConfig, HQQLinear, add_lora, lora_parameters

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from gguf_files import (  # noqa: E402
    HIDDEN,
    byte_tokens,
    dense_model,
    tokens,
    write_model,
)
from gguf_models import load, quantized_layers  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "nbits", "group_size"),
    [
        ("Q4_0", 4, 32),
        ("Q4_1", 4, 32),
        ("Q5_1", 8, 32),
        ("Q8_0", 8, 32),
        ("Q2_K", 2, 16),
        ("Q3_K", 3, 16),
        ("Q4_K", 4, 32),
        ("Q6_K", 8, 16),
    ],
)
def test_weights_and_logits_are_those_of_the_dequantized_model(
    kind: str, nbits: int, group_size: int, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", kind)
    model, dense = load(path), dense_model(path)
    layers = quantized_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert (layer.nbits, layer.group_size, layer.axis) == (nbits, group_size, 1)
        assert layer.scale.dtype == torch.float32
        weight = dense.get_submodule(name).weight
        if kind in ("Q4_0", "Q8_0", "Q3_K", "Q6_K"):
            assert torch.equal(layer.dequantize(), weight)
        else:
            assert (layer.dequantize() - weight).abs().max() <= 2.0**-22 * weight.abs().max()
    others = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in layers}
    assert all(torch.equal(p, dense.get_parameter(name)) for name, p in others.items())
    with torch.no_grad():
        logits, reference = model(tokens()).logits, dense(tokens()).logits
    assert (logits - reference).abs().max() <= 1e-4 * reference.abs().max()


@pytest.mark.parametrize(
    ("architecture", "numbers"), [("qwen2", {}), ("qwen3", {"attention.key_length": 128})]
)
@pytest.mark.parametrize("tied", [True, False])
def test_other_architectures(
    architecture: str, numbers: dict[str, int], tied: bool, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", "Q4_0", architecture, tied, **numbers)
    model, dense = load(path), dense_model(path)
    assert model.config.model_type == architecture
    assert isinstance(model.lm_head, HQQLinear) is not tied
    with torch.no_grad():
        logits, reference = model(tokens()).logits, dense(tokens()).logits
    assert (logits - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_heads_of_another_width_are_read(tmp_path: Path) -> None:
    """transformers leaves this number of Qwen3's out."""
    path = write_model(tmp_path / "m.gguf", "Q4_0", "qwen3", **{"attention.key_length": 32})
    model = load(path)
    assert model.config.head_dim == 32
    assert model(tokens()).logits.isfinite().all()


def test_a_model_is_loaded_in_another_dtype(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "Q4_1", "qwen2")
    model = load(path, dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.compute_dtype == layer.bias.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(tokens()).logits.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        load(path, dtype=torch.float64)


def test_a_loaded_model_is_fine_tuned(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model.gguf", "Q4_K"))
    add_lora(model, r=4)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_loaded_model_is_saved_and_loaded_as_an_hqq_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(write_model(tmp_path / "model.gguf", "Q4_1", tied=False))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    layers, others = quantized_layers(model), quantized_layers(again)
    assert layers.keys() == others.keys()
    for name, layer in layers.items():
        assert_same_layer(layer, others[name])
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_peft_puts_adapters_on_a_loaded_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(write_model(tmp_path / "model.gguf", "Q8_0"))
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted(tokens(), labels=tokens()).loss.backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 28
    assert all("lora_" in name and p.grad.abs().sum() > 0 for name, p in trained.items())


def test_formats_that_hqq_cannot_hold_are_said(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "IQ4_NL")
    dense = dense_model(path)
    with pytest.warns(UserWarning, match="as they are become dense: 14 of type IQ4_NL"):
        model = load(path)
    assert not quantized_layers(model)
    assert torch.equal(model(tokens()).logits, dense(tokens()).logits)
    config = BaseQuantizeConfig(8, 64)
    with pytest.warns(UserWarning, match="quantized anew: 14 of type IQ4_NL"):
        model = load(path, quant_config=config)
    layers = quantized_layers(model)
    assert {(layer.nbits, layer.group_size) for layer in layers.values()} == {(8, 64)}
    for name, layer in layers.items():
        weight = dense.get_submodule(name).weight
        assert (layer.dequantize() - weight).abs().max() <= weight.abs().max() / 128


def test_layers_that_are_dense_in_the_file_stay_so(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "F16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(path, quant_config=BaseQuantizeConfig())
    assert not quantized_layers(model)
    assert torch.equal(model(tokens()).logits, dense_model(path)(tokens()).logits)


def test_the_tokenizer_s_ends_are_known_to_generate(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model.gguf"))
    assert model.generation_config.eos_token_id == byte_tokens().index("<end>")
    assert model.generate(tokens()[:1], max_new_tokens=3, do_sample=False).shape[1] <= 15


MEASURE = """
import os, sys
import gguf_files
from pathlib import Path
from hqqlora.gguf import load_gguf
from hqqlora.command.machine import peak_memory, restart_peak_memory

folder = Path(sys.argv[1])
load_gguf(gguf_files.write_model(folder / "small.gguf"), progress=False)  # imports
gguf_files.HIDDEN, gguf_files.INTERMEDIATE = 1024, 4096
path = gguf_files.write_model(folder / "large.gguf")
before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
assert restart_peak_memory()
model = load_gguf(path, progress=False)
print(peak_memory() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_dense_model_is_never_in_memory(tmp_path: Path) -> None:
    """The peak is the model, its file, which is mapped, and two of the largest layers."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr
    peak, quantized = map(int, done.stdout.split())
    largest = 4 * 1024 * 4096
    bound = 1.1 * (quantized + 2 * largest) + (tmp_path / "large.gguf").stat().st_size
    assert peak <= bound
    assert bound < 4 * 2 * (3 * 1024 * 1024 + 3 * 1024 * 4096)  # the dense layers, float32


# ---- positions ---------------------------------------------------------------------------


def test_linear_scaling_of_positions(tmp_path: Path) -> None:
    numbers = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path = write_model(tmp_path / "model.gguf", **numbers)
    plain = load(write_model(tmp_path / "plain.gguf"))
    model = load(path)
    ratio = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert torch.allclose(ratio, torch.full_like(ratio, 4.0))


def test_llama_3_s_scaling_of_positions(tmp_path: Path) -> None:
    """The file has factors; transformers computes them from four numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    numbers = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
    parameters = {"rope_theta": 500000.0, **numbers}
    config = LlamaConfig(**shape, intermediate_size=8, vocab_size=8, rope_parameters=parameters)
    frequencies = LlamaForCausalLM(config).model.rotary_emb.inv_freq
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = {"rope_freqs.weight": (plain / frequencies).numpy()}
    path = write_model(tmp_path / "m.gguf", extra=factors, **{"rope.freq_base": 500000.0})
    model = load(path)
    assert torch.allclose(model.model.rotary_emb.inv_freq, frequencies, rtol=1e-5)
    factors = {"rope_freqs.weight": np.linspace(1, 32, 32, dtype=np.float32)}
    path = write_model(tmp_path / "other.gguf", extra=factors)
    with pytest.raises(ValueError, match=r"rope_freqs.weight are not those of Llama 3"):
        load(path)


def test_other_scalings_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", **{"rope.scaling.type": "yarn"})
    with pytest.raises(ValueError, match="positions are scaled by 'yarn'; supported are none"):
        load(path)


# ---- bad files ---------------------------------------------------------------------------


class TestBadFiles:
    @pytest.fixture(scope="class")
    def good(self, tmp_path_factory: pytest.TempPathFactory) -> bytes:
        return write_model(tmp_path_factory.mktemp("good") / "model.gguf").read_bytes()

    @staticmethod
    def refuse(path: Path, content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "none.gguf")
        with pytest.raises(IsADirectoryError):
            load(tmp_path)

    def test_other_files(self, good: bytes, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        self.refuse(path, b"PK\3\4" + good[4:], "is not a GGUF file: it begins with b'PK")
        self.refuse(path, b"", "is not a GGUF file")
        self.refuse(path, good[:20], "truncated: 20 bytes are less than a header's 24")
        self.refuse(path, b"GGUF\0\0\0\3" + good[8:], "big-endian")
        self.refuse(path, b"GGUF\x09\0\0\0" + good[8:], "truncated or damaged.*version 9")

    def test_truncated_anywhere(self, good: bytes, tmp_path: Path) -> None:
        for size in range(24, len(good), len(good) // 23):
            self.refuse(tmp_path / "model.gguf", good[:size], "truncated|damaged")
        message = (
            r"truncated: tensor 'output_norm.weight' \(F32, \[256\]\) needs 1024 bytes at \d+; "
            r"the file has 1023 there"
        )
        self.refuse(tmp_path / "model.gguf", good[:-1], message)

    def test_counts_that_no_file_could_hold(self, good: bytes, tmp_path: Path) -> None:
        huge = struct.pack("<Q", 2**60)
        path = tmp_path / "model.gguf"
        self.refuse(path, good[:8] + huge + good[16:], f"damaged: {2**60} tensors do not fit")
        self.refuse(path, good[:16] + huge + good[24:], f"damaged: {2**60} values do not fit")

    def test_a_tensor_larger_than_the_file(self, good: bytes, tmp_path: Path) -> None:
        """Known before any memory is taken for it."""
        at = good.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4
        content = good[:at] + struct.pack("<QQ", 2**20, 2**30) + good[at + 16 :]
        message = (
            r"tensor 'blk.1.ffn_up.weight' \(Q4_1, \[1073741824, 1048576\]\) needs 7036874"
        )
        self.refuse(tmp_path / "model.gguf", content, message)
        content = good[:at] + struct.pack("<QQ", 2**40, 2**40) + good[at + 16 :]
        self.refuse(
            tmp_path / "model.gguf", content, "'blk.1.ffn_up.weight' has the impossible"
        )
        content = good[:at] + struct.pack("<Q", 250) + good[at + 8 :]
        message = "ffn_up.weight' has rows of 250 weights; Q4_1 needs a multiple of 32"
        self.refuse(tmp_path / "model.gguf", content, message)

    def test_another_shape_or_name(self, good: bytes, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        at = good.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4
        content = good[:at] + struct.pack("<QQ", HIDDEN, 256) + good[at + 16 :]
        message = (
            r"tensor 'blk.1.ffn_up.weight' is \[256, 256\], but "
            r"model.layers.1.mlp.up_proj.weight needs \[512, 256\]"
        )
        self.refuse(path, content, message)
        content = good.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
        message = "lacks the tensor 'blk.1.ffn_up.weight' for model.layers.1.mlp.up_proj"
        self.refuse(path, content, message)

    def test_a_tensor_too_many(self, tmp_path: Path) -> None:
        path = write_model(
            tmp_path / "m.gguf", extra={"blk.0.attn_q.bias": np.ones(256, np.float32)}
        )
        with pytest.raises(
            ValueError, match="holds 1 tensors that LlamaForCausalLM has no pla"
        ):
            load(path)

    def test_numbers_that_do_not_fit_the_tensors(self, tmp_path: Path) -> None:
        """What would be made of them is not made first."""
        path = tmp_path / "model.gguf"
        for numbers, message in (
            (
                {"block_count": 2**31},
                "says that it has 2147483648 layers, but holds tensors of 2",
            ),
            ({"block_count": 1}, "says that it has 1 layers, but holds tensors of 2"),
            ({"rope.dimension_count": 2**31}, "4 heads of 2147483648 for q, but tensor 'blk.0"),
            ({"attention.head_count": 0}, "cannot read the configuration: ZeroDivisionError"),
            ({"attention.head_count_kv": 4}, "4 heads of 64 for k, but .* has 128 rows"),
            ({"embedding_length": 512}, r"'token_embd.weight' is \[258, 256\], but the config"),
            ({"vocab_size": 2**31}, r"calls for \[2147483648, 256\]"),
            ({"feed_forward_length": 2**31}, r"'blk.0.ffn_up.weight' is \[512, 256\], but the"),
        ):
            write_model(path, **numbers)
            with pytest.raises(ValueError, match=message):
                load(path)

    def test_one_of_several_parts(self, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.count", 3)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match="is one of 3 parts: merge them"):
            load(path)

    def test_a_scale_that_is_no_number(self, good: bytes, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(good)
        (tensor,) = (
            t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight"
        )
        at = int(tensor.data_offset) + 3 * tensor.data.shape[1]
        content = good[:at] + np.float16("nan").tobytes() + good[at + 2 :]
        self.refuse(path, content, "'blk.0.ffn_up.weight' has a scale or an offset in row 3")

    def test_other_architectures(self, good: bytes, tmp_path: Path) -> None:
        path = tmp_path / "model.gguf"
        message = "is of architecture 'xlama'; supported are llama, qwen2, qwen3"
        self.refuse(path, good.replace(b"llama", b"xlama"), message)
        content = good.replace(
            struct.pack("<Q", 5) + b"model", struct.pack("<Q", 5) + b"imatr", 1
        )
        self.refuse(path, content, "holds a GGUF 'imatr', not a model")
