"""The C libraries behind the names and arguments of torch.ops.hqqlora, for CPU tensors, each
kernel and instruction set at will: libhqqlora, and the CUDA library on the CPU (its kernels,
compiled as plain C++ and run by an emulator)."""

from __future__ import annotations

import ctypes as ct
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import c_library
import pytest
import torch
from c_library import HQQS_OWN, Weight
from torch import Tensor

from hqqlora.ops import PackedWeight, meta_shape, packed_shape

# where `make test-c` builds
ROOT = Path(__file__).parent.parent
BUILD = Path(os.environ.get("HQQLORA_C_BUILD", ROOT / "build" / "release"))
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ISAS = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4, "amx": 5}
KERNELS = {"auto": 0, "reference": 1, "direct": 2, "blocked": 3, "tiled": 4}


class Lora(ct.Structure):
    """hqq_lora."""

    _fields_ = (
        ("rank", ct.c_int64),
        ("dtype", ct.c_int),
        ("A", ct.c_void_p),
        ("B", ct.c_void_p),
        ("scaling", ct.c_float),
        ("dropout", ct.c_float),
        ("seed", ct.c_void_p),
        ("seed_offset", ct.c_uint64),
    )


class Context(ct.Structure):
    """hqq_context."""

    _fields_ = (
        ("parallel_for", ct.c_void_p),
        ("gemm", ct.c_void_p),
        ("gemm_data", ct.c_void_p),
        ("stream", ct.c_void_p),
        ("isa", ct.c_int),
        ("kernel", ct.c_int),
    )


class QuantizeOptions(ct.Structure):
    """hqq_quantize_options."""

    _fields_ = (
        ("solver", ct.c_int),
        ("iters", ct.c_int32),
        ("early_stop", ct.c_int32),
        ("round_zero", ct.c_int32),
        ("lp_norm", ct.c_float),
        ("beta", ct.c_float),
        ("kappa", ct.c_float),
        ("importance", ct.c_void_p),
    )


class Counts(ct.Structure):
    """hqqlora_emulated_counts."""

    _fields_ = tuple(
        (name, ct.c_uint64) for name in ("launches", "blocks", "switches", "mma", "clusters")
    )


@functools.cache
def library() -> ct.CDLL:
    """libhqqlora_cuda_emulated.so; the test fails where it has not been built."""
    path = BUILD / "tests" / "c" / "libhqqlora_cuda_emulated.so"
    if not path.is_file():
        pytest.fail(f"{path} is not there: build it with `make test-c`", pytrace=False)
    lib = ct.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    lib.hqq_last_error.restype = ct.c_char_p
    return lib


def set_schedule(order: str = "FIFO", cp_async: str = "LATE", seed: int = 1) -> None:
    """In which order the emulator runs threads, and when asynchronous copies land."""
    lib = library()
    assert not lib.hqqlora_emulated_set_schedule(
        order.encode(), cp_async.encode(), ct.c_uint64(seed)
    ), (order, cp_async)


# What cudaDeviceGetAttribute says that kernels ask: compute capability, the bytes of shared
# memory that a block may have, whether there are clusters; the emulator's own is an H100.
_MULTIPROCESSORS, _MAJOR, _MINOR, _SHARED, _CLUSTERS = 16, 75, 76, 97, 120  # of cudaDeviceAttr
DEVICES: dict[str, dict[int, int]] = {
    "H100": {},
    "A100": {_MAJOR: 8, _MINOR: 0, _SHARED: 163 << 10, _CLUSTERS: 0},
    "RTX 4090": {_MAJOR: 8, _MINOR: 9, _SHARED: 99 << 10, _CLUSTERS: 0},
}


def set_device(name: str = "H100", multiprocessors: int = 132) -> None:
    """What the emulator says it is."""
    library().hqqlora_emulated_reset_device()
    for attribute, value in ({_MULTIPROCESSORS: multiprocessors} | DEVICES[name]).items():
        assert not library().hqqlora_emulated_set_device_attribute(attribute, value)


def counts() -> Counts:
    """What the emulator has done so far."""
    result = Counts()
    library().hqqlora_emulated_get_counts(ct.byref(result))
    return result


def pointer(tensor: Tensor | None) -> ct.c_void_p:
    return ct.c_void_p(None if tensor is None else tensor.data_ptr())


