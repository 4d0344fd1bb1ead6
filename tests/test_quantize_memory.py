"""`hqqlora quantize` of a checkpoint of 4 GB by a process that may allocate 1 GB: the peak is
three times the largest tensor and 300 MB. Of experts, three times one expert's matrix."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_command import stored_config
from safetensors import safe_open

transformers = pytest.importorskip("transformers")

from hqqlora.command.safetensors_file import FileLayout, TensorShape  # noqa: E402
from hqqlora.quantizing import quantize_weight  # noqa: E402

MB = 10**6
LIMIT = 1000 * MB
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 10,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "dtype": "bfloat16",
}
LARGEST = 4096 * 11008 * 2  # bytes of mlp.up_proj, in bfloat16

# What a user types, and what the process says of itself in the end. The system counts RssFile,
# pages of program files that it can drop, into VmHWM: so the bound holds with these.
SCRIPT = """
import re, sys
from hqqlora.cli import main
code = main(sys.argv[1:])
assert "transformers" not in sys.modules
status = open("/proc/self/status").read()
print("peak kB", re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
sys.exit(code)
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)


def write_checkpoint(base: Path, model_class: Any, config: Any, count: int) -> Path:
    """A folder of `count` files. Each tensor begins with one random block; the rest are holes,
    for the sake of the disk: what is read of them takes memory as anything else does."""
    config.architectures = [model_class.__name__]
    config.save_pretrained(base)
    with torch.device("meta"):
        skeleton = model_class(config).to(torch.bfloat16)
    shapes = {name: TensorShape.of(p) for name, p in skeleton.state_dict().items()}
    block = block_of_weights().view(torch.uint8).numpy().tobytes()
    places: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {n: shape for i, (n, shape) in enumerate(shapes.items()) if i % count == number}
        layout = FileLayout(part)
        with (base / file).open("wb") as opened:
            opened.write(layout.beginning)
            for name, offset in layout.offsets.items():
                opened.seek(offset)
                opened.write(block[: part[name].nbytes])
            opened.truncate(layout.size)
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Llama layers of 7B's shapes, in four files of 1 GB."""
    if shutil.disk_usage(tmp_path).free < 3000 * MB:
        pytest.skip(f"needs 3 GB on the disk of {tmp_path}")
    (tmp_path / "dense").mkdir()
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
    return write_checkpoint(tmp_path / "dense", transformers.LlamaForCausalLM, config, 4)


def block_of_weights() -> torch.Tensor:
    """1024 rows of 4096: every weight below begins with them, or with a part."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1024, 4096, generator=generator) * 0.02).to(torch.bfloat16)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def peak_of(checkpoint: Path, destination: Path, *options: str) -> int:
    """Of the command, in bytes. Min/max, for time; the other solvers keep no more. The limit is
    the system's on what a process allocates, and the process that plans has it, too."""
    arguments = ["quantize", checkpoint, destination, "--solver", "minmax", *options]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=limited,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return int(re.search(r"peak kB (\d+)", done.stdout)[1]) * 1024  # type: ignore[index]


def test_four_gigabytes_under_a_limit_of_one(checkpoint: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert size >= 4000 * MB
    peak = peak_of(checkpoint, tmp_path / "q", "--max-shard-size", "500MB")
    print(f"peak {peak / MB:.0f} MB, largest tensor {LARGEST / MB:.0f} MB")
    assert peak > 2 * LARGEST  # it has been measured at all
    assert peak <= 3 * LARGEST + 300 * MB
    check_layer(tmp_path / "q", "model.layers.7.self_attn.q_proj")
    shutil.rmtree(tmp_path)


def test_of_experts_in_one_tensor_one_experts_matrix_is_held(tmp_path: Path) -> None:
    """Not the tensor, of 268 MB, nor its codes."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=2048,
        moe_intermediate_size=1024,
        num_experts=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    (tmp_path / "dense").mkdir()
    model_class = transformers.Qwen3MoeForCausalLM
    dense = write_checkpoint(tmp_path / "dense", model_class, config, 1)
    peak = peak_of(dense, tmp_path / "q")
    matrix = 2048 * 2048 * 2
    print(f"peak {peak / MB:.0f} MB, matrix {matrix / MB:.0f} MB")
    assert peak <= 3 * matrix + 300 * MB
    shutil.rmtree(tmp_path)


def check_layer(folder: Path, layer: str) -> None:
    """The first 1024 rows are those of the block, quantized."""
    from hqqlora.config import QuantSettings

    assert stored_config(folder)["quantization_config"]["quant_method"] == "hqq"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[f"{layer}.scale"], framework="pt") as opened:
        scale = opened.get_tensor(f"{layer}.scale")
        zero = opened.get_tensor(f"{layer}.zero")
    config = {"nbits": 4, "group_size": 64, "axis": 1, "solver": "minmax"}
    _, expected_scale, expected_zero = quantize_weight(
        block_of_weights(), QuantSettings.parse(config), torch.bfloat16
    )
    groups = expected_scale.numel()
    assert torch.equal(scale.flatten()[:groups], expected_scale.flatten())
    assert torch.equal(zero.flatten()[:groups], expected_zero.flatten())
