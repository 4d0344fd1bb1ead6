"""The picture of `hqqlora info`: where the bytes are, and how each layer fares."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqqlora.command.units import in_units
from hqqlora.files import naming, replacing_file
from hqqlora.info_command.contents import Contents
from hqqlora.info_command.table import totals
from hqqlora.module_names import numbers_as_stars

_SMALLEST = 0.004  # of the whole: kinds of tensors below that share one bar
_BITS = {8: "#08306b", 4: "#2171b5", 3: "#4a98c9", 2: "#7fb9da", 1: "#b3d3e8"}
_DENSE, _ADAPTER, _UNKNOWN = "0.72", "tab:green", "tab:purple"


def draw(
    contents: Contents, errors: Mapping[str, float] | None, path: Path, title: str
) -> None:
    """Draws `contents` into the PNG file `path`, atomically.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = _bars(contents)
    columns = 2 if contents.layers else 1
    height = max(3.6, 1.3 + 0.3 * len(bars))
    figure = Figure(figsize=(6.5 * columns, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    _draw_sizes(axes[0], bars)
    if contents.layers:
        _draw_layers(axes[1], contents, errors)
    figure.suptitle(_title(contents, title), fontsize=11)
    with replacing_file(path, follow_link=True) as temporary, naming(path):
        figure.savefig(temporary, format="png")


def _title(contents: Contents, name: str) -> str:
    sums = totals(contents)
    size = sums["quantized_bytes"] + sums["dense_bytes"] + sums["adapter_bytes"]
    bits = sums["bits_per_weight"]
    each = "" if bits is None else f", {bits:.2f} bits a quantized weight"
    return f"{name}: {contents.kind}, {in_units(size)}{each}"


def _bars(contents: Contents) -> list[tuple[str, int, str, str]]:
    """(name, bytes, colour, what it is), the largest first."""
    kinds: dict[tuple[str, str, str], int] = {}
    for layer in contents.layers:
        bits = None if layer.metadata is None else layer.metadata.settings.nbits
        colour = _UNKNOWN if bits is None else _BITS[bits]
        key = (numbers_as_stars(layer.name), colour, "?" if bits is None else f"{bits} bits")
        kinds[key] = kinds.get(key, 0) + layer.nbytes
    for tensor in contents.dense:
        key = (numbers_as_stars(tensor.name), _DENSE, "dense")
        kinds[key] = kinds.get(key, 0) + tensor.nbytes
    for adapter in contents.adapter:
        key = (numbers_as_stars(adapter.name), _ADAPTER, "adapter")
        kinds[key] = kinds.get(key, 0) + adapter.nbytes
    whole = sum(kinds.values())
    rows = [(n, size, c, w) for (n, c, w), size in kinds.items() if size >= _SMALLEST * whole]
    small = [size for size in kinds.values() if size < _SMALLEST * whole]
    rows.sort(key=lambda row: -row[1])
    if small:
        rows.append((f"{len(small)} other kinds", sum(small), _DENSE, "dense"))
    return rows


def _draw_sizes(axes: Any, bars: list[tuple[str, int, str, str]]) -> None:
    unit, name = (1e9, "GB") if max(size for _, size, _, _ in bars) >= 1e9 else (1e6, "MB")
    places = range(len(bars))
    drawn = axes.barh(
        places,
        [size / unit for _, size, _, _ in bars],
        color=[colour for _, _, colour, _ in bars],
    )
    whole = sum(size for _, size, _, _ in bars)
    labels = [f" {_share(size / whole)}  {what}" for _, size, _, what in bars]
    axes.bar_label(drawn, labels, fontsize=8)
    axes.set_yticks(places, [_short(name) for name, _, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"size ({name})")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_layers(axes: Any, contents: Contents, errors: Mapping[str, float] | None) -> None:
    """A line for each kind of layer, along the depth of the model."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    lines: dict[str, list[tuple[int, float]]] = {}
    for position, layer in enumerate(contents.layers):
        value = layer.bits_per_weight if errors is None else errors.get(layer.name)
        number = re.search(r"\.(\d+)\.", layer.name)
        depth = int(number[1]) if number else position
        if value is not None:
            lines.setdefault(numbers_as_stars(layer.name), []).append((depth, value))
    for style, (name, points) in enumerate(lines.items()):
        points.sort()
        axes.plot(
            [depth for depth, _ in points],
            [value for _, value in points],
            marker="osD^vPX"[style % 7],
            markersize=4,
            linewidth=1.2,
            color=f"C{style % 10}",
            label=_short(name),
        )
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if errors is None:
        axes.set_ylabel("bits a weight, with scales and zeros")
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylabel("relative error |W - Q| / |W|")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if lines:
        axes.legend(fontsize=8, loc="best", ncols=2 if len(lines) > 4 else 1)


def _share(part: float) -> str:
    return "<1%" if part < 0.005 else f"{part:.0%}"


def _short(name: str) -> str:
    """A name without what all of a model's have in common."""
    for prefix in ("base_model.", "model.", "layers.", "*."):
        name = name.removeprefix(prefix)
    return name
