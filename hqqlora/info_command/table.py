"""The table of `hqqlora info`, and the same as plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hqqlora.command.units import in_units
from hqqlora.info_command.contents import Contents, DenseTensor, QuantizedLayer
from hqqlora.module_names import numbers_as_stars

_ERROR = "error"


def as_values(contents: Contents, errors: Mapping[str, float] | None) -> dict[str, Any]:
    """Everything, for JSON."""
    values: dict[str, Any] = {"kind": contents.kind, **totals(contents)}
    values["layers"] = [
        {
            "name": layer.name,
            "shape": None if (m := layer.metadata) is None else layer.shape,
            "bits": None if m is None else m.settings.nbits,
            "group_size": None if m is None else m.group_size,
            "axis": None if m is None else m.settings.axis,
            "bytes": layer.nbytes,
            "bits_per_weight": layer.bits_per_weight,
            **({} if errors is None else {"relative_error": errors.get(layer.name)}),
        }
        for layer in contents.layers
    ]
    values["dense"] = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "bytes": tensor.nbytes,
            "note": tensor.note or None,
        }
        for tensor in contents.dense
    ]
    values["adapter"] = [
        {
            "name": layer.name,
            "shape": list(layer.shape),
            "rank": layer.rank,
            "parameters": layer.parameters,
            "bytes": layer.nbytes,
        }
        for layer in contents.adapter
    ]
    return values


def totals(contents: Contents) -> dict[str, Any]:
    """Sums over all layers."""
    quantized = sum(layer.nbytes for layer in contents.layers)
    known = [layer for layer in contents.layers if layer.numel is not None]
    weights = sum(layer.numel or 0 for layer in known)
    dense = sum(tensor.nbytes for tensor in contents.dense)
    return {
        "quantized_weights": weights,
        "quantized_bytes": quantized,
        "bits_per_weight": 8 * sum(layer.nbytes for layer in known) / weights
        if weights
        else None,
        "dense_bytes": dense,
        "adapter_parameters": sum(layer.parameters for layer in contents.adapter),
        "adapter_bytes": sum(layer.nbytes for layer in contents.adapter),
    }


def format_contents(
    contents: Contents, errors: Mapping[str, float] | None, every_layer: bool
) -> str:
    """The table: a row for each kind of layer, or for every layer."""
    parts = []
    if contents.layers:
        parts.append(_quantized(contents, errors, every_layer))
    if contents.dense:
        parts.append(_dense(contents.dense, every_layer))
    if contents.adapter:
        parts.append(_adapter(contents, every_layer))
    parts.append(_summary(contents))
    return "\n\n".join(parts)


def _quantized(contents: Contents, errors: Mapping[str, float] | None, every: bool) -> str:
    head = ["quantized", "layers", "shape", "bits", "group", "axis", "bits/weight", "size"]
    rows = [head if errors is None else [*head, _ERROR, "worst"]]
    for name, layers in _kinds(contents.layers, every).items():
        row = [name, str(len(layers)), *_format(layers[0]), _sum(layers)]
        if errors is not None:
            found = [errors[layer.name] for layer in layers if layer.name in errors]
            mean = sum(found) / len(found) if found else None
            row += [_percent(mean), _percent(max(found, default=None))]
        rows.append(row)
    return _aligned(rows)


def _kinds(layers: Sequence[QuantizedLayer], every: bool) -> dict[str, list[QuantizedLayer]]:
    """Layers of one kind have one name but for numbers, and one format and shape."""
    kinds: dict[tuple[str, ...], list[QuantizedLayer]] = {}
    for layer in layers:
        name = layer.name if every else numbers_as_stars(layer.name)
        kinds.setdefault((name, *_format(layer)), []).append(layer)
    named: dict[str, list[QuantizedLayer]] = {}
    for (name, *_), members in kinds.items():
        label = name
        if name in named:  # layers of this name in another format: the first one's number
            label = f"{name} (from {members[0].name})"
        named[label] = members
    return named


def _format(layer: QuantizedLayer) -> list[str]:
    m = layer.metadata
    if m is None or layer.shape is None:
        return ["?", "?", "?", "?", "?"]
    return [
        " x ".join(map(str, layer.shape)),
        str(m.settings.nbits),
        str(m.group_size),
        str(m.settings.axis),
        f"{layer.bits_per_weight:.2f}",
    ]


def _dense(tensors: Sequence[DenseTensor], every: bool) -> str:
    kinds: dict[tuple[str, str, str, str], list[DenseTensor]] = {}
    for tensor in tensors:
        name = tensor.name if every else numbers_as_stars(tensor.name)
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        kinds.setdefault((name, shape, dtype, tensor.note), []).append(tensor)
    rows = [["dense", "tensors", "shape", "dtype", "size", ""]]
    rows += [
        [name, str(len(members)), shape, dtype, _sum(members), note]
        for (name, shape, dtype, note), members in kinds.items()
    ]
    return _aligned(rows)


def _adapter(contents: Contents, every: bool) -> str:
    kinds: dict[tuple[str, int, tuple[int, int]], list[Any]] = {}
    for layer in contents.adapter:
        name = layer.name if every else numbers_as_stars(layer.name)
        kinds.setdefault((name, layer.rank, layer.shape), []).append(layer)
    rows = [["adapter", "layers", "shape", "rank", "parameters", "size"]]
    rows += [
        [
            name,
            str(len(members)),
            f"{shape[0]} x {shape[1]}",
            str(rank),
            f"{sum(member.parameters for member in members):,}",
            _sum(members),
        ]
        for (name, rank, shape), members in kinds.items()
    ]
    return _aligned(rows)


def _summary(contents: Contents) -> str:
    sums = totals(contents)
    lines = []
    if contents.layers:
        bits = sums["bits_per_weight"]
        each = "" if bits is None else f", {bits:.2f} bits a weight"
        lines.append(
            f"quantized: {len(contents.layers)} layers, {sums['quantized_weights'] / 1e6:,.1f} "
            f"M weights, {in_units(sums['quantized_bytes'])}{each}"
        )
    if contents.dense:
        size = sums["dense_bytes"]
        share = f", {size / (size + sums['quantized_bytes']):.0%} of the model"
        lines.append(f"dense: {len(contents.dense)} tensors, {in_units(size)}{share}")
        experts = [tensor for tensor in contents.dense if tensor.note]
        if experts:
            size = sum(tensor.nbytes for tensor in experts)
            lines.append(
                f"of these, {len(experts)} could be expected to be quantized and are not: "
                f"{in_units(size)}, such as {experts[0].name}"
            )
    if contents.adapter:
        config = contents.adapter_config or {}
        lines.append(
            f"LoRA adapter: {len(contents.adapter)} layers, "
            f"{sums['adapter_parameters']:,} parameters, {in_units(sums['adapter_bytes'])}, "
            f"alpha {config.get('lora_alpha')}"
            + (", rsLoRA" if config.get("use_rslora") else "")
            + (f", of {base}" if (base := config.get("base_model_name_or_path")) else "")
        )
    return "\n".join(lines)


def _sum(members: Iterable[Any]) -> str:
    size = sum(member.nbytes for member in members)
    return f"{size / 1e3:,.1f} kB" if size < 1e5 else in_units(size)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        # names and notes to the left, numbers to the right
        row = [f"{name:<{widths[0]}}"]
        for cell, head, width in zip(cells, rows[0][1:], widths[1:], strict=True):
            row.append(f"{cell:>{width}}" if head else cell)
        lines.append("  ".join(row).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
