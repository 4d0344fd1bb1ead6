"""A run from beginning to end: the order of things."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hqqlora
from hqqlora.command.errors import (
    RunError,
    StopRequestedError,
    UsageError,
    describe,
    explaining,
    first_line,
)
from hqqlora.command.machine import peak_memory, restart_peak_memory
from hqqlora.command.model_source import (
    ModelSource,
    choose_dtype,
    find_model,
    load_model,
    load_stored_codes,
    load_tokenizer,
)
from hqqlora.files import write_safetensors
from hqqlora.importance import body_importance
from hqqlora.optional_packages import command_for
from hqqlora.training.checkpoint import (
    Checkpoint,
    Progress,
    read_checkpoint,
    restore,
    take_checkpoint,
    write_checkpoint,
)
from hqqlora.training.instructions import SplitInstructions
from hqqlora.training.layer_sizes import dense_layers, linear_layer_sizes, model_fingerprint
from hqqlora.training.loop import make_optimizer, recompute_activations, train
from hqqlora.training.loss_plot import draw_loss
from hqqlora.training.next_token_loss import NextTokenLoss
from hqqlora.training.options import (
    TrainOptions,
    check_format,
    continued,
    quantized_before,
    to_dict,
)
from hqqlora.training.perplexity import measure_perplexity
from hqqlora.training.report import best_step, build_log, format_table, write_log
from hqqlora.training.run_folder import RunFolder, choose_folder
from hqqlora.training.sample import Prompt, complete
from hqqlora.training.starting_adapter import insert_starting_adapter, with_starting_adapter
from hqqlora.training.text_data import SplitText, check_fit
from hqqlora.training.training_data import TrainingData, read_data, tokenize


def run(options: TrainOptions, given: frozenset[str]) -> None:
    """Does what `hqqlora train` was asked for.

    Args:
        options: the parsed options.
        given: the names of those that stood on the command line.

    Raises:
        RunError: a one-line reason to stop; see `exit_code` there.
    """
    options = _with_absolute_paths(options)
    _check_targets(options.target_modules)
    folder = choose_folder(options.output, resume=options.resume)
    if options.resume and folder.finished:
        _say(f"{folder.path} is finished already\n\n{_table_of(folder.log)}")
        return
    checkpoint = None
    if options.resume:
        checkpoint = read_checkpoint(folder.checkpoint)
        options = continued(checkpoint.options, options, given)
    source = find_model(options.model)
    if checkpoint is None:
        check_format(options, given, source)
        options = with_starting_adapter(options, given, source, folder.path)
    split = read_data(options)
    if checkpoint is None:
        folder.claim(overwrite=options.overwrite)
    else:
        folder.check_writable()
    try:
        _Run(options, folder, source, split, checkpoint).do()
    except BaseException as error:
        folder.release()
        if isinstance(error, KeyboardInterrupt) and folder.unfinished:
            error = StopRequestedError("stopped")
        if isinstance(error, RunError) and error.again and folder.unfinished:
            error.add_hint(f"to go on: hqqlora train --resume --output {folder.path}")
        raise error from None


class _Run:
    """The state that the phases of one run share."""

    def __init__(
        self,
        options: TrainOptions,
        folder: RunFolder,
        source: ModelSource,
        split: SplitText | SplitInstructions,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.options = options
        self.folder = folder
        self.source = source
        self.split = split
        self.checkpoint = checkpoint
        self.progress = checkpoint.progress if checkpoint else Progress()
        self.facts = self.progress.facts
        self.tokenizer: Any = None
        self.fingerprints: dict[str, str] = {}
        self.importance: dict[str, Tensor] = {}

    def do(self) -> None:
        """All phases. What a checkpoint holds is not done again."""
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        data = self._load_data()
        model = self._load_model(data)
        loss = NextTokenLoss(model)
        if quantized_before(self.options, self.source):
            self._look_at_weights(model, None)
        else:
            if self.checkpoint is None:
                self._measure(model, loss, data, "dense")
            self._quantize(model)
        if self.checkpoint is None:
            self._measure(model, loss, data, "quantized")
            self._sample(model, data.prompt, "before")
        self._train(model, loss, data)
        self._measure(model, loss, data, "fine_tuned")
        self._sample(model, data.prompt, "after")
        self._finish(model, data)

    # ---- phases ---------------------------------------------------------------------

    def _load_data(self) -> TrainingData:
        with self._timed("load"):
            self.tokenizer = load_tokenizer(self.source)
            data = tokenize(self.split, self.tokenizer, self.options)
        steps = self.options.steps_for(len(data.train))
        self.options = dataclasses.replace(self.options, steps=steps)
        self.fingerprints["text"] = data.fingerprint
        self._compare_fingerprint("text")
        self.facts["data"] = data.facts
        _say(data.summary)
        return data

    def _load_model(self, data: TrainingData) -> nn.Module:
        dtype = choose_dtype(self.options.dtype)
        _say(f"loading  {self.source.name}")
        load = load_stored_codes if self.options.as_stored else load_model
        with self._timed("load"):
            model = load(self.source, dtype)
        check_fit(model, data.highest, self.options.sequence_length)
        parameters = sum(p.numel() for p in model.parameters())
        name = str(dtype).removeprefix("torch.")
        self.facts["model"] = {
            "name": self.source.name,
            "path": str(self.source.path),
            "parameters": parameters,
            "dtype": name,
        }
        _say(f"model    {parameters / 1e6:.1f} M parameters, {name}")
        return model

    def _quantize(self, model: nn.Module) -> None:
        options = self.options
        dense = dense_layers(model)
        with self._timed("quantize"), explaining("cannot quantize"):
            if options.weighs_columns:
                saved = self.checkpoint.importance if self.checkpoint else {}
                self.importance = saved or body_importance(model)
            hqqlora.quantize_model(
                model,
                hqqlora.BaseQuantizeConfig(
                    nbits=options.bits,
                    group_size=options.group_size,
                    axis=options.axis,
                    solver=options.solver,
                ),
                importance=self.importance,
            )
        self._look_at_weights(model, dense)

    def _look_at_weights(self, model: nn.Module, dense: dict[str, int] | None) -> None:
        sizes = linear_layer_sizes(model, dense)
        self.facts["linear_layers"] = sizes
        self.fingerprints["model"] = model_fingerprint(model)
        self._compare_fingerprint("model")
        before = "" if dense is None else f"{sizes['dense_bytes'] / 1e6:.1f} MB -> "
        _say(
            f"weights  {sizes['count']} linear layers: {before}"
            f"{sizes['quantized_bytes'] / 1e6:.1f} MB, {sizes['bits_per_weight']:.2f} bits each"
        )

    def _train(self, model: nn.Module, loss: NextTokenLoss, data: TrainingData) -> None:
        options = self.options
        torch.manual_seed(options.seed)
        targets = options.target_modules
        with explaining("cannot add the adapter"):
            if options.adapter is not None:
                insert_starting_adapter(model, options)
            else:
                hqqlora.add_lora(
                    model,
                    r=options.rank,
                    lora_alpha=options.alpha,
                    lora_dropout=options.dropout,
                    target_modules=targets[0] if _is_pattern(targets) else list(targets),
                    use_rslora=options.rslora,
                )
            if options.gradient_checkpointing:
                recompute_activations(model)
        parameters = list(hqqlora.lora_parameters(model))
        self.facts["linear_layers"]["adapter_bytes"] = sum(p.nbytes for p in parameters)
        begun = f", from {options.adapter}" if options.adapter else ""
        _say(f"adapter  {sum(p.numel() for p in parameters) / 1e6:.2f} M parameters{begun}")
        if options.adapter is not None and self.checkpoint is None:
            self._measure(model, loss, data, "before_training")
        optimizer = make_optimizer(parameters, options)
        memory = self.facts.setdefault("memory", {"before_training": peak_memory()})
        if self.checkpoint is not None:
            restore(self.checkpoint, model, optimizer)
            _say(f"resumed  after step {self.progress.step} of {options.steps}")

        def save() -> None:
            state = take_checkpoint(
                to_dict(options),
                self.fingerprints,
                self.progress,
                model,
                optimizer,
                self.importance,
            )
            write_checkpoint(state, self.folder.checkpoint)
            but_best = bool(self.progress.held_out_losses)
            self.folder.clear_results(but_best=but_best)  # of a run that this one replaces

        if self.checkpoint is None and options.checkpoint_every:
            save()  # so that a run killed early need not measure the dense model again
        restart_peak_memory()
        train(
            *(model, loss, data.train, optimizer, options, self.progress, save),
            measure=lambda: self._measure_between_steps(model, loss, data),
        )
        save()
        memory["training"] = max(memory.get("training", 0), peak_memory())

    def _measure(
        self, model: nn.Module, loss: NextTokenLoss, data: TrainingData, which: str
    ) -> None:
        label = which.replace("_", "-")
        with self._timed("perplexity"):
            found = measure_perplexity(
                model, loss, data.held_out, self._at_a_time, f"perplexity, {label}"
            )
        self.facts.setdefault("perplexity", {"tokens": found.tokens})[which] = found.value
        self.facts.setdefault("held_out_loss", {})[which] = found.loss
        _say(f"held-out perplexity, {label}: {found.value:.2f}")

    def _measure_between_steps(
        self, model: nn.Module, loss: NextTokenLoss, data: TrainingData
    ) -> None:
        with self._timed("perplexity"):
            label = f"perplexity, step {self.progress.step}"
            found = measure_perplexity(model, loss, data.held_out, self._at_a_time, label)
        if self.progress.add_held_out_loss(found.loss):
            self._save_adapter(model, self.folder.best_adapter)
        _say(f"held-out perplexity, after step {self.progress.step}: {found.value:.2f}")

    def _sample(self, model: nn.Module, prompt: Prompt, when: str) -> None:
        if not self.options.sample_tokens:
            return
        with self._timed("sample"), explaining("cannot generate a sample", RunError):
            text = complete(model, self.tokenizer, prompt, self.options.sample_tokens)
        self.facts.setdefault("sample", {"prompt": prompt.text})[when] = text

    def _finish(self, model: nn.Module, data: TrainingData) -> None:
        folder, options = self.folder, self.options
        tokens = [
            data.train.batch_tokens(step, options.batch, options.seed)
            for step in range(options.steps)
        ]
        log = build_log(to_dict(options), self.progress, tokens)
        try:
            hqqlora.save_adapter(model, folder.adapter, str(self.source.path))
            if best_step(log) is None:
                folder.clear_best()
            if self.importance:
                write_safetensors(folder.importance, self.importance)
            drawn = draw_loss(log, folder.curve)
            write_log(log, folder.log)
        except OSError as error:
            raise RunError(describe(error)) from error
        folder.checkpoint.unlink(missing_ok=True)
        if options.sample_tokens:
            _say(_shown_sample(self.facts["sample"]))
        _say("\n" + format_table(log) + "\n")
        files = [folder.adapter, folder.log]
        files += [folder.best_adapter] if folder.best_adapter.exists() else []
        files += [folder.importance] if self.importance else []
        files += [folder.curve] if drawn else []
        _say("written: " + ", ".join(map(str, files)))
        if not drawn:
            _note(f"no loss curve: {command_for('matplotlib')}")

    def _save_adapter(self, model: nn.Module, folder: Path) -> None:
        try:
            hqqlora.save_adapter(model, folder, str(self.source.path))
        except OSError as error:
            raise RunError(describe(error)) from error

    # ---- small things ---------------------------------------------------------------

    @property
    def _at_a_time(self) -> int:
        """Sequences that go through the model together."""
        return self.options.micro_batch or self.options.batch

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.facts.setdefault("seconds", {})
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start

    def _compare_fingerprint(self, what: str) -> None:
        if self.checkpoint and self.checkpoint.fingerprints[what] != self.fingerprints[what]:
            raise UsageError(f"--resume: the {what} is not what it was when the run began")


def _with_absolute_paths(options: TrainOptions) -> TrainOptions:
    """So that a run can be resumed from another folder."""
    return dataclasses.replace(
        options,
        model=_absolute(options.model) if options.model else None,
        data=tuple(map(os.path.abspath, options.data)),
    )


def _absolute(model: str) -> str:
    """A name of a downloaded model stays a name."""
    return os.path.abspath(model) if os.path.exists(model) else model


def _is_pattern(targets: Sequence[str]) -> bool:
    """Whether one word is "all-linear" or a regular expression, not a plain name."""
    return len(targets) == 1 and not targets[0].replace("_", "").replace(".", "").isalnum()


def _check_targets(targets: tuple[str, ...]) -> None:
    if _is_pattern(targets):
        try:
            re.compile(targets[0])
        except re.error as error:
            raise UsageError(
                f"--target-modules {targets[0]!r} is no regular expression: {error}"
            ) from None


def _table_of(log: Path) -> str:
    try:
        return format_table(json.loads(log.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot read {log}: {first_line(error)}") from error


def _shown_sample(sample: dict[str, str]) -> str:
    lines = []
    for name in ("prompt", "before", "after"):
        text = " ".join(sample[name].split())
        text = "".join(c if c.isprintable() else "\ufffd" for c in text)
        lines.append(f"\n{name + ':':<8} {text}")
    return "".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def _note(text: str) -> None:
    print(f"hqqlora train: {text}", file=sys.stderr, flush=True)
