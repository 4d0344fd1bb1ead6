"""QLoRA's recipe with transformers' Trainer: a base in 4 bits, adapters on every linear layer,
bfloat16, gradient checkpointing, and checkpoints to go on from.

    python examples/qlora_trainer.py --output run --steps 40
    python examples/qlora_trainer.py --output run --steps 40 --resume    # after it was killed

A run that is resumed has the losses of one that never stopped. TRL's SFTTrainer takes the same
model, or the name, HqqConfig and LoraConfig as its `model`, `quantization_config` and
`peft_config`.
"""

import argparse
import math

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from smollm2 import model_folder, text_windows
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hqqlora import HqqConfig, chunk_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model's folder or name (default: SmolLM2-135M)")
    parser.add_argument("--output", default="qlora-run", help="checkpoints and the adapter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--save-steps", type=int, default=10, help="between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    name = model_folder(args.model)

    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=HqqConfig(nbits=4, group_size=64), device_map="auto"
    )
    model = prepare_model_for_kbit_training(model)  # norms and embeddings in float32
    model = get_peft_model(
        model,
        LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=0.05,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    model = chunk_loss(model)  # never all logits in memory
    model.print_trainable_parameters()

    windows = text_windows(AutoTokenizer.from_pretrained(name), args.steps * 4 + 4, args.length)
    examples = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            bf16=True,
            learning_rate=5e-4,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            logging_steps=1,
            save_steps=args.save_steps,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=examples[4:],
        eval_dataset=examples[:4],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    print(f"held-out perplexity: {math.exp(trainer.evaluate()['eval_loss']):.2f}")
    trainer.save_model(f"{args.output}/adapter")


if __name__ == "__main__":
    main()
