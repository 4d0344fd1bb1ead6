"""Save and reload: the quantized model, an adapter for it, and the two of them merged.

    python examples/save_and_reload.py --output saved

makes four folders, and loads each of them again:

    quantized     the model in 4 bits, as transformers 4, hqq and vLLM read it too
    adapter       PEFT's own files, a few megabytes, which name the folder above
    merged-4bit   both in one, quantized again, which costs a little accuracy
    merged-dense  both in one, exactly, without quantization: for programs that know none
"""

import argparse
import os

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from smollm2 import model_folder, text_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

import hqqlora.peft
from hqqlora import HqqConfig


def megabytes(folder: str) -> float:
    return sum(entry.stat().st_size for entry in os.scandir(folder)) / 1e6


@torch.no_grad()
def logits(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=window.to(model.device)).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model's folder or name (default: SmolLM2-135M)")
    parser.add_argument("--output", default="saved", help="where to save (default: ./saved)")
    parser.add_argument("--steps", type=int, default=5, help="training steps for the adapter")
    args = parser.parse_args()
    name = model_folder(args.model)
    quantized, adapter, merged, dense = (
        os.path.join(args.output, part)
        for part in ("quantized", "adapter", "merged-4bit", "merged-dense")
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, probe = text_windows(tokenizer, 2, 64).split(1)

    # Loading what was saved is quick, and bit for bit what was saved.
    config = HqqConfig(nbits=4, group_size=64)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
    model.save_pretrained(quantized)
    again = AutoModelForCausalLM.from_pretrained(quantized)
    same = torch.equal(logits(again, probe), logits(model, probe))
    print(f"quantized: {megabytes(quantized):.1f} MB; the same logits: {same}")

    # An adapter is saved alone. AutoPeftModel finds its base in the adapter's configuration.
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(again, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(args.steps):
        model(input_ids=train, labels=train).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = logits(model, probe)
    model.save_pretrained(adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    same = torch.equal(logits(model, probe), learned)
    print(f"adapter: {megabytes(adapter):.1f} MB; the same logits: {same}")

    # Merged into 4 bits: as small as the base, but rounded again. unmerge_adapter goes back.
    model.merge_adapter()
    errors = hqqlora.peft.requantization_errors(model)
    model.unmerge_adapter()
    print(f"merging into 4 bits: up to {max(errors.values()):.1%} of a weight is lost")
    model.merge_and_unload().save_pretrained(merged)

    # Merged into a dense model: nothing is lost but the last rounding to the model's dtype.
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    hqqlora.peft.merge_and_unload(model, dequantize=True).save_pretrained(dense)
    for folder in (merged, dense):
        tokenizer.save_pretrained(folder)
        found = logits(AutoModelForCausalLM.from_pretrained(folder), probe)
        agreement = (found.argmax(-1) == learned.argmax(-1)).float().mean()
        print(f"{os.path.basename(folder)}: {megabytes(folder):.1f} MB; ", end="")
        print(f"the same next token at {agreement:.0%} of the places")


if __name__ == "__main__":
    main()
