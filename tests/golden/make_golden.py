"""Writes hqq_0.2.8.safetensors: small weights quantized, packed and dequantized by hqq itself.

    pip install hqq==0.2.8.post1 && python tests/golden/make_golden.py

The tests read the file; only this script needs hqq. Each case NAME has the tensors

    NAME.weight      float16 [N,K]   what was quantized
    NAME.W_q         as hqq stores it: uint8 or int32, or a float dtype under view_as_float
    NAME.codes       uint8 [N,K]     hqq's own unpacking
    NAME.scale       float32, NAME.zero float32, in hqq's shape
    NAME.dequantized float32 [N,K]   hqq's Quantizer.dequantize, absent for float views

and, in the file's metadata, its N, K, G, nbits, axis and whether it is a float view.
"""

import json
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file

OUTPUT = Path(__file__).with_name("hqq_0.2.8.safetensors")
SLOTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
# Odd on purpose: groups that run across rows, rows that are no power of two, a single row.
SHAPES = [(5, 64), (24, 12), (40, 9), (6, 40), (16, 20), (64, 5), (1, 128), (48, 4)]
GROUP_SIZES = [8, 16, 64, None]  # None: the whole row (axis 1) or column (axis 0)


def hqq_can_pack(N: int, K: int, G: int, nbits: int, axis: int) -> bool:
    """hqq splits the rows evenly among a byte's slots; its 3-bit packing pads instead."""
    if N * K % G:
        return False
    rows = N * K // G if axis == 1 else G
    return nbits == 3 or rows % SLOTS[nbits] == 0


def weight_of(N: int, K: int, seed: int) -> torch.Tensor:
    """Normal weights with an outlier, so that codes at both ends are used."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * 0.05
    weight[N // 2, K // 3] = 0.5
    return weight.half()


def make_case(
    N: int, K: int, G: int, nbits: int, axis: int, view: torch.dtype | None, seed: int
):
    """The tensors of one case."""
    weight = weight_of(N, K, seed)
    # what HQQLinear passes, with round_zero as BaseQuantizeConfig sets it
    W_q, meta = Quantizer.quantize(
        weight,
        nbits=nbits,
        group_size=G,
        axis=axis,
        round_zero=nbits == 4,
        compute_dtype=view,
        view_as_float=view is not None,
        device="cpu",
    )
    scale, zero = meta["scale"], meta["zero"]
    case = {"weight": weight, "W_q": W_q, "scale": scale, "zero": zero}
    # with scale 1 and zero 0, dequantizing is unpacking
    meta |= {"compute_dtype": torch.float32, "scale": 1.0, "zero": 0.0}
    case["codes"] = Quantizer.dequantize(W_q, meta).to(torch.uint8)
    if view is None:
        meta |= {"scale": scale, "zero": zero}
        case["dequantized"] = Quantizer.dequantize(W_q, meta)
    return {key: tensor.contiguous() for key, tensor in case.items()}


def main() -> None:
    tensors, cases = {}, {}

    def add(N, K, G, nbits, axis, view, label):
        dtype = str(view).removeprefix("torch.") if view else "integer"
        name = f"{nbits}bit_axis{axis}_g{label}_{N}x{K}_{dtype}"
        case = make_case(N, K, G, nbits, axis, view, seed=len(cases))
        tensors.update({f"{name}.{key}": tensor for key, tensor in case.items()})
        cases[name] = {
            "N": N,
            "K": K,
            "G": G,
            "nbits": nbits,
            "axis": axis,
            "view_as_float": view is not None,
        }

    for nbits in SLOTS:
        for axis in (1, 0):
            for i, group_size in enumerate(GROUP_SIZES):
                # two shapes each, starting elsewhere in the list every time
                shapes = SHAPES[i:] + SHAPES[:i]
                taken = 0
                for N, K in shapes:
                    G = group_size or (K if axis == 1 else N)
                    if taken < 2 and hqq_can_pack(N, K, G, nbits, axis):
                        add(N, K, G, nbits, axis, None, group_size or "all")
                        taken += 1
            for view in (torch.float32, torch.float16, torch.bfloat16):
                add(16, 8, 16, nbits, axis, view, 16)

    save_file(tensors, OUTPUT, {"cases": json.dumps(cases)})
    print(f"{OUTPUT}: {len(cases)} cases, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
