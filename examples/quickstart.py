"""Quick start: quantize a model while it loads, and let it answer.

    python examples/quickstart.py
    python examples/quickstart.py --model my-model-folder --nbits 2 --prompt "Name a colour."

The dense model is never whole in memory: each weight is quantized as it is read.
"""

import argparse

from smollm2 import model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqlora import HqqConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model's folder or name (default: SmolLM2-135M)")
    parser.add_argument("--nbits", type=int, default=4, help="8, 4, 3, 2 or 1 (default: 4)")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=24, help="the longest answer")
    args = parser.parse_args()
    name = model_folder(args.model)

    # This is all there is to it. Every linear layer but the last (lm_head) gets `nbits` bits
    # for a weight, and a scale and a zero for every `group_size` of them.
    model = AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=HqqConfig(nbits=args.nbits, group_size=args.group_size),
        device_map="auto",
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    print(f"{name}: {model.get_memory_footprint() / 1e6:.1f} MB, embeddings included")
    print(model.get_submodule("model.layers.0.self_attn.q_proj"))

    # From here on it is a model like any other.
    chat = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(f"{args.prompt} -> {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
