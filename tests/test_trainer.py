"""transformers' Trainer on quantized models: it trains as on their dense form, stops and goes
on, evaluates, saves and loads."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    LENGTH,
    NOT_REENTRANT,
    REENTRANT,
    STEPS,
    adapted,
    losses,
    quantized,
    trainer,
    windows,
)

from hqqlora import HqqConfig

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from hqqlora.peft import HQQLoraLinear  # noqa: E402 (needs peft)

TINY_TRAINING = Path(__file__).parent / "tiny_training.py"


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(model: torch.nn.Module, tiny: Path, output: Path, **arguments: Any) -> Any:
    made = trainer(model, tiny, output, **arguments)
    made.train()
    return made


# ---- it learns ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "arguments", "bound"),
    [
        (torch.float32, {}, 2e-5),
        (torch.float32, {"gradient_accumulation_steps": 2}, 2e-5),
        (torch.float32, NOT_REENTRANT, 2e-5),
        # autocast rounds a dense weight and all that is multiplied to bfloat16, 2^-9 each
        (torch.float32, {"bf16": True, **REENTRANT}, 2**-7),
        (torch.bfloat16, NOT_REENTRANT, 2**-7),
        (torch.bfloat16, {"bf16": True}, 2**-7),
    ],
    ids=["fp32", "accumulated", "checkpointed", "autocast", "bf16", "bf16-autocast"],
)
def test_it_learns_as_on_the_dequantized_model(
    tiny: Path, tmp_path: Path, dtype: torch.dtype, arguments: dict[str, Any], bound: float
):
    model = adapted(quantized(tiny, dtype))
    assert sum(isinstance(module, HQQLoraLinear) for module in model.modules()) == 14
    learned = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32}
    codes = [m.W_q.clone() for m in model.modules() if hasattr(m, "W_q")]

    found = losses(trained(model, tiny, tmp_path, **arguments))
    assert len(found) == STEPS
    assert found[-1] < 0.8 * found[0]
    after = [m.W_q for m in model.modules() if hasattr(m, "W_q")]
    assert all(map(torch.equal, codes, after))
    assert {p.dtype for p in learned} == {torch.float32}

    dense = adapted(quantized(tiny, dtype).dequantize())
    assert not any(isinstance(module, HQQLoraLinear) for module in dense.modules())
    expected = losses(trained(dense, tiny, tmp_path, **arguments))
    assert found == pytest.approx(expected, rel=bound)


@pytest.mark.parametrize("checkpointing", [REENTRANT, NOT_REENTRANT])
def test_checkpointing_changes_nothing(
    tiny: Path, tmp_path: Path, checkpointing: dict[str, Any]
):
    """Dropout draws the same mask again when a layer is computed again."""
    expected = trained(adapted(quantized(tiny), lora_dropout=0.3), tiny, tmp_path)
    found = trained(adapted(quantized(tiny), lora_dropout=0.3), tiny, tmp_path, **checkpointing)
    without = trained(adapted(quantized(tiny)), tiny, tmp_path)
    assert losses(found) == losses(expected) != losses(without)


def test_accumulated_gradients_are_those_of_a_larger_batch(tiny: Path, tmp_path: Path):
    expected = trained(adapted(quantized(tiny)), tiny, tmp_path)
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    found = trained(adapted(quantized(tiny)), tiny, tmp_path, **parts)
    assert losses(found) == pytest.approx(losses(expected), rel=2e-5)


def test_kbit_preparation_comes_first_or_not(tiny: Path, tmp_path: Path):
    prepared = peft.prepare_model_for_kbit_training(quantized(tiny))
    found = losses(trained(adapted(prepared), tiny, tmp_path))
    assert found == losses(trained(adapted(quantized(tiny)), tiny, tmp_path))


def test_smollm2_learns(smollm2: Path, tmp_path: Path):
    """Two sentences, over and over, in bfloat16 with checkpointing."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    text = "Quantization keeps a weight in a few bits. The adapters learn the rest. "
    ids = torch.tensor(tokenizer(text * 2).input_ids)[:32].view(1, 32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, quantization_config=HqqConfig(nbits=4, group_size=64), device_map="cpu"
    )
    model = adapted(model, r=8, lora_alpha=16)
    assert sum(isinstance(module, HQQLoraLinear) for module in model.modules()) == 210
    assert model.get_nb_trainable_parameters() == (2_442_240, 134_515_008 + 2_442_240)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=1,
        learning_rate=2e-3,
        bf16=True,
        gradient_checkpointing=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        torch_compile=False,
        use_cpu=True,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    made = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    made.train()
    found = losses(made)
    assert all(map(math.isfinite, found))
    assert found[-1] < 0.6 * found[0]


