"""Scripts as transformers 4 and PEFT documented them for HQQ: they run with only the line
changed that imports HqqConfig."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hqqlora import HQQLinear

pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # for device_map

STOCK_IMPORT = re.compile(r"^from transformers import (.*), HqqConfig$", re.MULTILINE)

# What version 4's pages told a user to write: one configuration for all layers, also with
# arguments that later went; one for each tag; float16 or bfloat16, under both names of the
# argument. The model and the device are this test's.
SCRIPTS = {
    "all layers": """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HqqConfig

quant_config = HqqConfig(nbits=8, group_size=64)
model = AutoModelForCausalLM.from_pretrained(
    MODEL, dtype=torch.float16, device_map=DEVICE, quantization_config=quant_config
)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
EXPECTED = {"self_attn": (8, 64), "mlp": (8, 64)}
""",
    "early arguments": """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HqqConfig

quant_config = HqqConfig(nbits=4, group_size=64, quant_zero=False, quant_scale=False, axis=0)
model = AutoModelForCausalLM.from_pretrained(
    MODEL, torch_dtype=torch.bfloat16, device_map=DEVICE, quantization_config=quant_config
)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
EXPECTED = {"self_attn": (4, 64), "mlp": (4, 64)}
""",
    "specific layers": """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HqqConfig

q4_config = {"nbits": 4, "group_size": 64}
q3_config = {"nbits": 3, "group_size": 32}
quant_config = HqqConfig(dynamic_config={
    "self_attn.q_proj": q4_config,
    "self_attn.k_proj": q4_config,
    "self_attn.v_proj": q4_config,
    "self_attn.o_proj": q4_config,
    "mlp.gate_proj": q3_config,
    "mlp.up_proj": q3_config,
    "mlp.down_proj": q3_config,
})
model = AutoModelForCausalLM.from_pretrained(
    MODEL, dtype=torch.float16, device_map=DEVICE, quantization_config=quant_config
)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
EXPECTED = {"self_attn": (4, 64), "mlp": (3, 32)}
""",
}

# What followed in such a script: prompts, saving, and loading again.
USE = """
inputs = tokenizer("3 times 4 is", return_tensors="pt").to(model.device)
generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
text = tokenizer.decode(generated[0], skip_special_tokens=True)

model.save_pretrained(SAVED)
tokenizer.save_pretrained(SAVED)
again = AutoModelForCausalLM.from_pretrained(SAVED, device_map=DEVICE)
same = again.generate(**inputs, max_new_tokens=4, do_sample=False)
"""

# PEFT's page: a quantized model, an adapter, and training.
TRAINING = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HqqConfig
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

quant_config = HqqConfig(nbits=4, group_size=64)
model = AutoModelForCausalLM.from_pretrained(
    MODEL, device_map=DEVICE, dtype=torch.bfloat16, quantization_config=quant_config
)
model = prepare_model_for_kbit_training(model)
config = LoraConfig(
    r=16,
    lora_alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
inputs = tokenizer("3 times 4 is 12.", return_tensors="pt").to(model.device)
losses = []
for _ in range(5):
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.save_pretrained(SAVED)
"""


def run_with_one_line_changed(
    script: str, tiny: Path, saved: Path, device: str
) -> dict[str, Any]:
    """The names that `script` has defined at its end."""
    changed, count = STOCK_IMPORT.subn(
        r"from transformers import \1; from hqqlora import HqqConfig", script
    )
    assert count == 1
    pairs = zip(script.splitlines(), changed.splitlines(), strict=True)
    assert sum(before != after for before, after in pairs) == 1
    names: dict[str, Any] = {"MODEL": str(tiny), "SAVED": str(saved), "DEVICE": device}
    exec(compile(changed, "script.py", "exec"), names)
    return names


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_quantize_on_load_generate_save_and_load(
    tiny: Path, tmp_path: Path, script: str, device: str
):
    end = run_with_one_line_changed(SCRIPTS[script] + USE, tiny, tmp_path, device)
    for model in (end["model"], end["again"]):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, HQQLinear)}
        assert len(layers) == 14
        assert all(layer.compute_dtype == model.dtype for layer in layers.values())
        for name, layer in layers.items():
            assert (layer.nbits, layer.group_size) == end["EXPECTED"][name.split(".")[3]]
    assert model.dtype == (torch.bfloat16 if "early" in script else torch.float16)
    assert end["text"].startswith("3 times 4 is")
    assert torch.equal(end["generated"], end["same"])


def test_train_an_adapter(tiny: Path, tmp_path: Path):
    pytest.importorskip("peft")
    end = run_with_one_line_changed(TRAINING, tiny, tmp_path, "cpu")
    assert end["losses"][-1] < 0.9 * end["losses"][0]
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_stock_imports_with_one_line_added(tiny: Path, tmp_path: Path):
    """A script that is not to be touched: ``import hqqlora.transformers`` somewhere before."""
    pytest.importorskip("hqq")  # without which transformers' own HqqConfig cannot be made
    import hqqlora.transformers  # noqa: F401

    names = {"MODEL": str(tiny), "SAVED": str(tmp_path), "DEVICE": "cpu"}
    exec(compile(SCRIPTS["all layers"] + USE, "script.py", "exec"), names)
    assert sum(isinstance(m, HQQLinear) for m in names["again"].modules()) == 14  # type: ignore[attr-defined]
