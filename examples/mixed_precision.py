"""Mixed precision: more bits where they count, fewer where most of the weights are.

    python examples/mixed_precision.py

Most of a Llama's weights are in its MLPs. `dynamic_config` says for each kind of layer how it
is quantized; a key is a layer's name without its number ("mlp.down_proj"), or a part of it
("mlp", "attn"). What a mixture saves, and what it costs, is then measured.
"""

import argparse

import torch
from smollm2 import model_folder, text_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqlora import HqqConfig, HQQLinear

FOUR = {"nbits": 4, "group_size": 64}
THREE = {"nbits": 3, "group_size": 64}
MIXTURES = {
    "attention 4, mlp 4": {"attn": FOUR, "mlp": FOUR},
    "attention 4, mlp 3": {"attn": FOUR, "mlp": THREE},
    # where two keys mean the same layer, its full name decides
    "attention 4, mlp 3, down_proj 4": {"attn": FOUR, "mlp": THREE, "mlp.down_proj": FOUR},
}


def linear_megabytes(model: torch.nn.Module) -> float:
    """Memory of the quantized layers, scales and zeros included."""
    layers = [layer for layer in model.modules() if isinstance(layer, HQQLinear)]
    return sum(p.numel() * p.element_size() for m in layers for p in m.parameters()) / 1e6


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    losses = [model(input_ids=w[None], labels=w[None]).loss for w in windows.to(model.device)]
    return torch.stack(losses).float().mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model's folder or name (default: SmolLM2-135M)")
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens, to measure on")
    args = parser.parse_args()
    name = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    windows = text_windows(tokenizer, args.windows, 256)

    print(f"{'':32} {'linear layers':>14} {'perplexity':>11}")
    for title, mixture in MIXTURES.items():
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=HqqConfig(dynamic_config=mixture), device_map="auto"
        )
        size, quality = linear_megabytes(model), perplexity(model, windows)
        print(f"{title:32} {size:11.1f} MB {quality:11.2f}", flush=True)


if __name__ == "__main__":
    main()
