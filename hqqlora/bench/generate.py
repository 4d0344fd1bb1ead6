"""`hqqlora bench generate`: greedy generation, one sequence with a cache, contenders in turns.

Each step multiplies every weight with one token, so that reading the weights takes the time.
All contenders come from the same dense weights and run transformers' own ``generate``, with all
that it does in Python between two steps. Without ``--model`` the weights are random: what is
generated means nothing, and takes the same time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hqqlora
from hqqlora.bench.contenders import (
    AXIS,
    GROUP_SIZE,
    NBITS,
    SEED,
    check_operations,
    quantize_with_hqqlora,
)
from hqqlora.bench.report import check_writable, describe_bench_machine, machine_lines
from hqqlora.bench.rounds import Rounds
from hqqlora.bench.table import aligned, seconds_text
from hqqlora.command.errors import RunError, UsageError, explaining
from hqqlora.command.model_source import choose_dtype, find_model, load_dense_model
from hqqlora.command.options import DTYPES, non_negative_integer, positive_integer
from hqqlora.command.packages import require
from hqqlora.command.thread_waiting import busy_fraction
from hqqlora.files import write_json

CONTENDERS = {
    "hqqlora": "hqqlora's quantize_model",
    "dense": "the dense model as it is",
    "hqq": "hqq's layers, with its default backend and hqqlora's codes",
}
TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}


class Generated(NamedTuple):
    """One run: what was generated [tokens], seconds to its first token, and for each other."""

    ids: Tensor
    first_token: float
    token: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""

    def add(name: str, help: str, default: Any, **argument: Any) -> None:
        parser.add_argument(
            name, default=default, help=f"{help} (default: %(default)s)", **argument
        )

    parser.add_argument(
        "--model",
        metavar="PATH",
        help="folder of a Hugging Face model, or a .gguf file (default: random weights in "
        "TinyLlama's shapes)",
    )
    add("--dtype", "of the dense weights and of all computation", "auto", choices=DTYPES)
    add("--prompt", "tokens of the prompt, which are random", 16, type=positive_integer)
    add("--tokens", "tokens to generate, at least 2", 64, type=positive_integer)
    add("--rounds", "turns of each contender", 5, type=positive_integer)
    add("--threads", "threads; 0: one a core", 0, type=non_negative_integer)
    what = "; ".join(f"{name}: {meaning}" for name, meaning in CONTENDERS.items())
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=tuple(CONTENDERS),
        default=["hqqlora", "dense"],
        metavar="NAME",
        help=f"who takes part; times are compared with the first's ({what}; default: hqqlora "
        "and dense: hqq takes seconds for each token)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")


def run(options: argparse.Namespace) -> None:
    """Measures, prints the table, and writes the JSON file if there is to be one.

    Raises:
        RunError: a one-line reason to stop; see `exit_code` there.
    """
    names: list[str] = options.contenders
    _check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    dense, model_name = _dense_model(options.model, choose_dtype(options.dtype))
    longest = getattr(dense.config, "max_position_embeddings", None)
    if longest is not None and options.prompt + options.tokens > longest:
        raise UsageError(f"--prompt and --tokens together exceed the model's {longest}")
    description = _describe_model(model_name, dense)
    models = {name: make_contender(name, dense) for name in names if name != "dense"}
    if "dense" in names:
        models["dense"] = dense  # (a contender's copy of the output layer is its own)
    del dense
    busy = busy_fraction()
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, options.prompt)
    prompt = torch.randint(description["vocabulary"], shape, generator=generator)
    found = take_turns({name: models[name] for name in names}, prompt, options)
    result = {
        "options": vars(options),
        "model": description,
        "machine": {**describe_bench_machine(), "busy_before": busy},
        "contenders": {name: _figures(name, names[0], models[name], *found) for name in names},
        "rounds": {"token": found[0].seconds, "first_token": found[1].seconds},
    }
    print(format_table(result), flush=True)
    if options.json is not None:
        write_json(options.json, result, follow_link=True)


# ---- the contenders ----------------------------------------------------------------------


def make_contender(name: str, dense: nn.Module) -> nn.Module:
    """`name`'s model, from a copy of `dense`.

    Raises:
        RunError: its layers cannot be made, or do not run the operators that it stands for.
    """
    model = copy.deepcopy(dense)
    with explaining(f"{name}: cannot quantize", RunError):
        quantize_with_hqqlora(model, ())
    layers = [n for n, m in model.named_modules() if isinstance(m, hqqlora.HQQLinear)]
    if name == "hqq":
        for layer in layers:
            quantized: Any = model.get_submodule(layer)
            with explaining(f"{name}: cannot make its layers", RunError):
                model.set_submodule(layer, quantized.to_hqq())
    check_operations(name, model, {} if name == "hqq" else {"linear": len(layers)})
    return model


def _dense_model(path: str | None, dtype: torch.dtype) -> tuple[Any, str]:
    """The dense model, in evaluation mode, and its name."""
    if path is not None:
        source = find_model(path)
        return load_dense_model(source, dtype), source.name
    require("transformers")
    with explaining("cannot make a Llama"):
        import transformers

        torch.manual_seed(SEED)
        config = transformers.LlamaConfig(**TINYLLAMA)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval(), "random weights, TinyLlama's shapes"


# ---- measuring ---------------------------------------------------------------------------


class _Clock:
    """A streamer for ``generate``: when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """There is nothing left to do."""


