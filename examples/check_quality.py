"""Check the quality: what a quantized model says and predicts, beside the dense one.

    python examples/check_quality.py --nbits 4 3 2
    python examples/check_quality.py --nbits 3 --group-size 32 --prompt "The moon is"

A small error of the weights is no proof of a good model: look at a prompt, and measure on a
text of your own.
"""

import argparse
import math

import torch
from smollm2 import model_folder, text_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqlora import HqqConfig


@torch.no_grad()
def next_tokens(model: torch.nn.Module, windows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The likeliest token after each one of windows [count, length], and the perplexity."""
    best, losses = [], []
    for window in windows.to(model.device).split(1):
        output = model(input_ids=window, labels=window)
        best.append(output.logits.argmax(-1).cpu())
        losses.append(output.loss.item())
    return torch.cat(best), math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model's folder or name (default: SmolLM2-135M)")
    parser.add_argument("--nbits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens, to measure on")
    args = parser.parse_args()
    name = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    windows = text_windows(tokenizer, args.windows, 256)
    prompt = tokenizer(args.prompt, return_tensors="pt")

    expected = None
    for nbits in (None, *args.nbits):
        config = nbits and HqqConfig(nbits=nbits, group_size=args.group_size)
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=config, device_map="auto"
        )
        found, perplexity = next_tokens(model, windows)
        expected = found if expected is None else expected
        agreement = (found == expected).float().mean()
        output = model.generate(**prompt.to(model.device), max_new_tokens=16, do_sample=False)
        title = "dense" if nbits is None else f"{nbits} bits"
        print(
            f"{title:8} {model.get_memory_footprint() / 1e6:7.1f} MB   "
            f"perplexity {perplexity:8.2f}   same next token {agreement:5.1%}\n"
            f"         {tokenizer.decode(output[0], skip_special_tokens=True)!r}",
            flush=True,
        )


if __name__ == "__main__":
    main()
