"""`hqqlora quantize` of a checkpoint of 4 GB by a process that may allocate 1 GB: the peak is
three times the largest tensor and 300 MB."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantize_command import stored_config
from safetensors import safe_open

transformers = pytest.importorskip("transformers")

from hqqlora.quantize_command.safetensors_file import FileLayout, TensorShape  # noqa: E402
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama layers of 7B's shapes, in four files of 1 GB; one random block again and again."""
    base = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(base).free < 8000 * MB:
        pytest.skip(f"needs 8 GB on the disk of {base}")
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    shapes = {name: TensorShape.of(p) for name, p in skeleton.state_dict().items()}
    block = block_of_weights().view(torch.uint8).numpy().tobytes()
    places: dict[str, str] = {}
    for number in range(4):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        part = {
            name: shape for i, (name, shape) in enumerate(shapes.items()) if i % 4 == number
        }
        layout = FileLayout(part)
        with (base / file).open("wb") as opened:
            opened.write(layout.beginning)
            for name in layout.offsets:
                left = part[name].nbytes
                while left:
                    left -= opened.write(block[: min(left, len(block))])
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


def block_of_weights() -> torch.Tensor:
    """1024 rows of 4096: every weight below begins with them, or with a part."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1024, 4096, generator=generator) * 0.02).to(torch.bfloat16)


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def test_four_gigabytes_under_a_limit_of_one(checkpoint: Path, tmp_path: Path) -> None:
    """Min/max, for time; the other solvers keep no more. The limit is the system's on what a
    process allocates, and the process that plans has it, too."""
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert size >= 4000 * MB
    options = ["--solver", "minmax", "--max-shard-size", "500MB"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "quantize", checkpoint, tmp_path / "q", *options],
        capture_output=True,
        text=True,
        preexec_fn=limited,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr
    peak = int(re.search(r"peak kB (\d+)", done.stdout)[1]) * 1024  # type: ignore[index]
    print(f"peak {peak / MB:.0f} MB, largest tensor {LARGEST / MB:.0f} MB; {done.stdout}")
    assert peak > 2 * LARGEST  # it has been measured at all
    assert peak <= 3 * LARGEST + 300 * MB
    check_layer(tmp_path / "q", "model.layers.7.self_attn.q_proj")
    shutil.rmtree(tmp_path / "q")


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
