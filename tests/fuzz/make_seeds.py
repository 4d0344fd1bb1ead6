"""Writes the fuzzer's first inputs, one for each corner: python make_seeds.py FOLDER

An input is the fields of fields.def, one behind the other; decode.h says what they mean.
Each seed is a sound call (`SOUND`) of one entry point with a few fields changed, and its name
says which. Inputs that once crashed are kept beside them under names that begin with `crash-`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent


def names(file: str, pattern: str) -> list[tuple[str, str]]:
    """What the C sources list, so that it is listed there alone."""
    return [
        (m[1], m[m.lastindex or 1])
        for m in re.finditer(pattern, (HERE / file).read_text(), re.M)
    ]


FIELDS = {name: int(size) for name, size in names("fields.def", r"^FIELD\((\w+), (\d)\)")}
ENTRIES = [name for name, _ in names("entries.c", r'^    \{"(\w+)", ')]
POINTERS = [name for name, _ in names("buffers.h", r"^    ([A-Z_]+),$")]
ISAS = range(1, len(names("../../c_api/hqqlora.h", r"^    (HQQ_ISA_\w+) =")))
KERNELS = range(1, len(names("../../c_api/hqqlora.h", r"^    (HQQ_KERNEL_\w+) =")))

NBITS = {8: 0, 4: 1, 3: 2, 2: 3, 1: 4}
G_K, G_N, G_8, G_64, G_ALL = 1, 2, 0, 3, 16  # of decode_group_size
LIMITS = [0xE000 + 256 * i for i in range(16)]  # of decode_size
OFF_ENUM, OFF_FLOAT = 0xF0, 0xE0
SOUND = {"nbits": 1, "axis": 1, "N": 12, "K": 32, "G": G_8, "M": 3, "rank": 2, "lora_dtype": 3,
         "experts": 3, "seed": 7}  # fmt: skip

# what is changed for every entry point; later ones for those that it means something to
SHAPES = {
    **{f"{bits}-bits-axis-{axis}": {"nbits": code, "axis": axis}
       for bits, code in NBITS.items() for axis in (0, 1)},
    "no-rows": {"N": 0},
    "no-columns": {"K": 0},
    "nothing": {"N": 0, "K": 0},
    "odd": {"N": 13, "K": 35, "G": G_K},
    "one-group": {"N": 5, "K": 7, "G": G_ALL},
    "groups-across-rows": {"N": 12, "K": 36, "G": G_8},
    "group-does-not-divide": {"N": 13, "K": 35},
    "group-0": {"G": 0xA000},
    "group-negative": {"G": 0xE000},
    "bits-5": {"nbits": OFF_ENUM + 1},
    "axis-2": {"axis": OFF_ENUM},
    "meta-dtype-3": {"meta_dtype": OFF_ENUM + 1},
    "rows-negative": {"N": 0xE000},
    "rows-largest": {"N": LIMITS[1] + 4},
    "rows-largest-no-columns": {"N": LIMITS[1] + 4, "K": 0},
    "columns-largest-no-rows": {"K": LIMITS[1] + 4, "N": 0},
    "rows-times-columns-overflow": {"N": LIMITS[5] + 2, "K": LIMITS[5] + 2},
    "two-to-the-56": {"N": LIMITS[8] + 2, "K": 1, "G": 6},
}  # fmt: skip
CONTEXTS = {
    "context-null": {"callbacks": 0xF0},
    **{f"isa-{i}": {"isa": i} for i in ISAS},
    "isa-none": {"isa": OFF_ENUM},
    "kernel-none": {"kernel": OFF_ENUM},
    "pointers-null": {"null": 0xFFFFFF},
    "pointers-misaligned": {"misaligned": 0xFFFFFF},
    "values-any-bits": {"values": 1},
    "values-all-ones": {"values": 9},
}
PRODUCTS = {
    **{f"kernel-{k}-dtype-{d}": {"kernel": k, "dtype": d, "N": 64, "K": 96, "M": 9}
       for k in KERNELS for d in range(3)},
    "half-lora-odd": {"dtype": 1, "N": 33, "K": 50, "G": 14, "M": 17, "rank": 5},
    "many-rows": {"M": 200, "kernel": 4},
    "no-tokens": {"M": 0},
    "tokens-negative": {"M": 0xE000},
    "tokens-largest": {"M": LIMITS[1] + 4},
    "tokens-largest-of-nothing": {"M": LIMITS[1] + 4, "N": 0, "K": 0},
    "parallel-for-fails": {"callbacks": 2, "M": 40},
    "gemm-fails": {"callbacks": 8, "kernel": 3},
    "gemm-lent": {"callbacks": 5, "kernel": 3, "M": 20},
    **{f"stride-{i}": {"stride": 0x40 + i} for i in range(12)},
    **{f"workspace-{i}": {"workspace": i, "kernel": 2} for i in range(1, 7)},
}  # fmt: skip
# what the GPU's tensor cores serve: whole chunks of 64, and scales of x's dtype
TENSOR_CORES = {
    f"tensor-cores-{bits}-bits-axis-{axis}-{M}-tokens":
        {"nbits": code, "axis": axis, "N": 64, "K": 64, "G": G_64, "M": M, "dtype": dtype,
         "meta_dtype": dtype, "isa": axis}
    for bits, code in NBITS.items() if bits != 3
    for axis in (0, 1) for M, dtype in ((2, 1), (12, 2), (30, 1))
}  # fmt: skip
PLANES = {
    **{f"planes-axis-{axis}": {"nbits": NBITS[3], "axis": axis, "N": 16, "packing": 1}
       for axis in (0, 1)},
    "planes-long": {"nbits": NBITS[3], "N": 64, "K": 96, "M": 20, "packing": 1},
    "planes-that-do-not-fit": {"nbits": NBITS[3], "packing": 1},
    "planes-of-4-bits": {"N": 16, "packing": 1},
    "packing-none": {"packing": OFF_ENUM},
}  # fmt: skip
REPACKINGS = {
    "to-planes": {"nbits": NBITS[3], "N": 16, "repacking": 1},
    "from-planes": {"nbits": NBITS[3], "N": 16, "packing": 1},
    "to-planes-that-do-not-fit": {"nbits": NBITS[3], "repacking": 1},
    "to-none": {"nbits": NBITS[3], "N": 16, "repacking": OFF_ENUM},
}
ADAPTERS = {
    "rank-0": {"rank": 0},
    "rank-256": {"rank": 0x7040, "N": 8, "K": 8, "M": 2},
    "rank-257": {"rank": 0x7041},
    "rank-negative": {"rank": 0xE000},
    "rank-largest": {"rank": LIMITS[1] + 4},
    "rank-on-empty-huge": {"N": 0, "K": LIMITS[8] + 2, "rank": 255},
    "lora-dtype-none": {"lora_dtype": OFF_ENUM},
    "lora-dtype-other": {"lora_dtype": 1, "dtype": 2},
    "dropout": {"dropout": 1},
    **{f"dropout-{i}": {"dropout": OFF_FLOAT + i} for i in range(12)},
    **{f"scaling-{i}": {"scaling": OFF_FLOAT + i} for i in range(3)},
}
ROUTINGS = {
    "experts-0": {"experts": 0},
    "experts-negative": {"experts": 0xE000},
    "experts-largest": {"experts": LIMITS[1] + 4},
    "experts-40": {"experts": 40, "M": 60},
    "experts-of-a-huge-weight": {"experts": 39, "N": LIMITS[8] + 2, "K": 1, "G": 6},
    **{f"routing-{i}": {"routing": i} for i in range(1, 6)},
    "one-row-wild-stride": {"M": 1, "stride": 0x40 + 9},
    "no-columns-wild-stride": {"K": 0, "stride": 0x40 + 8},
    "no-rows-wild-stride": {"N": 0, "stride": 0x40 + 8},
    "side-by-side": {"experts": 9, "M": 60, "callbacks": 1},
}
SOLVERS = {
    **{f"solver-{s}-dtype-{d}": {"solver": s, "dtype": d, "switches": 3}
       for s in range(3) for d in range(3)},
    "solver-none": {"solver": OFF_ENUM},
    **{f"iters-{i}": {"solver": 1, "iters": OFF_ENUM + i} for i in range(6)},
    **{f"importance-axis-{axis}": {"solver": 0, "switches": 12, "axis": axis, "N": 6, "K": 40}
       for axis in (0, 1)},
    "early-stop-parallel": {"solver": 1, "switches": 1, "callbacks": 1, "N": 64, "K": 96},
    **{f"{option}-{i}": {"solver": 1, option: OFF_FLOAT + i}
       for option in ("lp_norm", "beta", "kappa") for i in range(0, 12, 3)},
    **{f"values-{i}": {"values": i, "solver": i % 3} for i in range(8, 14)},
}  # fmt: skip
BLOCKS = {
    "inner": {"row_begin": 3, "row_end": 7, "column_begin": 5, "column_end": 29},
    "backwards": {"row_begin": 7, "row_end": 3},
    "row-end-largest": {"row_end": LIMITS[1] + 4},
    "column-begin-negative": {"column_begin": 0xE000},
    "one-row-wild-stride": {"row_begin": 2, "row_end": 3, "stride": 0x40 + 9},
    **{f"stride-{i}": {"stride": 0x40 + i} for i in range(12)},
}


# entry points that share their checks with others get what tells them apart alone
THOROUGH = {"quantize", "dequantize", "lora_linear", "lora_linear_backward",
            "grouped_lora_linear_backward", "lora_input_gradients"}  # fmt: skip
LIMITS_OF_SHAPE = ("largest", "overflow", "negative", "two-to", "no-")


def seeds_of(entry: str) -> dict[str, dict[str, int]]:
    """Name and changed fields of each seed of one entry point."""
    thorough = entry in THOROUGH
    product = "linear" in entry or entry.startswith("lora")
    seeds: dict[str, dict[str, int]] = {"sound": {}}
    seeds |= {n: s for n, s in SHAPES.items() if thorough or n.startswith(LIMITS_OF_SHAPE)}
    seeds |= {n: s for n, s in CONTEXTS.items() if thorough or n.startswith("pointers")}
    if product:
        limits = {n: s for n, s in PRODUCTS.items() if n.startswith(("tokens", "kernel"))}
        seeds |= PRODUCTS if thorough else limits
    if "lora" in entry or "workspace" in entry:
        seeds |= ADAPTERS if thorough else {n: s for n, s in ADAPTERS.items() if "rank" in n}
    if "grouped" in entry:
        seeds |= ROUTINGS
    if entry in ("linear", "linear_dgrad"):
        seeds |= TENSOR_CORES
    if thorough or entry in ("linear", "linear_dgrad", "pack", "unpack", "repack"):
        seeds |= PLANES
    if entry == "repack":
        seeds |= REPACKINGS
    if entry == "quantize":
        seeds |= SOLVERS
    if entry == "dequantize":
        seeds |= BLOCKS
    if entry in ("lora_linear_backward", "quantize"):
        for i, pointer in enumerate(POINTERS):
            seeds[f"null-{pointer.lower()}"] = {"null": 1 << i}
    return seeds


def encode(entry: str, changed: dict[str, int]) -> bytes:
    values = SOUND | {"entry": ENTRIES.index(entry)} | changed
    return b"".join(values.get(n, 0).to_bytes(size, "little") for n, size in FIELDS.items())


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for entry in ENTRIES:
        for name, changed in seeds_of(entry).items():
            (folder / f"{entry}-{name}").write_bytes(encode(entry, changed))


if __name__ == "__main__":
    main()