# ---- it stops and goes on ----------------------------------------------------------------

WAYS_TO_RESUME: dict[str, dict[str, Any]] = {
    "fp32": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "autocast": {"bf16": True, **REENTRANT},
}


@pytest.mark.parametrize("way", WAYS_TO_RESUME)
def test_a_resumed_run_goes_on_with_the_same_losses(tiny: Path, tmp_path: Path, way: str):
    saving = {**WAYS_TO_RESUME[way], "save_strategy": "steps", "save_steps": 2}
    run = trained(adapted(quantized(tiny), lora_dropout=0.3), tiny, tmp_path, **saving)
    expected = losses(run)
    names = {p.name for p in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= names
    assert "model.safetensors" not in names  # the adapter alone

    again = trainer(adapted(quantized(tiny), lora_dropout=0.3), tiny, tmp_path, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == expected
    state, expected_state = (
        peft.get_peft_model_state_dict(made.model) for made in (again, run)
    )
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[key], expected_state[key]) for key in state)


def test_a_killed_run_ends_as_if_nothing_had_happened(tiny: Path, tmp_path: Path):
    """Under ``accelerate launch``; killed after the gradients of step 5, with what it saved
    after step 4."""
    options: dict[str, Any] = {**NOT_REENTRANT, "bf16": True}
    model = adapted(quantized(tiny), lora_dropout=0.3)
    expected = losses(trained(model, tiny, tmp_path / "uninterrupted", **options))

    options = {**options, "save_strategy": "steps", "save_steps": 2}
    output = tmp_path / "killed"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=1",
    ]
    script = [TINY_TRAINING, tiny, output]
    arguments = json.dumps({**options, "lora": {"lora_dropout": 0.3}, "die_in_step": 5})
    done = subprocess.run(
        [*launcher, *map(str, script), arguments], capture_output=True, text=True, timeout=300
    )
    assert "SIGKILL" in done.stderr, done.stderr
    assert done.returncode != 0
    assert sorted(p.name for p in output.iterdir()) == ["checkpoint-2", "checkpoint-4"]

    made = trainer(adapted(quantized(tiny), lora_dropout=0.3), tiny, output, **options)
    made.train(resume_from_checkpoint=True)
    assert losses(made) == expected


# ---- it evaluates, saves and loads -------------------------------------------------------


def test_what_it_saves_is_what_it_evaluated(tiny: Path, tmp_path: Path):
    """A quantized checkpoint and an adapter for it, loaded in the two ways that PEFT has."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    quantized(tiny).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    run = trained(adapted(model), tiny, tmp_path, eval_strategy="steps", eval_steps=3)
    evaluated = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    assert len(evaluated) == 2
    expected = run.evaluate()["eval_loss"]
    assert expected == evaluated[1] < evaluated[0]
    predicted = run.predict(windows(tiny)[:8])
    assert predicted.metrics["test_loss"] == expected
    assert predicted.predictions.shape == (8, LENGTH, 257)
    run.save_model(str(adapter))

    stored = json.loads((adapter / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(base)
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), adapter
    )
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    for loaded in (again, automatic):
        assert sum(isinstance(module, HQQLoraLinear) for module in loaded.modules()) == 14
        assert trainer(loaded, tiny, tmp_path).evaluate()["eval_loss"] == expected


def test_the_best_checkpoint_is_loaded_at_the_end(tiny: Path, tmp_path: Path):
    """Here that with the highest loss, so that it is not the last."""
    run = trained(
        adapted(quantized(tiny)),
        tiny,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        **dict.fromkeys(("eval_strategy", "save_strategy"), "steps"),
        **dict.fromkeys(("eval_steps", "save_steps"), 1),
    )
    evaluated = [e["eval_loss"] for e in run.state.log_history if "eval_loss" in e]
    assert evaluated[-1] < max(evaluated)
    assert run.evaluate()["eval_loss"] == max(evaluated)


def test_a_quantized_model_without_adapters_is_refused(tiny: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(quantized(tiny), tiny, tmp_path)
