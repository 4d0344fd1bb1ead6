"""Short runs of transformers' Trainer on a tiny quantized Llama, for tests and for the process
that one of them starts and kills.

As a script: ``python tiny_training.py MODEL OUTPUT ARGUMENTS``, where ARGUMENTS are those of
`trainer` as JSON, with "lora", those of `adapted`, and the step to "die_in_step".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from tiny_llama import patterned_text
from torch import Tensor, nn

LENGTH = 32
STEPS = 6
# Two ways to compute layers again in the backward pass, as arguments for `trainer`.
REENTRANT: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}
NOT_REENTRANT: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}


def windows(model_folder: Path, count: int = 40) -> list[dict[str, Tensor]]:
    """Examples of `LENGTH` tokens each, as a Trainer takes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = torch.tensor(tokenizer(patterned_text(count * 4)).input_ids)
    rows = ids[: count * LENGTH].view(count, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def quantized(model_folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The tiny Llama in 4 bits."""
    from transformers import AutoModelForCausalLM

    from hqqlora import HqqConfig

    return AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=dtype, quantization_config=HqqConfig(nbits=4, group_size=32)
    )


def adapted(model: nn.Module, **options: Any) -> Any:
    """`model` with a LoRA adapter on every linear layer, always the same one."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def trainer(model: nn.Module, model_folder: Path, output: Path, **arguments: Any) -> Any:
    """A Trainer that takes `STEPS` steps of 4 windows on the CPU, in silence."""
    from transformers import PrinterCallback, Trainer, TrainingArguments, trainer_utils

    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": True,
    }
    trainer_utils.set_seed(0)
    data = windows(model_folder)
    made = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(output), **{**defaults, **arguments}),
        train_dataset=data[8:],
        eval_dataset=data[:8],
    )
    made.remove_callback(PrinterCallback)
    return made


def losses(finished: Any) -> list[float]:
    """The loss of each step of a trainer, resumed ones included."""
    return [entry["loss"] for entry in finished.state.log_history if "loss" in entry]


def die_in_step(made: Any, step: int) -> None:
    """Has the trainer `made` kill its process in the middle of a step (from 1): after its
    gradients, before the optimizer takes it."""
    from transformers import TrainerCallback

    class Killer(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, **rest: Any
        ) -> None:
            if state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)

    made.add_callback(Killer())


def main(model_folder: str, output: str, arguments: str) -> None:
    options = json.loads(arguments)
    torch.set_num_threads(1)
    step, lora = options.pop("die_in_step"), options.pop("lora")
    model = adapted(quantized(Path(model_folder)), **lora)
    made = trainer(model, Path(model_folder), Path(output), **options)
    die_in_step(made, step)
    made.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
