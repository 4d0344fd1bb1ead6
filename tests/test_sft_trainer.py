"""TRL's SFTTrainer on quantized models, with its own defaults: bfloat16 and checkpointing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import patterned_text
from tiny_training import losses, quantized

from hqqlora import HqqConfig, HQQLinear
from hqqlora.training.chat_data import Instruction, encode

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

from hqqlora.peft import HQQLoraLinear  # noqa: E402 (needs peft)

STEPS = 6


pytestmark = pytest.mark.usefixtures("one_thread")


def texts(count: int = 40) -> Any:
    return datasets.Dataset.from_list([{"text": patterned_text(2 + i)} for i in range(count)])


def lora(**options: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def sft(model: Any, output: Path, data: Any, adapter: Any = None, **arguments: Any) -> Any:
    """An SFTTrainer for `STEPS` steps, with its defaults wherever a test says nothing."""
    for_trainer = {k: arguments.pop(k) for k in ("quantization_config",) if k in arguments}
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(output), **{**defaults, **arguments}),
        train_dataset=data,
        peft_config=adapter,
        **for_trainer,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_it_puts_the_adapter_on_and_trains(
    tiny: Path, tmp_path: Path, dtype: torch.dtype, packing: bool
):
    made = sft(quantized(tiny, dtype), tmp_path, texts(), lora(), packing=packing)
    assert made.args.bf16
    assert made.args.gradient_checkpointing
    assert sum(isinstance(module, HQQLoraLinear) for module in made.model.modules()) == 14
    made.train()
    found = losses(made)
    assert len(found) == STEPS
    assert found[-1] < 0.8 * found[0]
    learned = [p for p in made.model.parameters() if p.requires_grad]
    assert {p.dtype for p in learned} == {torch.float32}
    assert sum(p.numel() for p in learned) == made.model.get_nb_trainable_parameters()[0]


def test_it_trains_as_on_the_dequantized_model(tiny: Path, tmp_path: Path):
    runs = []
    for model in (quantized(tiny), quantized(tiny).dequantize()):
        run = sft(model, tmp_path, texts(), lora(), bf16=False)
        run.train()
        runs.append(losses(run))
    assert runs[0] == pytest.approx(runs[1], rel=2e-5)


def test_it_quantizes_a_model_that_it_loads_itself(tiny: Path, tmp_path: Path):
    """Given a name, a configuration to quantize with, and one for the adapter."""
    config = HqqConfig(nbits=4, group_size=32)
    made = sft(str(tiny), tmp_path, texts(), lora(), quantization_config=config)
    assert sum(isinstance(module, HQQLinear) for module in made.model.modules()) == 14
    made.train()
    expected = sft(quantized(tiny), tmp_path, texts(), lora())
    expected.train()
    assert losses(made) == losses(expected)


def test_a_resumed_run_goes_on_with_the_same_losses(tiny: Path, tmp_path: Path):
    options: dict[str, Any] = {"packing": True, "save_strategy": "steps", "save_steps": 2}
    adapter = lora(lora_dropout=0.3)
    run = sft(quantized(tiny), tmp_path, texts(), adapter, **options)
    run.train()
    again = sft(quantized(tiny), tmp_path, texts(), adapter, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(again) == losses(run)


def test_smollm2_learns_to_answer(smollm2: Path, tmp_path: Path):
    """A conversation in its own chat template, of which only the answer counts; in
    bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, quantization_config=HqqConfig(nbits=4, group_size=64), device_map="cpu"
    )
    question = [{"role": "user", "content": "What are your weights made of?"}]
    answer = [{"role": "assistant", "content": "Four bits each, and one adapter for all."}]
    data = datasets.Dataset.from_list([{"prompt": question, "completion": answer}] * 4)
    made = sft(
        model,
        tmp_path,
        data,
        lora(r=8, lora_alpha=16),
        max_steps=8,
        per_device_train_batch_size=1,
        learning_rate=3e-3,
    )
    made.train()
    found = losses(made)
    assert all(map(math.isfinite, found))
    assert found[-1] < 0.1 * found[0]

    tokenizer = made.processing_class
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = made.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    said = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.startswith("Four bits each")


MESSAGES = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6."},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' }}{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content + '<end>' }}{%- endgeneration -%}{{ '|' }}"
    "{% else %}{{ m.content + '<end>|' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("record", "arguments"),
    [
        ({"messages": MESSAGES}, {"assistant_only_loss": True}),
        ({"messages": MESSAGES}, {"completion_only_loss": False}),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, {}),
        ({"prompt": "2 + 2 =", "completion": " 4."}, {}),
        ({"prompt": "2 + 2 =", "completion": " 4."}, {"completion_only_loss": False}),
    ],
)
def test_hqqlora_train_learns_the_same_tokens(
    tiny: Path, tmp_path: Path, record: dict[str, Any], arguments: dict[str, Any]
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = TEMPLATE
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    made = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, max_length=None, **arguments
        ),
        train_dataset=datasets.Dataset.from_list([record]),
        processing_class=tokenizer,
    )
    (expected,) = made.train_dataset
    own = Instruction("f:1", record.get("prompt", MESSAGES), record.get("completion"))
    ids, labels = encode(own, tokenizer, arguments.get("completion_only_loss") is False)
    assert ids == expected["input_ids"]
    assert labels == expected["labels"]
