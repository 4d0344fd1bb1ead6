"""What the library writes, each as a `Writer`: a small old state, a new one, and what a reader
would find. The faults of `faults.py` are tried on all of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from tiny_llama import patterned_text, save_tiny_llama
from torch import nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear, LoRALinear
from hqqlora.cli import main
from hqqlora.training.checkpoint import Progress, take_checkpoint, write_checkpoint

Files = dict[str, bytes]


def files_in(folder: Path) -> Files:
    """Every file by its path, but those that no reader looks at."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".tmp" not in str(path.relative_to(folder))
    }


def leavings_in(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if ".tmp" in path.name]


class Writer(ABC):
    """Something that is saved in a folder. `setup` is called once, with a folder of its own
    for what the others need."""

    name: str
    leaves_temporaries = False

    def setup(self, folder: Path) -> None:  # noqa: B027
        """Makes what is going to be saved."""

    def write_old(self, folder: Path) -> None:  # noqa: B027
        """What is there before. Nothing by default."""

    @abstractmethod
    def write_new(self, folder: Path) -> None:
        """What is interrupted, and then done again."""

    def verdict(self, folder: Path, old: Files, new: Files) -> str:
        """ "old", "new", "some new" (each file is the old or the new one), or what is lost."""
        found = files_in(folder)
        if found == old:
            return "old"
        if found == new:
            return "new"
        for name in found.keys() | old.keys():
            if found.get(name) not in (old.get(name, b""), new.get(name, b"")):
                return f"LOST: {name} is neither the old one nor the new one"
        return "some new"


class Adapter(Writer):
    """`save_adapter`, with another rank than before."""

    def __init__(self, *, exists: bool) -> None:
        self.name = f"save_adapter, {'over another' if exists else 'new folder'}"
        self.exists = exists

    def setup(self, folder: Path) -> None:
        self.models = [
            nn.ModuleDict({"fc": LoRALinear(_layer(), r=r, init_lora_weights=False)})
            for r in (2, 4)
        ]

    def write_old(self, folder: Path) -> None:
        if self.exists:
            hqqlora.save_adapter(self.models[0], folder / "adapter")

    def write_new(self, folder: Path) -> None:
        hqqlora.save_adapter(self.models[1], folder / "adapter")


class TrainCheckpoint(Writer):
    """What `hqqlora train` writes every few steps."""

    name = "checkpoint of train"

    def setup(self, folder: Path) -> None:
        self.checkpoints = []
        for step in (1, 2):
            model = nn.ModuleDict({"fc": LoRALinear(_layer(), r=4, init_lora_weights=False)})
            optimizer = torch.optim.AdamW(hqqlora.lora_parameters(model))
            progress = Progress(losses=[0.5] * step, facts={"of": "a test"})
            self.checkpoints.append(take_checkpoint({}, {}, progress, model, optimizer, {}))

    def write_old(self, folder: Path) -> None:
        write_checkpoint(self.checkpoints[0], folder / "checkpoint.pt")

    def write_new(self, folder: Path) -> None:
        write_checkpoint(self.checkpoints[1], folder / "checkpoint.pt")


class Model(Writer):
    """A quantized tiny Llama in one of the ways to save one."""

    def setup(self, folder: Path) -> None:
        self.old, self.new = (_llama(seed) for seed in (0, 1))


class Qmodel(Model):
    """`AutoHQQHFModel.save_quantized`: qmodel.pt and configurations."""

    name = "save_quantized, over another"

    def write_old(self, folder: Path) -> None:
        hqqlora.AutoHQQHFModel.save_quantized(self.old, folder / "q")

    def write_new(self, folder: Path) -> None:
        hqqlora.AutoHQQHFModel.save_quantized(self.new, folder / "q")


class Pretrained(Model):
    """transformers' own `save_pretrained` of a quantized model. (The temporary file of
    safetensors, which it calls, has a name of its own each time.)"""

    name = "save_pretrained, new folder"
    leaves_temporaries = True

    def write_new(self, folder: Path) -> None:
        self.new.save_pretrained(folder / "q")


class Gguf(Model):
    """`export_gguf`."""

    name = "export_gguf, over another"

    def setup(self, folder: Path) -> None:
        super().setup(folder)
        from gguf_files import byte_tokenizer

        self.tokenizer = byte_tokenizer()

    def write_old(self, folder: Path) -> None:
        hqqlora.export_gguf(self.old, folder / "model.gguf", self.tokenizer)

    def write_new(self, folder: Path) -> None:
        hqqlora.export_gguf(self.new, folder / "model.gguf", self.tokenizer)


