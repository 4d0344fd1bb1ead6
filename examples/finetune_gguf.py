"""GGUF: fine-tune a model as it is in its file, and give llama.cpp what was learned.

    python examples/finetune_gguf.py
    python examples/finetune_gguf.py --model my-model.gguf --output my-output --steps 20

The file's own codes become the layers' codes: nothing is quantized again, on the way in or out.
Two files are written: an adapter, for the model's own file, and a model with the adapter in it.
"""

import argparse
import os

import torch
from smollm2 import text_windows
from transformers import AutoTokenizer

import hqqlora
from hqqlora.command.model_source import find_model
from hqqlora.model import lora_layers


def train(model: torch.nn.Module, windows: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(hqqlora.lora_parameters(model), lr=1e-3)
    model.train()
    for step in range(steps):
        loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a .gguf file (default: SmolLM2-135M's, of type Q4_1)")
    parser.add_argument(
        "--output", default="gguf-out", help="where to write (default: ./gguf-out)"
    )
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    path = find_model(args.model).path

    model = hqqlora.load_gguf(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    print(model.get_submodule("model.layers.0.self_attn.q_proj"))

    hqqlora.add_lora(model, r=8, lora_alpha=16)
    train(model, text_windows(tokenizer, 2, 48), args.steps)

    os.makedirs(args.output, exist_ok=True)
    adapter = os.path.join(args.output, "adapter.gguf")
    hqqlora.export_gguf_adapter(model, adapter)
    print(f"llama-cli -m {path} --lora {adapter}")

    # Merged into 4 bits the adapter is rounded; the file needs no other, and is as small.
    for _, layer in lora_layers(model):
        layer.merge()
    merged = os.path.join(args.output, "model.gguf")
    hqqlora.export_gguf(model, merged, dense_type="Q8_0")
    print(f"llama-cli -m {merged}")
    for file in (adapter, merged):
        print(f"{file}: {os.path.getsize(file) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