def rows_of(x: Tensor) -> Tensor:
    """x [..., width] as [M, width], in place where rows have one stride."""
    width = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), width)
    return rows if rows.stride(-1) == 1 or width <= 1 else rows.contiguous()


def matrix(x: Tensor) -> tuple[ct.c_void_p, ct.c_int64]:
    """Address and row stride."""
    return pointer(x), ct.c_int64(x.stride(0) if x.shape[0] > 1 else x.shape[1])


class LibraryOps:
    """torch.ops.hqqlora of the library that `load` loads; `kernel` forces one, `isa` caps the
    instruction set. One thread, and the library's own GEMM."""

    def __init__(
        self, load: Callable[[], ct.CDLL], kernel: str = "auto", isa: str = "auto"
    ) -> None:
        self.load = load
        self.context = Context(kernel=KERNELS[kernel], isa=ISAS[isa])

    @property
    def lib(self) -> ct.CDLL:
        return self.load()

    def check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"hqqlora: {self.lib.hqq_last_error().decode()}")

    def weight(self, W_q, scale, zero, N, K, nbits, G, axis) -> Weight:
        return Weight(
            N,
            K,
            G,
            nbits,
            axis,
            DTYPES[scale.dtype],
            HQQS_OWN,
            pointer(W_q),
            pointer(scale),
            pointer(zero),
        )

    def adapter(self, A, B, seed, scaling, dropout) -> Lora:
        assert A.is_contiguous()
        assert B.is_contiguous()
        return Lora(
            A.shape[0], DTYPES[A.dtype], pointer(A), pointer(B), scaling, dropout, pointer(seed)
        )

    def workspace(self, weight: Weight, lora: Lora | None, M: int, dtype: int):
        """Exactly what the library asks for, aligned, and full of NaN; with its size."""
        size = ct.c_size_t()
        self.check(
            self.lib.hqq_workspace_size(
                ct.byref(size),
                ct.byref(weight),
                ct.byref(lora) if lora else None,
                ct.c_int64(M),
                dtype,
                ct.byref(self.context),
            )
        )
        memory = torch.full((size.value + 64,), 0xFF, dtype=torch.uint8)
        skip = -memory.data_ptr() % 64
        return memory[skip : skip + size.value], size

    def chosen(self, packed: PackedWeight, M: int, dtype: torch.dtype, transpose: bool) -> str:
        """hqq_choose_kernel."""
        found = self.lib.hqq_choose_kernel(
            ct.byref(self.weight(*packed)), ct.c_int64(M), DTYPES[dtype], int(transpose), 0
        )
        return next(name for name, value in KERNELS.items() if value == found)

    # ---- the ops -------------------------------------------------------------------------

    def quantize(
        self, weight, nbits, group_size, axis, meta_dtype, solver=0, iters=20, early_stop=True,
        round_zero=False, lp_norm=0.7, beta=10.0, kappa=1.0, importance=None,
    ):  # fmt: skip
        N, K = weight.shape
        dense = weight.contiguous()
        W_q = torch.full(
            packed_shape(N, K, nbits, group_size, axis),
            0x55,
            dtype=torch.int32 if nbits == 3 else torch.uint8,
        )
        scale, zero = (
            torch.full(meta_shape(N, K, group_size, axis), float("nan"), dtype=meta_dtype)
            for _ in range(2)
        )
        described = self.weight(W_q, scale, zero, N, K, nbits, group_size, axis)
        options = QuantizeOptions(
            int(solver), iters, early_stop, round_zero, lp_norm, beta, kappa,
            pointer(importance),
        )  # fmt: skip
        self.check(
            self.lib.hqq_quantize(
                pointer(W_q),
                pointer(scale),
                pointer(zero),
                pointer(dense),
                DTYPES[dense.dtype],
                ct.byref(described),
                ct.byref(options),
                ct.byref(self.context),
            )
        )
        return W_q, scale, zero

    def dequantize(self, W_q, scale, zero, N, K, nbits, G, axis, dtype):
        out = torch.full((N, K), float("nan"), dtype=dtype)
        weight = self.weight(W_q, scale, zero, N, K, nbits, G, axis)
        bounds = (ct.c_int64(v) for v in (0, N, 0, K))
        self.check(
            self.lib.hqq_dequantize(
                pointer(out),
                ct.c_int64(K),
                DTYPES[dtype],
                ct.byref(weight),
                *bounds,
                ct.byref(self.context),
            )
        )
        return out

    def linear(self, x, W_q, scale, zero, bias, *shape):
        y, _ = self._forward(x, (W_q, scale, zero, *shape), bias, None)
        return y

    def lora_linear(self, x, W_q, scale, zero, bias, A, B, seed, scaling, dropout, *shape):
        lora = self.adapter(A, B, seed, scaling, dropout)
        return self._forward(x, (W_q, scale, zero, *shape), bias, lora)

    def _forward(self, x, packed: Sequence, bias, lora):
        weight, rows, dtype = self.weight(*packed), rows_of(x), DTYPES[x.dtype]
        M, N = rows.shape[0], weight.out_features
        y = torch.full((*x.shape[:-1], N), float("nan"), dtype=x.dtype)
        xa = torch.full((M, lora.rank), float("nan")) if lora else None
        memory, size = self.workspace(weight, lora, M, dtype)
        bias_of = (pointer(bias), DTYPES[bias.dtype] if bias is not None else 0)
        tail = (ct.c_int64(M), dtype, pointer(memory), size, ct.byref(self.context))
        if lora is None:
            status = self.lib.hqq_linear(
                pointer(y), *matrix(rows), ct.byref(weight), *bias_of, *tail
            )
        else:
            status = self.lib.hqq_lora_linear(
                pointer(y),
                pointer(xa),
                *matrix(rows),
                ct.byref(weight),
                *bias_of,
                ct.byref(lora),
                *tail,
            )
        self.check(status)
        return y, xa

    def linear_dgrad(self, dy, *packed):
        weight, rows, dtype = self.weight(*packed), rows_of(dy), DTYPES[dy.dtype]
        M = rows.shape[0]
        dx = torch.full((*dy.shape[:-1], weight.in_features), float("nan"), dtype=dy.dtype)
        memory, size = self.workspace(weight, None, M, dtype)
        self.check(
            self.lib.hqq_linear_dgrad(
                pointer(dx),
                *matrix(rows),
                ct.byref(weight),
                ct.c_int64(M),
                dtype,
                pointer(memory),
                size,
                ct.byref(self.context),
            )
        )
        return dx

    def lora_linear_backward(
        self, dy, x, xa, W_q, scale, zero, A, B, seed, scaling, dropout, N, K, nbits, G, axis,
        needs_dx, needs_dA, needs_dB,
    ):  # fmt: skip
        weight = self.weight(W_q, scale, zero, N, K, nbits, G, axis)
        lora = self.adapter(A, B, seed, scaling, dropout)
        rows, dtype = rows_of(dy), DTYPES[dy.dtype]
        M = rows.shape[0]
        shapes = ((*dy.shape[:-1], K), tuple(A.shape), tuple(B.shape))
        results = [
            torch.full(shape if needed else (0,), float("nan"), dtype=kind)
            for shape, needed, kind in zip(
                shapes,
                (needs_dx, needs_dA, needs_dB),
                (dy.dtype, A.dtype, B.dtype),
                strict=True,
            )
        ]
        wanted = [pointer(r if r.numel() else None) for r in results]
        x_rows = None if x is None else rows_of(x)
        x_of = (ct.c_void_p(None), ct.c_int64(0)) if x is None else matrix(x_rows)
        memory, size = self.workspace(weight, lora, M, dtype)
        self.check(
            self.lib.hqq_lora_linear_backward(
                *wanted,
                *matrix(rows),
                *x_of,
                pointer(xa),
                ct.byref(weight),
                ct.byref(lora),
                ct.c_int64(M),
                dtype,
                pointer(memory),
                size,
                ct.byref(self.context),
            )
        )
        return tuple(results)


class EmulatedOps(LibraryOps):
    """The emulated CUDA library."""

    def __init__(self, kernel: str = "auto") -> None:
        super().__init__(library, kernel)


class CpuOps(LibraryOps):
    """libhqqlora."""

    def __init__(self, kernel: str = "auto", isa: str = "auto") -> None:
        super().__init__(c_library.library, kernel, isa)
