"""What a run reports: the table at its end, and the JSON log that holds everything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hqqlora.command.machine import describe_machine
from hqqlora.files import write_json
from hqqlora.training.checkpoint import Progress


def build_log(
    options: dict[str, Any], progress: Progress, tokens: Sequence[int]
) -> dict[str, Any]:
    """Everything about a finished run as plain values; `tokens` are those of each step."""
    training = sum(progress.seconds)
    seconds = {**progress.facts["seconds"], "train": training}
    steps = [
        {
            "step": i + 1,
            "loss": progress.losses[i],
            "learning_rate": progress.rates[i],
            "gradient_norm": progress.norms[i],
            "seconds": progress.seconds[i],
            "tokens_per_second": tokens[i] / progress.seconds[i],
        }
        for i in range(progress.step)
    ]
    return {
        "options": options,
        "machine": describe_machine(),
        **progress.facts,
        "seconds": seconds,
        "training": {
            "steps": progress.step,
            "tokens_per_step": round(sum(tokens) / progress.step),
            "seconds": training,
            "tokens_per_second": sum(tokens) / training,
        },
        "steps": steps,
        "held_out_losses": [
            {"step": step, "loss": loss}
            for step, loss in zip(
                progress.measured_after, progress.held_out_losses, strict=True
            )
        ],
    }


def write_log(log: Mapping[str, Any], path: Path) -> None:
    """Writes the log as JSON, atomically.

    Raises:
        OSError: it cannot be written.
    """
    write_json(path, log)


def best_step(log: Mapping[str, Any]) -> int | None:
    """The step after which the held-out loss was lowest; None if that was the last one, or
    nothing was measured between steps."""
    measured = log.get("held_out_losses")  # which older logs have not
    if not measured:
        return None
    best = min(measured, key=lambda entry: entry["loss"])
    return best["step"] if best["loss"] < log["held_out_loss"]["fine_tuned"] else None


def quantized_name(log: Mapping[str, Any]) -> str:
    """What to call the quantized model: by its bits, if it was this run that quantized it."""
    return f"{log['options']['bits']}-bit" if "dense" in log["perplexity"] else "quantized"


def format_table(log: Mapping[str, Any]) -> str:
    """The table that a run ends with."""
    layers, perplexity = log["linear_layers"], log["perplexity"]
    memory, training = log["memory"], log["training"]
    now = quantized_name(log)
    columns = [("", "bits per weight", "linear layers, MB", "held-out perplexity")]
    if "dense" in perplexity:
        columns.append(
            (
                "dense",
                f"{layers['dense_bits_per_weight']:.2f}",
                f"{layers['dense_bytes'] / 1e6:.1f}",
                _perplexity(perplexity["dense"]),
            )
        )
    columns += [
        (
            now,
            f"{layers['bits_per_weight']:.2f}",
            f"{layers['quantized_bytes'] / 1e6:.1f}",
            _perplexity(perplexity["quantized"]),
        ),
        (
            f"{now} + LoRA",
            "",
            f"+ {layers['adapter_bytes'] / 1e6:.1f}",
            _perplexity(perplexity["fine_tuned"]),
        ),
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for name, *cells in zip(*columns, strict=True):
        row = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join([f"{name:<{widths[0]}}", *row]).rstrip())
    lines.insert(1, "-" * (sum(widths) + 3 * (len(widths) - 1)))
    best = best_step(log)
    if best is not None:
        lines += ["", f"held-out perplexity was lowest after step {best}: {_lowest(log)}"]
    lines += [
        "",
        f"perplexity over {perplexity['tokens']:,} held-out tokens; training: "
        f"{training['steps']} steps of {training['tokens_per_step']:,} tokens in "
        f"{training['seconds']:.0f} s, {training['tokens_per_second']:,.0f} tokens/s",
        f"peak memory: {_gigabytes(memory['before_training'])} GB up to the quantized model, "
        f"{_gigabytes(memory['training'])} GB in training",
        "time: " + ", ".join(f"{k} {v:.0f} s" for k, v in log["seconds"].items()),
    ]
    return "\n".join(lines)


def _lowest(log: Mapping[str, Any]) -> str:
    return _perplexity(math.exp(min(entry["loss"] for entry in log["held_out_losses"])))


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}"
