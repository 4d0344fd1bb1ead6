"""Fuzzing of what reads files from elsewhere.

    python tests/fuzz/readers.py 600 [--seed N]

changes small sound files at random for that many seconds: bytes, lengths, values of headers
and of configurations, objects in pickles. Each reader must return, or raise what it documents:
not crash, hang, take gigabytes, or run or remove anything. An input with which one does is
written to build/fuzz-crashes, and becomes a case in tests/test_bad_files.py. The exit code is 1
if there is any.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from file_changes import change_bytes, change_json, change_safetensors, change_torch
from torch import nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear, LoRALinear

N, K, G = 24, 32, 16
SECONDS_EACH = 20
MEMORY = 4 * 2**30
BATCH = 100  # inputs to a process
FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "os.remove",
    "os.rename",
}


@dataclass
class Target:
    """A reader, the sound file that is changed, and what it may raise."""

    name: str
    file: str
    content: bytes
    read: Callable[[Path], object]
    raises: tuple[type[BaseException], ...] = (ValueError, OSError)
    mutate: Callable[[bytes, random.Random], bytes] | None = None
    others: dict[str, bytes] = field(default_factory=dict)

    def changed(self, generator: random.Random) -> bytes:
        """The file, changed."""
        if self.mutate is not None and generator.random() < 0.7:
            return self.mutate(self.content, generator)
        return change_bytes(self.content, generator)


# ---- readers -----------------------------------------------------------------------------


def layer() -> HQQLinear:
    config = BaseQuantizeConfig(nbits=4, group_size=G)
    return HQQLinear(nn.Linear(K, N), config, compute_dtype=torch.float32)


def adapted() -> nn.Module:
    return nn.ModuleDict({"fc": LoRALinear(layer(), r=4, init_lora_weights=False)})


def targets(folder: Path) -> list[Target]:
    """All readers. `folder` is for files that are made on the way."""
    from hqqlora.command.checkpoint_folder import open_checkpoint
    from hqqlora.command.errors import RunError
    from hqqlora.command.safetensors_file import read_header
    from hqqlora.config import QuantSettings
    from hqqlora.files import write_safetensors, write_torch
    from hqqlora.hqq_checkpoint import read_module_states
    from hqqlora.hqq_layers import raw_state
    from hqqlora.training.checkpoint import (
        Progress,
        read_checkpoint,
        restore,
        take_checkpoint,
        write_checkpoint,
    )

    hqqlora.save_adapter(adapted(), folder / "adapter")
    config = (folder / "adapter/adapter_config.json").read_bytes()
    weights = (folder / "adapter/adapter_model.safetensors").read_bytes()
    write_safetensors(folder / "layer", {f"fc.{k}": v for k, v in layer().state_dict().items()})
    write_torch(
        folder / "qmodel.pt", {"fc": raw_state(layer()), "norm": {"weight": torch.ones(4)}}
    )
    model = adapted()
    optimizer = torch.optim.AdamW(hqqlora.lora_parameters(model))
    model["fc"](torch.randn(2, K)).sum().backward()
    optimizer.step()
    progress = Progress([0.5], [1e-3], [1.0], [0.1], {"perplexity": {"dense": 3.0}})
    write_checkpoint(
        take_checkpoint({"bits": 4}, {"text": "ab"}, progress, model, optimizer, {}),
        folder / "checkpoint.pt",
    )

    def read_qmodel(path: Path) -> None:
        for state in read_module_states(path).values():
            if "W_q" in state:
                HQQLinear(None, None, device="meta").load_state_dict(state, assign=True)

    def resume(path: Path) -> None:
        made = adapted()
        restore(read_checkpoint(path), made, torch.optim.AdamW(hqqlora.lora_parameters(made)))

    def read_adapter(path: Path) -> None:
        hqqlora.load_adapter(nn.ModuleDict({"fc": layer()}), path.parent)

    index = {"metadata": {}, "weight_map": {"fc.weight": "model.safetensors"}}
    quant = {
        "quant_config": dict(BaseQuantizeConfig(4, 64)),
        "quant_method": "hqq",
        "skip_modules": ["lm_head"],
    }
    content = (folder / "layer").read_bytes()
    found = [
        Target(
            "safetensors header", "a.safetensors", content, read_header,
            mutate=change_safetensors,
        ),
        Target(
            "adapter weights", "adapter_model.safetensors", weights, read_adapter,
            mutate=change_safetensors, others={"adapter_config.json": config},
        ),
        Target(
            "adapter configuration", "adapter_config.json", config, read_adapter,
            mutate=change_json, others={"adapter_model.safetensors": weights},
        ),
        Target(
            "qmodel.pt", "qmodel.pt", (folder / "qmodel.pt").read_bytes(), read_qmodel,
            (ValueError, RuntimeError, OSError), change_torch,
        ),
        Target(
            "train's checkpoint", "checkpoint.pt", (folder / "checkpoint.pt").read_bytes(),
            resume, (RunError,), change_torch,
        ),
        Target(
            "index", "model.safetensors.index.json", json.dumps(index).encode(),
            lambda path: open_checkpoint(str(path.parent)), (RunError,), change_json,
            {"config.json": b"{}", "model.safetensors": content},
        ),
        Target(
            "config.json", "config.json", b'{"model_type": "llama", "a": [1]}',
            lambda path: open_checkpoint(str(path.parent)), (RunError,), change_json,
            {"model.safetensors": content},
        ),
        Target(
            "hqq's configuration", "q.json", json.dumps(quant["quant_config"]).encode(),
            lambda path: QuantSettings.parse(json.loads(path.read_bytes())),
            (ValueError, TypeError), change_json,
        ),
    ]  # fmt: skip
    return [*found, *_of_extras(folder, content, quant)]


def _of_extras(folder: Path, safetensors: bytes, quant: dict[str, Any]) -> list[Target]:
    """Readers that need transformers or gguf."""
    found = []
    try:
        import gguf

        from hqqlora.gguf.container import GGUFFile
    except ImportError:
        pass
    else:
        writer = gguf.GGUFWriter(folder / "a.gguf", "llama")
        writer.add_uint32("llama.block_count", 1)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "cd"])
        writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
        writer.add_tensor("a.weight", torch.ones(4, 32).numpy())
        writer.add_tensor("b.weight", torch.ones(8).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

        def read_gguf(path: Path) -> None:
            file = GGUFFile(path)
            for key in file.own_keys():
                file.entry(key)
            for tensor in file.tensors.values():
                tensor.rows(0, tensor.row_count)

        found.append(Target("GGUF", "a.gguf", (folder / "a.gguf").read_bytes(), read_gguf))
    try:
        from hqqlora.transformers import HqqConfig
        from hqqlora.transformers.checkpoint_layers import contents_of
    except ImportError:
        return found
    return [
        *found,
        Target(
            "quantization_config", "q.json", json.dumps(quant).encode(),
            lambda path: HqqConfig.from_dict(json.loads(path.read_bytes())),
            (ValueError, TypeError), change_json,
        ),
        Target(
            "quantized checkpoint", "a.safetensors", safetensors,
            lambda path: contents_of([str(path)]), mutate=change_safetensors,
        ),
    ]  # fmt: skip


# ---- running -----------------------------------------------------------------------------


def attempt(target: Target, content: bytes, folder: Path) -> str:
    """ "read", "refused", or what is wrong."""
    for name, data in {**target.others, target.file: content}.items():
        (folder / name).write_bytes(data)
    signal.alarm(SECONDS_EACH)
    try:
        target.read(folder / target.file)
    except target.raises:
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
    return "read"


def _limit() -> None:
    """For a process that reads: memory, and what it may not do."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def forbid(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            os.write(2, f"{event} {arguments}\n".encode())
            os._exit(99)

    sys.addaudithook(forbid)


