"""The loss curve as a PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqqlora.files import naming, replacing_file
from hqqlora.training.report import quantized_name


def draw_loss(log: Mapping[str, Any], path: Path) -> bool:
    """Draws the losses of `log` (see `report.build_log`) into `path`, atomically.

    Returns:
        False if matplotlib is not installed, and nothing was drawn.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    losses = [step["loss"] for step in log["steps"]]
    steps = range(1, len(losses) + 1)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.7", linewidth=1, label="training batch")
    axes.plot(steps, _smoothed(losses), color="tab:blue", label="training, mean of neighbours")
    name, held_out = quantized_name(log), log["held_out_loss"]
    if "dense" in held_out:
        axes.axhline(held_out["dense"], color="black", linestyle="--", label="held out: dense")
    axes.axhline(
        held_out["quantized"], color="tab:red", linestyle=":", label=f"held out: {name}"
    )
    measured = [(entry["step"], entry["loss"]) for entry in log["held_out_losses"]]
    axes.plot(
        *zip(*measured, (len(losses), held_out["fine_tuned"]), strict=True),
        marker="o",
        color="tab:green",
        label=f"held out: {name} + LoRA",
    )
    axes.set_xlabel(f"step ({log['training']['tokens_per_step']:,} tokens each)")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(log["model"]["name"], fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing_file(path) as temporary, naming(path):
        figure.savefig(temporary, format="png")
    return True


def _smoothed(values: list[float]) -> list[float]:
    """Means over about a tenth of the values around each, fewer at the ends."""
    reach = len(values) // 20 + 1
    parts = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
