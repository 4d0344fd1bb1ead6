"""`hqqlora bench quality`: what each solver makes of real models, next to the dense model.

A language model is judged on held-out texts (Kullback-Leibler divergence of its predictions
from the dense model's, and perplexity), an embedding model by the cosine distance of its
embeddings from the dense ones. Everything is computed in float32 from weights that are
quantized and read back, so that the solvers are all that differs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hqqlora.bench.contenders import linear_layers
from hqqlora.bench.embeddings import Embeddings, can_embed
from hqqlora.bench.table import aligned
from hqqlora.command.errors import RunError
from hqqlora.command.model_source import find_model, load_dense_model, load_tokenizer
from hqqlora.command.options import positive_integer
from hqqlora.config import SUPPORTED_BITS
from hqqlora.importance import input_importance
from hqqlora.ops import Solver

LICENSE = Path("/usr/share/common-licenses/GPL-3")
FORMATS = ((4, 64), (3, 64), (2, 64), (2, 16))
META_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LENGTH = 256


class Quantizer(NamedTuple):
    """A solver by the name it has in the table."""

    solver: Solver
    round_zero: bool | None
    """None: as hqq does by default, at 4 bits alone."""
    weighted: bool = False
    """Whether its sums are weighted by the inputs' importance."""


QUANTIZERS = {
    "min/max": Quantizer(Solver.MINMAX, False),
    "hqq": Quantizer(Solver.REFERENCE, None),
    "hqq, float zero": Quantizer(Solver.REFERENCE, False),
    "ours": Quantizer(Solver.DEFAULT, False),
    "ours, importance": Quantizer(Solver.DEFAULT, False, weighted=True),
}


class Case(NamedTuple):
    """One row of the table."""

    nbits: int
    group_size: int
    meta: str
    name: str


def cases(bits: list[int] | None, names: list[str] | None) -> Iterator[Case]:
    """All rows, in order. What is the same as another row is left out."""
    for nbits, group_size in FORMATS if bits is None else [(b, 64) for b in bits]:
        for meta in META_DTYPES:
            for name in names or QUANTIZERS:
                if name != "hqq, float zero" or nbits == 4:
                    yield Case(nbits, group_size, meta, name)


ReadBack = Callable[[Tensor, Tensor | None], Tensor]


def requantizer(case: Case) -> ReadBack:
    """The function from a weight [N, K] and the importance [K] of its inputs (None: unknown) to
    the weight read back, in float32."""
    chosen = QUANTIZERS[case.name]
    round_zero = case.nbits == 4 if chosen.round_zero is None else chosen.round_zero
    layout = (case.nbits, case.group_size, 1)

    def read_back(weight: Tensor, importance: Tensor | None = None) -> Tensor:
        parts = torch.ops.hqqlora.quantize(
            weight,
            *layout,
            META_DTYPES[case.meta],
            int(chosen.solver),
            round_zero=round_zero,
            importance=importance if chosen.weighted else None,
        )
        result: Tensor = torch.ops.hqqlora.dequantize(
            *parts, *weight.shape, *layout, torch.float32
        )
        return result

    return read_back


def texts(tokenizer: Any, tokens: int) -> dict[str, Tensor]:
    """Windows [count, length] of tokens of each text; a text that is not there is left out."""
    from pydoc_data.topics import topics

    found = {"python": "\n".join(topics[name] for name in sorted(topics))}
    if LICENSE.is_file():
        found["gpl"] = LICENSE.read_text(encoding="utf-8")
    found["code"] = Path(argparse.__file__).read_text(encoding="utf-8")
    windows = {}
    for name, text in found.items():
        ids = tokenizer(text[: 16 * tokens], return_tensors="pt").input_ids[0][:tokens]
        length = min(_LENGTH, len(ids))
        windows[name] = ids[: len(ids) // length * length].view(-1, length)
    return windows


class Judged(NamedTuple):
    """Of one text."""

    divergence: float
    """Mean KL(dense || quantized) of a prediction, in nats."""
    perplexity: float


class LanguageModel:
    """A dense language model, whose linear layers are requantized again and again."""

    def __init__(self, model: nn.Module, windows: dict[str, Tensor]) -> None:
        """Keeps the dense weights and the dense model's predictions for `windows`."""
        self.model, self.windows = model, windows
        self.weights = {
            name: model.get_parameter(f"{name}.weight").detach().clone()
            for name in linear_layers(model)
        }
        self.dense = {name: self.predictions(ids) for name, ids in windows.items()}
        self.importance = input_importance(model)

    @torch.no_grad()
    def predictions(self, windows: Tensor) -> Tensor:
        """Logarithms of the probabilities [count, length, vocabulary]."""
        rows = [self.model(input_ids=ids[None]).logits[0].float() for ids in windows]
        return torch.stack([row.log_softmax(-1) for row in rows])

    def judge(self, read_back: ReadBack | None) -> dict[str, Judged]:
        """Each text under requantized weights (None: as they are)."""
        for name, weight in self.weights.items() if read_back else ():
            layer: Any = self.model.get_submodule(name)
            assert read_back is not None
            layer.weight.data = read_back(weight, self.importance.get(name))
        return {name: self._judge_text(name) for name in self.windows}

    def _judge_text(self, name: str) -> Judged:
        got, windows = self.predictions(self.windows[name]), self.windows[name]
        divergence = nn.functional.kl_div(
            got, self.dense[name], reduction="sum", log_target=True
        )
        loss = -got[:, :-1].gather(2, windows[:, 1:, None]).mean().item()
        return Judged(divergence.item() / windows.numel(), math.exp(loss))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every option to `parser`."""
    parser.add_argument(
        "--model", metavar="PATH", help="as in hqqlora train (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--tokens", type=positive_integer, default=1024, help="of each text (default: 1024)"
    )
    parser.add_argument(
        "--bits",
        type=int,
        nargs="+",
        choices=SUPPORTED_BITS,
        help="with groups of 64 (default: 4, 3, 2, and 2 with groups of 16)",
    )
    parser.add_argument("--solvers", nargs="+", choices=tuple(QUANTIZERS), metavar="NAME")


def run(options: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        RunError: a one-line reason to stop; see `exit_code` there.
    """
    source = find_model(options.model)
    windows = texts(load_tokenizer(source), options.tokens)
    if any(ids.shape[1] < 2 for ids in windows.values()):
        raise RunError(f"--tokens {options.tokens}: at least 2 are needed")
    model = LanguageModel(load_dense_model(source, torch.float32), windows)
    embeddings = Embeddings() if can_embed() else None
    rows = [["dense", *_cells(model.judge(None)), *(["0"] if embeddings else [])]]
    for case in cases(options.bits, options.solvers):
        read_back = requantizer(case)
        row = [f"{case.nbits} bits, G {case.group_size}, {case.meta}: {case.name}"]
        row += _cells(model.judge(read_back))
        if embeddings:
            row.append(f"{embeddings.distance(read_back):.4f}")
        rows.append(row)
    header = [["", ""]]
    for name in windows:
        header += [[name, "KL"], [name, "perplexity"]]
    if embeddings:
        header.append(["MiniLM", "distance"])
    print("\n".join(aligned(list(zip(*header, strict=True)), rows)), flush=True)


def _cells(judged: dict[str, Judged]) -> list[str]:
    return [
        cell for j in judged.values() for cell in (f"{j.divergence:.4f}", f"{j.perplexity:.2f}")
    ]