class GgufAdapter(Model):
    """`export_gguf_adapter`."""

    name = "export_gguf_adapter, over another"

    def setup(self, folder: Path) -> None:
        super().setup(folder)
        for model in (self.old, self.new):
            hqqlora.add_lora(model, r=2, target_modules=["q_proj"])
            for layer in model.modules():
                if isinstance(layer, LoRALinear):
                    layer.reset_lora_parameters(False)

    def write_old(self, folder: Path) -> None:
        hqqlora.export_gguf_adapter(self.old, folder / "adapter.gguf")

    def write_new(self, folder: Path) -> None:
        hqqlora.export_gguf_adapter(self.new, folder / "adapter.gguf")


class Quantize(Writer):
    """`hqqlora quantize` into five files. What is done stays, and the same command goes on."""

    name = "hqqlora quantize"

    def setup(self, folder: Path) -> None:
        from tiny_models import save_tiny, tiny_llama

        from hqqlora.quantize_command.options import QuantizeOptions
        from hqqlora.quantize_command.plan_apart import plan_here

        model = tiny_llama(num_hidden_layers=4, vocab_size=256)
        self.dense = save_tiny(model, folder / "dense", torch.bfloat16)
        options = QuantizeOptions(str(self.dense), None, max_shard_size=40_000)
        self.plan = pickle.dumps(plan_here(options))

    def write_new(self, folder: Path) -> None:
        from hqqlora.quantize_command import job
        from hqqlora.quantize_command.destination import STATE

        done = (folder / "q/config.json").exists() and not (folder / "q" / STATE).exists()
        if done:
            return  # the command refuses a folder that is finished
        plan_apart, job.plan_apart = job.plan_apart, lambda _: pickle.loads(self.plan)
        try:
            _succeed(
                *("quantize", self.dense, folder / "q"),
                *("--max-shard-size", "40KB", "--threads", "1"),
            )
        finally:
            job.plan_apart = plan_apart

    def verdict(self, folder: Path, old: Files, new: Files) -> str:
        """Hidden files belong to the run that is to go on; config.json comes last."""
        found = {n: d for n, d in files_in(folder).items() if not Path(n).name.startswith(".")}
        for name, content in found.items():
            if content != new[name]:
                return f"LOST: {name} is not whole"
        if "q/config.json" in found and found != new:
            return "LOST: config.json is there, and other files are not"
        return "new" if found == new else "some new" if found else "old"


class Train(Writer):
    """`hqqlora train` with a checkpoint after each step, and then `--resume`."""

    name = "hqqlora train"

    def setup(self, folder: Path) -> None:
        self.model = save_tiny_llama(folder / "model", num_hidden_layers=1)
        self.text = folder / "text.txt"
        self.text.write_text(patterned_text(120))

    def write_new(self, folder: Path) -> None:
        run = folder / "run"
        if (run / "train_log.json").exists():
            return
        if (run / "checkpoint.pt").exists():
            _succeed("train", "--resume", "--output", run)
            return
        _succeed(
            *("train", "--model", self.model, "--data", self.text, "--output", run),
            *("--sequence-length", "64", "--batch", "2", "--steps", "3", "--rank", "2"),
            *("--sample-tokens", "0", "--checkpoint-every", "1", "--dtype", "float32"),
            *("--threads", "1"),
        )

    def verdict(self, folder: Path, old: Files, new: Files) -> str:
        """The times in a log differ from run to run; the losses and the adapter do not."""
        run, found = folder / "run", files_in(folder)
        if "run/train_log.json" in found:
            losses = [
                [step["loss"] for step in json.loads(files["run/train_log.json"])["steps"]]
                for files in (found, new)
            ]
            adapter = "run/adapter/adapter_model.safetensors"
            same = losses[0] == losses[1] and found.get(adapter) == new[adapter]
            return "new" if same else "LOST: the run has ended with other results"
        if "run/checkpoint.pt" in found:
            from hqqlora.training.checkpoint import read_checkpoint

            read_checkpoint(run / "checkpoint.pt")
            return "some new"
        return "old" if not found else f"LOST: {sorted(found)} without a checkpoint"


def all_writers() -> list[Writer]:
    return [
        Adapter(exists=False),
        Adapter(exists=True),
        TrainCheckpoint(),
        Qmodel(),
        Pretrained(),
        Gguf(),
        GgufAdapter(),
        Quantize(),
        Train(),
    ]


def _layer() -> HQQLinear:
    config = BaseQuantizeConfig(nbits=4, group_size=16)
    return HQQLinear(nn.Linear(32, 24), config, compute_dtype=torch.float32)


def _llama(seed: int) -> Any:
    """Quantized, and small."""
    from tiny_models import tiny_llama

    from hqqlora.transformers.mark_quantized import mark_quantized

    model = tiny_llama(num_hidden_layers=1, vocab_size=258)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    hqqlora.quantize_model(model, BaseQuantizeConfig(nbits=4, group_size=32))
    mark_quantized(model)
    return copy.deepcopy(model)


def _succeed(*arguments: object) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(argument) for argument in arguments])
    if code:
        raise SystemExit(f"exit code {code}: {said.getvalue()[-2000:]}")
