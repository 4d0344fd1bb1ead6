"""`hqqlora bench finetune`: one fine-tuning step of a real model, contenders in turns.

All contenders come from the same dense weights, start with the same adapters, and see the same
text in the same order. Memory is measured first, each in a process of its own (see `memory`);
then all live in this one and take turns (see `rounds`).
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import torch
from torch import nn

from hqqlora.bench.contenders import (
    AXIS,
    CONTENDERS,
    GROUP_SIZE,
    NBITS,
    SEED,
    Contender,
    choose_contenders,
    linear_layers,
    make_contender,
)
from hqqlora.bench.memory import can_measure, measure_memory
from hqqlora.bench.options import BenchOptions
from hqqlora.bench.report import check_writable, describe_bench_machine
from hqqlora.bench.rounds import Rounds, take_turns
from hqqlora.bench.table import format_table
from hqqlora.command.model_source import (
    ModelSource,
    choose_dtype,
    find_model,
    load_dense_model,
    load_tokenizer,
)
from hqqlora.command.thread_waiting import busy_fraction
from hqqlora.files import write_json
from hqqlora.training.batches import batch_places
from hqqlora.training.text_data import TokenWindows, check_fit, cut_windows, read_text

_HELD_OUT = 0.1
_HELD_OUT_TOKENS = 4096
_BUSY = 0.15


def run(options: BenchOptions) -> None:
    """Measures, prints the table, and writes the JSON file if there is to be one.

    Raises:
        RunError: a one-line reason to stop; see `exit_code` there.
    """
    names, not_measured = choose_contenders(options.contenders)
    check_writable(options.json)
    source = find_model(options.model)
    if options.threads:
        torch.set_num_threads(options.threads)
    windows = _load_windows(source, options)
    dense = load_dense_model(source, choose_dtype(options.dtype))
    check_fit(dense, windows.highest, options.sequence_length)
    description = _describe_model(source, dense)
    memory = _measure_memory(names, options)
    contenders = _make_contenders(names, dense, options.rank)
    del dense
    held_out = windows.held_out
    before = {c.name: c.loss(held_out, options.batch) for c in contenders}
    busy = busy_fraction()
    if busy > _BUSY:
        _note(f"other programs take {busy:.0%} of the processors: times will say little")
    found = take_turns(
        contenders,
        lambda step: windows.train[batch_places(len(windows.train), step, options.batch, SEED)],
        options.rounds,
        options.steps,
    )
    figures = {}
    for contender in contenders:
        name = contender.name
        after = None if contender.optimizer is None else contender.loss(held_out, options.batch)
        figures[name] = {
            "meaning": CONTENDERS[name].meaning,
            "quantize_seconds": contender.quantize_seconds,
            **_time_figures(found, name, names[0], options),
            "memory": memory.get(name),
            "loss": {"before": before[name], "after": after},
            "training_losses": found.losses[name],
        }
    result = {
        "options": dataclasses.asdict(options),
        "model": description,
        "machine": {**describe_bench_machine(), "busy_before": busy},
        "steps": 1 + options.rounds * options.steps,
        "held_out_tokens": held_out.numel(),
        "contenders": figures,
        "not_measured": not_measured,
        "rounds": found.seconds,
    }
    print(format_table(result), flush=True)
    if options.json is not None:
        write_json(options.json, result, follow_link=True)


# ---- phases ------------------------------------------------------------------------------


def _load_windows(source: ModelSource, options: BenchOptions) -> TokenWindows:
    text = read_text(options.data, options.text_field, _HELD_OUT, SEED)
    return cut_windows(text, load_tokenizer(source), options.sequence_length, _HELD_OUT_TOKENS)


def _measure_memory(names: list[str], options: BenchOptions) -> dict[str, dict[str, int]]:
    if not options.memory:
        return {}
    if not can_measure():
        _note("memory is not measured: this system has no /proc/self/status and clear_refs")
        return {}
    return {name: measure_memory(name, options) for name in names}


def _make_contenders(names: list[str], dense: nn.Module, rank: int) -> list[Contender]:
    """Each from a copy of its own, so that none finds its weights in the cache, read by
    another."""
    return [make_contender(name, copy.deepcopy(dense), rank) for name in names]


def _time_figures(found: Rounds, name: str, base: str, options: BenchOptions) -> dict[str, Any]:
    tokens = options.batch * options.sequence_length
    return {
        "seconds": {
            "median": found.median(name),
            "q20": found.quantile(name, 0.2),
            "q80": found.quantile(name, 0.8),
        },
        "ratio": found.ratio(name, base),
        "tokens_per_second": tokens / found.median(name),
    }


# ---- descriptions ------------------------------------------------------------------------


def _describe_model(source: ModelSource, dense: nn.Module) -> dict[str, Any]:
    return {
        "name": source.name,
        "path": str(source.path),
        "dtype": str(next(dense.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in dense.parameters()),
        "linear_layers": len(linear_layers(dense)),
        "format": f"{NBITS} bits, groups of {GROUP_SIZE}, axis {AXIS}",
    }


def _note(text: str) -> None:
    print(f"hqqlora bench finetune: {text}", file=sys.stderr, flush=True)
