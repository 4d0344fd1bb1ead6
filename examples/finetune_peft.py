"""PEFT: fine-tune a quantized model in a training loop of your own.

    python examples/finetune_peft.py --steps 50

The base stays as it is, in 4 bits; PEFT puts an adapter beside each of its layers, and base and
adapter are computed in one operation, forward and backward. Nothing here but the import of
HqqConfig tells that from fine-tuning a dense model.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from smollm2 import model_folder, text_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqlora import HqqConfig


@torch.no_grad()
def mean_loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    model.eval()
    losses = [model(input_ids=window[None], labels=window[None]).loss for window in windows]
    return torch.stack(losses).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model's folder or name (default: SmolLM2-135M)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--output", help="where to save the adapter")
    args = parser.parse_args()
    name = model_folder(args.model)
    torch.manual_seed(0)

    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=HqqConfig(nbits=4, group_size=64), device_map="auto"
    )
    model = get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.print_trainable_parameters()

    tokenizer = AutoTokenizer.from_pretrained(name)
    windows = text_windows(tokenizer, args.steps * args.batch + 4, args.length)
    windows = windows.to(model.device)
    held_out, batches = windows[:4], windows[4:].split(args.batch)
    before = mean_loss(model, held_out)

    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=5e-4)
    for step, batch in enumerate(batches, start=1):
        model.train()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {loss.item():.4f}", flush=True)

    print(f"held-out loss {before:.4f} -> {mean_loss(model, held_out):.4f}")
    with model.disable_adapter():  # the base has not changed
        assert mean_loss(model, held_out) == before
    if args.output:
        model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
