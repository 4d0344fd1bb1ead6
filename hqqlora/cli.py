"""The command line: `hqqlora train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import hqqlora
from hqqlora.training.errors import RunError, describe
from hqqlora.training.options import OneLineParser, add_arguments, from_namespace
from hqqlora.training.thread_waiting import wait_asleep_if_busy


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 1 (it failed), 2 (bad usage), 130 (stopped).

    Args:
        argv: the arguments; None: those of the process.
    """
    try:
        arguments = _parser().parse_args(argv)
        options, given = from_namespace(arguments)
        if argv is None and options.threads != 1:
            wait_asleep_if_busy()
        from hqqlora.training.job import run  # after the options: it loads much

        run(options, given)
    except RunError as error:
        print(f"hqqlora train: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"hqqlora train: {describe(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        print(
            "hqqlora train: out of memory; a smaller --batch or --sequence-length, or "
            "--gradient-checkpointing, needs less",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("hqqlora train: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="hqqlora", description="LoRA fine-tuning on frozen low-bit HQQ weights."
    )
    parser.add_argument("--version", action="version", version=f"hqqlora {hqqlora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    train = commands.add_parser(
        "train",
        help="fine-tune a language model with LoRA on quantized weights",
        description="Quantizes the linear layers of a language model, trains a LoRA adapter on "
        "them with a text, and compares held-out perplexity before and after. Without options: "
        "SmolLM2-135M-Instruct in 4 bits on the Python language reference.",
    )
    add_arguments(train)
    return parser


if __name__ == "__main__":
    sys.exit(main())