def generate(model: Any, prompt: Tensor, tokens: int) -> Generated:
    """Generates `tokens` tokens after prompt [1, length], whatever they are.

    Raises:
        RunError: the model ended before.
    """
    from transformers import GenerationConfig

    clock = _Clock()
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=tokens, use_cache=True, pad_token_id=0
    )
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock)
    ids = ids[0, prompt.shape[1] :]
    if len(ids) != tokens or len(clock.times) != 1 + tokens:
        raise RunError(f"{len(ids)} tokens were generated instead of {tokens}")
    begin, first, *_, last = clock.times
    return Generated(ids, first - begin, (last - first) / (tokens - 1))


def take_turns(
    models: Mapping[str, nn.Module], prompt: Tensor, options: argparse.Namespace
) -> tuple[Rounds, Rounds]:
    """Seconds a token and seconds to the first, in rounds that each begin with another
    contender, after two tokens of each that are not timed."""
    names = list(models)
    token, first_token = Rounds(), Rounds()
    for model in models.values():
        generate(model, prompt, 2)
    total = options.rounds * len(names)
    with tqdm(desc="runs", total=total, mininterval=0.5, dynamic_ncols=True) as bar:
        for i in range(options.rounds):
            turn = i % len(names)
            found = {}
            for name in [*names[turn:], *names[:turn]]:
                found[name] = generate(models[name], prompt, options.tokens)
                bar.update()
            token.seconds.append({name: run.token for name, run in found.items()})
            first_token.seconds.append({name: run.first_token for name, run in found.items()})
    return token, first_token


def _figures(
    name: str, base: str, model: nn.Module, token: Rounds, first_token: Rounds
) -> dict[str, Any]:
    return {
        "meaning": CONTENDERS[name],
        "weight_bytes": weight_bytes(model),
        "first_token_seconds": first_token.median(name),
        "token_seconds": {
            "median": token.median(name),
            "q20": token.quantile(name, 0.2),
            "q80": token.quantile(name, 0.8),
        },
        "tokens_per_second": statistics.median(1 / times[name] for times in token.seconds),
        "ratio": token.ratio(name, base),
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights that a token is multiplied with: not those of the embeddings, of
    which it reads one row. What is shared counts once."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    skipped = {id(p) for m in embeddings for p in m.parameters()}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        skipped -= {id(p) for p in head.parameters()}
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        meta = getattr(module, "meta", None)  # hqq's layers keep scale and zero there
        if isinstance(meta, Mapping):
            own += [value for value in meta.values() if isinstance(value, Tensor)]
        tensors.update((id(value), value) for value in own if id(value) not in skipped)
    return sum(value.nbytes for value in {t.data_ptr(): t for t in tensors.values()}.values())


# ---- what is printed ---------------------------------------------------------------------


_COLUMNS = (
    ("", ""),
    ("first", "s"),
    ("token", "s"),
    ("tokens", "/s"),
    ("ratio", ""),
    ("weights", "MB"),
)


def format_table(result: Mapping[str, Any]) -> str:
    """What was measured, as text with aligned columns, from the plain values of the JSON."""
    options, model = result["options"], result["model"]
    names = list(result["contenders"])
    lines = [
        f"model    {model['name']}, {model['dtype']}: {model['parameters'] / 1e6:,.0f} million "
        f"parameters, {model['linear_layers']} linear layers quantized to {model['format']}; "
        "the output layer is dense",
        f"work     one sequence, greedy: {options['tokens']} tokens after {options['prompt']}",
        *machine_lines(result["machine"]),
        "",
        *aligned(
            list(zip(*_COLUMNS, strict=True)),
            [_row(name, result["contenders"][name]) for name in names],
        ),
        "",
        *(f"{name}: {result['contenders'][name]['meaning']}" for name in names),
        f"first s: until the prompt's logits give the first token; token s: each after that, "
        f"median of {options['rounds']} rounds in which all take turns",
        f"ratio: median of the ratios of token s to {names[0]}'s in the same round; "
        "weights MB: what a token is multiplied with",
    ]
    return "\n".join(lines)


def _row(name: str, figures: Mapping[str, Any]) -> Sequence[str]:
    return [
        name,
        seconds_text(figures["first_token_seconds"]),
        seconds_text(figures["token_seconds"]["median"]),
        f"{figures['tokens_per_second']:,.1f}",
        f"{figures['ratio']:.2f}",
        f"{figures['weight_bytes'] / 1e6:,.0f}",
    ]


def _describe_model(name: str, dense: Any) -> dict[str, Any]:
    head = dense.get_output_embeddings()
    layers = [m for m in dense.modules() if type(m) is nn.Linear and m is not head]
    return {
        "name": name,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in dense.parameters()),
        "linear_layers": len(layers),
        "vocabulary": int(dense.get_input_embeddings().weight.shape[0]),
        "format": f"{NBITS} bits, groups of {GROUP_SIZE}, axis {AXIS}",
    }


def _check(options: argparse.Namespace) -> None:
    if len(set(options.contenders)) < len(options.contenders):
        raise UsageError("argument --contenders: each only once")
    if options.tokens < 2:
        raise UsageError("argument --tokens: at least 2 are needed to time one")
    if "hqq" in options.contenders:
        require("hqq")
    check_writable(options.json)