def run_batch(
    target: Target, seed: int, count: int, folder: Path
) -> tuple[Counter[str], list[tuple[str, bytes]]]:
    """Outcomes of `count` inputs, and the wrong ones with their content."""
    outcomes: Counter[str] = Counter()
    wrong: list[tuple[str, bytes]] = []
    done = 0
    while done < count:
        generator = random.Random(f"{target.name} {seed} {done}")
        inputs = [target.changed(generator) for _ in range(min(BATCH, count - done))]
        answers = _in_child(target, inputs, folder)
        for content, answer in zip(inputs, answers, strict=False):
            outcomes[answer if answer in ("read", "refused") else "WRONG"] += 1
            if answer not in ("read", "refused"):
                wrong.append((answer, content))
        done += len(answers)
    return outcomes, wrong


def _in_child(target: Target, inputs: list[bytes], folder: Path) -> list[str]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            os.close(read)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            faulthandler.disable()
            torch.set_num_threads(1)
            _limit()
            for content in inputs:
                answer = attempt(target, content, folder).replace("\n", " ")
                os.write(write, (answer + "\n").encode("utf-8", "replace"))
        except BaseException:
            code = 98
        os._exit(code)
    os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace", newline="\n") as answers:
        found = answers.read().split("\n")[:-1]
    _, status = os.waitpid(child, 0)
    if status:
        ended = (
            signal.Signals(os.WTERMSIG(status)).name
            if os.WIFSIGNALED(status)
            else f"exit {status >> 8}"
        )
        found.append(f"died: {ended}")
    return found


def fuzz(seconds: float, seed: int, crashes: Path) -> bool:
    """Prints a table; whether all is well."""
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    sums: dict[str, Counter[str]] = {}
    bad: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="hqqlora-fuzz-") as place:
        folder = Path(place)
        (folder / "made").mkdir()
        all_targets = targets(folder / "made")
        turn = seed * 1_000_000
        while time.monotonic() < end:
            for target in all_targets:
                own = folder / "read"
                shutil.rmtree(own, ignore_errors=True)
                own.mkdir()
                outcomes, wrong = run_batch(target, turn, BATCH, own)
                sums.setdefault(target.name, Counter()).update(outcomes)
                for answer, content in wrong:
                    key = f"{target.name}: {answer[:160]}"
                    bad[key] += 1
                    if bad[key] == 1:
                        crashes.mkdir(parents=True, exist_ok=True)
                        (crashes / f"{target.name.replace(' ', '-')}-{len(bad)}").write_bytes(
                            content
                        )
            turn += 1
    print(f"{'':<26}{'inputs':>9}{'read':>9}{'refused':>9}{'wrong':>7}")
    for name, found in [*sums.items(), ("together", sum(sums.values(), Counter()))]:
        row = f"{found['read']:>9}{found['refused']:>9}{found['WRONG']:>7}"
        print(f"{name:<26}{sum(found.values()):>9}{row}")
    for key, count in bad.most_common():
        print(f"WRONG, {count} times: {key}")
    return not bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--crashes", type=Path, default=Path("build/fuzz-crashes"))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    sys.exit(not fuzz(options.seconds, options.seed, options.crashes))


if __name__ == "__main__":
    main()
