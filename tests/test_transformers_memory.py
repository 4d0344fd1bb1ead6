"""The dense model is never whole in memory while it is quantized: measured, in a process of
its own, on a model that is large beside what else the process holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

# 9 layers of 16.8 M weights: 302 MB in bfloat16. The largest weight has 8.4 MB.
DENSE = 9 * (4 * 1024 + 3 * 4096) * 1024 * 2
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}

# What the process allocates, not what it maps of a file: the kernel's RssAnon, looked at every
# millisecond.
SCRIPT = """
import json, re, sys, threading, time
import torch, transformers
from hqqlora.transformers import HqqConfig

def anonymous():
    status = open("/proc/self/status").read()
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

folder, options = sys.argv[1], json.loads(sys.argv[2])
transformers.utils.logging.disable_progress_bar()
small = transformers.LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=1)
transformers.LlamaForCausalLM(small)(torch.zeros(1, 1, dtype=torch.long))  # what loads late
arguments = {}
save = options.pop("save", None)
if options:
    arguments["quantization_config"] = HqqConfig(**options)
    arguments["dtype"] = torch.float16  # makes of each weight a copy, which could stay
before = peak = anonymous()
done = False
watcher = threading.Thread(target=watch)
watcher.start()
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)
done = True
watcher.join()
if save:
    model.save_pretrained(save)
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"peak": peak - before, "size": size}))
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(config).state_dict()
    torch.manual_seed(0)
    state = {k: torch.randn(p.shape, dtype=torch.bfloat16) * 0.02 for k, p in skeleton.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, **options: Any) -> dict[str, int]:
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    measured: dict[str, int] = json.loads(finished.stdout.splitlines()[-1])
    return measured


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_peaks_at_the_quantized_model_and_two_layers(
    large_model: Path, tmp_path: Path
) -> None:
    largest = 4096 * 1024 * 2
    measured = load(large_model, nbits=4, group_size=64, save=str(tmp_path / "saved"))
    assert DENSE * (4.5 / 16) <= measured["size"] <= DENSE * (4.5 / 16) + 4e6
    assert measured["peak"] >= measured["size"]  # the watch was awake
    assert measured["peak"] <= 1.1 * measured["size"] + 2 * largest
    # Loaded again, the tensors stay in the file, for the system to map.
    again = load(tmp_path / "saved")
    assert again["size"] == measured["size"]
    assert again["peak"] <= 0.2 * measured["size"]
