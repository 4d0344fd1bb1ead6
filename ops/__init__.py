"""The operations on frozen HQQ weights, as ``torch.ops.hqqlora``.

Importing this module loads the native library and makes the ops known to torch.compile:

======================== ==================================================================
``quantize``             weight [N,K] -> W_q, scale, zero
``dequantize``           W_q, scale, zero -> W [N,K]
``repack``               W_q of 3 bits from hqq's int32 words to uint8 planes, and back
``linear``               x [...,K] -> y [...,N] = x W^T + bias
``linear_dgrad``         dy [...,N] -> dx [...,K] = dy W
``lora_linear``          x -> y = x W^T + bias + scaling * (drop(x) A^T) B^T, and drop(x) A^T
``lora_linear_backward`` dy -> dx, dA, dB
======================== ==================================================================

in halves, for layers that share x (A of all of them, one under another; no dropout):

========================= =================================================================
``lora_project``          x -> xa = x A^T
``lora_linear_from_xa``   x, xa -> y
``lora_factor_gradients`` dy, xa -> dyb = dy B, and dB
``lora_input_gradients``  dy, dyb -> dx = dy W + scaling * dyb A, and dA
========================= =================================================================

and, of rows that are sorted by expert, each with the weight of its own expert:

================================ ==========================================================
``grouped_linear``               x [M,K] -> y [M,N]
``grouped_linear_dgrad``         dy [M,N] -> dx [M,K]
``grouped_lora_linear``          x -> y and drop(x) A^T
``grouped_lora_linear_backward`` dy -> dx, dA [E,R,K], dB [E,N,R]
================================ ==========================================================

with N = out_features, K = in_features, A [R,K] and B [N,R]. The ops compute and do not
differentiate: results of tensors that require gradients carry none. `hqqlora.autograd` holds
the differentiable functions. Wrong arguments raise RuntimeError with the values.

`W_q` is as hqq packs it; or, of 3 bits, in planes, which its dtype uint8 says (`planes_shape`).

They run where their tensors are, on the CPU or on one CUDA device; the seed of a dropout mask,
an int64 tensor of one element, is there too (the offsets of experts are on the CPU always). On
CUDA they are enqueued on torch's current stream and nothing waits, except in `quantize`, which
reads one byte back to tell whether the weight was finite. So CUDA graphs capture them, and a
graph that draws the seed itself has another mask at each replay.

The environment variables ``HQQLORA_ISA`` (portable, avx2, avx512, avx512_bf16, amx) and
``HQQLORA_KERNEL`` (reference, direct, blocked, tiled), read once as a library loads, cap the
instruction set of the CPU kernels and force a kernel on either device.
"""

from typing import Any

import torch

from . import batching, fakes, library
from .weight import (
    PackedWeight,
    Solver,
    meta_shape,
    packed_shape,
    planes_fit,
    planes_shape,
)

__all__ = [
    "PackedWeight",
    "Solver",
    "meta_shape",
    "packed_shape",
    "planes_fit",
    "planes_shape",
]

library.load()
_namespace: Any = torch.ops.hqqlora
if not getattr(_namespace, "registered_in_python", False):
    no_cuda = library.load_cuda()
    fakes.register(no_cuda)
    batching.register()
    _namespace.left_out_autograd = library.leave_out_autograd()
    _namespace.refused_cuda = library.refuse_cuda(no_cuda) if no_cuda else None
    _namespace.registered_in_python = True  # for this module under a second name
