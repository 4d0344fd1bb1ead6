"""QLoRA on several GPUs: the 4-bit base, its scales and the adapters are shared out by FSDP2.

    torchrun --nproc-per-node 8 examples/finetune_fsdp2.py --model FOLDER --text book.txt

No process ever holds the dense model: each reads and quantizes some of the layers, and keeps an
eighth of all. Without GPUs the same command runs on the CPU, over gloo. A second run with the
same --output goes on where the first one stopped, also with another number of processes.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hqqlora import BaseQuantizeConfig, add_lora, lora_parameters
from hqqlora.distributed import load_sharded, quantized_skeleton, shard_model

# Adapters and their optimizer: the base is as it was, and need not be saved again.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder of safetensors files")
    parser.add_argument("--text", required=True, help="a text file to learn from")
    parser.add_argument("--output", default="fsdp2-run", help="where adapters are saved")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--batch", type=int, default=1, help="windows in a step, per process")
    parser.add_argument("--nbits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    with init_empty_weights():
        config = AutoConfig.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()  # init_empty_weights makes two parameters of a tied one
    quantized_skeleton(model, BaseQuantizeConfig(nbits=args.nbits, group_size=args.group_size))
    add_lora(model, r=args.rank, lora_alpha=2 * args.rank)
    shard_model(model)
    load_sharded(model, args.model)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    optimizer = torch.optim.AdamW(lora_parameters(model), lr=args.learning_rate)
    saved, start = Path(args.output) / "adapter", 0
    if (saved / ".metadata").exists():
        start = load(model, optimizer, saved)

    windows = windows_of(args.model, args.text, args.length)
    device = next(model.parameters()).device
    for step in range(start, args.steps):
        first = (step * world + rank) * args.batch
        picked = [windows[(first + i) % len(windows)] for i in range(args.batch)]
        tokens = torch.stack(picked).to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step + 1}: loss {mean.item():.4f}", flush=True)

    save(model, optimizer, args.steps, saved)
    dist.destroy_process_group()


def save(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path
) -> None:
    """Each process writes its own part."""
    adapters, moments = get_state_dict(model, optimizer, options=TRAINED)
    state = {"model": adapters, "optimizer": moments, "step": torch.tensor(step)}
    dcp.save(state, checkpoint_id=folder)


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Each process reads its own part; returns the number of steps taken before."""
    adapters, moments = get_state_dict(model, optimizer, options=TRAINED)
    state = {"model": adapters, "optimizer": moments, "step": torch.tensor(0)}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED,
    )
    return int(state["step"])


def windows_of(model: str, path: str, length: int) -> torch.Tensor:
    """The text's tokens [windows, length]."""
    text = Path(path).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[0]
    if len(ids) < length:
        raise SystemExit(f"{path} has {len(ids)} tokens: fewer than one window of {length}")
    return ids[: len(ids) // length * length].view(-1, length)


if __name__ == "__main__":
    main()
