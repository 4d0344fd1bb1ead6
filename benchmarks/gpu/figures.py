"""From seconds to what a table shows. Nothing here touches a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import report

RANK = 16
BYTES = 2  # of bf16 and fp16
Row = dict[str, Any]


def packed_bytes(N: int, K: int, nbits: int, group: int) -> float:
    """Codes, scale and zero in 16 bits. hqq's 3-bit words hold ten codes."""
    bits = 3.2 if nbits == 3 else nbits
    return N * K * (bits / 8 + 2 * BYTES / group)


def flops(op: str, M: int, N: int, K: int) -> float:
    """Multiplications and additions; 0 where an op has no product."""
    base, lora = 2.0 * M * N * K, 2.0 * M * (N + K) * RANK
    return {
        "linear": base,
        "linear_dgrad": base,
        "lora_linear": base + lora,
        "lora_linear_backward": base + 2 * lora,
        "lora_step": 2 * base + 3 * lora,
    }.get(op, 0.0)


def least_bytes(op: str, M: int, N: int, K: int, nbits: int, group: int) -> float:
    """What must at least move between memory and the device, each tensor once a pass."""
    weight = packed_bytes(N, K, nbits, group)
    rows = BYTES * M * (N + K)
    adapter = BYTES * RANK * (N + K)
    return {
        "linear": weight + rows,
        "linear_dgrad": weight + rows,
        "lora_linear": weight + rows + adapter,
        "lora_linear_backward": weight + rows + BYTES * M * K + 2 * adapter,
        "lora_step": 2 * weight + 2 * rows + BYTES * M * K + 3 * adapter,
        "dequantize": weight + BYTES * N * K,
        "quantize": weight + BYTES * N * K,
    }[op]


def device_key(name: str, known: Sequence[str]) -> str | None:
    """Which of the devices that predictions know this is: "NVIDIA H100 80GB HBM3" is "H100"."""
    return next((key for key in known if key.lower() in name.lower()), None)


def predicted(
    predictions: Sequence[Mapping[str, Any]], device: str, op: str, N: int, K: int, M: int
) -> float | None:
    """Seconds, from the static report's JSON (axis 1)."""
    key = device_key(device, sorted({p["device"] for p in predictions}))
    for p in predictions:
        asked = (key, op, N, K, M, 1)
        if (p["device"], p["operation"], p["N"], p["K"], p["M"], p.get("axis", 1)) == asked:
            return float(p["seconds"])
    return None


def microseconds(seconds: float | None) -> str:
    """Three significant digits."""
    if seconds is None:
        return ""
    value = seconds * 1e6
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _line(row: Row, peers: Sequence[str]) -> list[str]:
    seconds, ratio = row["seconds"], row["ratio"]
    ours = seconds["hqqlora"]
    medians = [microseconds(seconds[p]["q50"]) if p in seconds else "" for p in peers]
    return [
        f"{row['N']} x {row['K']}",
        str(row["M"] or ""),
        microseconds(ours["q50"]),
        f"{microseconds(ours['q20'])} .. {microseconds(ours['q80'])}",
        microseconds(row["predicted"]),
        f"{row['tflops']:.3g}" if row["tflops"] else "",
        f"{row['gbytes']:.0f}",
        microseconds(row["host_seconds"]),
        *medians,
        *(report.times_faster(ratio[p]) if p in ratio else "" for p in peers),
    ]


def table_of(op: str, rows: Sequence[Row]) -> str:
    """All rows of one op, as Markdown."""
    names = {name for row in rows for name in row["seconds"]}
    peers = [p for p in PEER_ORDER if p in names]
    header = ["weight", "M", "hqqlora us", "20 .. 80 %", "predicted us", "TFLOP/s", "GB/s"]
    header += ["host us", *(f"{p} us" for p in peers)]
    header += [f"vs {p}" for p in peers]
    return f"### {op}\n\n{report.markdown([_line(row, peers) for row in rows], header)}"


PEER_ORDER = ("dense", "hqq", "bitsandbytes", "hqqlora axis 0", "hqqlora minmax")


def document(
    heading: str,
    nbits: int,
    rows: Sequence[Row],
    left_out: Sequence[str],
    failed: Sequence[str],
) -> str:
    """The whole report: one table an op, in the order of the rows."""
    parts = ["# hqqlora on a GPU", heading, LEGEND.format(nbits=nbits)]
    for op in dict.fromkeys(row["op"] for row in rows):
        parts.append(table_of(op, [row for row in rows if row["op"] == op]))
    if failed:
        parts.append("### Failed\n\n" + "\n".join(f"- {line}" for line in failed))
    if left_out:
        parts.append("### Left out, for want of time\n\n" + ", ".join(left_out))
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "{nbits} bits, groups of 64, random data. Microseconds are medians between events on the "
    "device; before each run the L2 cache is flushed. Contenders take turns; `vs` is the "
    "median over the rounds of the rival's time over hqqlora's, above 1 where hqqlora is "
    "faster. TFLOP/s and GB/s are hqqlora's, over the product's operations and the bytes that "
    "must move at least. `host us` is what a call costs the host. `predicted` is the static "
    "report's."
)
