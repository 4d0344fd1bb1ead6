"""Whatever `--data` names, ready to train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hqqlora.command.errors import UsageError
from hqqlora.training.batches import Examples
from hqqlora.training.chat_data import Instruction, render_prompt
from hqqlora.training.instructions import (
    SplitInstructions,
    encode_instructions,
    holds_instructions,
    read_instructions,
)
from hqqlora.training.options import TrainOptions
from hqqlora.training.sample import Prompt, default_prompt
from hqqlora.training.text_data import SplitText, cut_windows, read_text


@dataclass(frozen=True)
class TrainingData:
    """Both parts as tokens, and what a run says about them."""

    train: Examples
    held_out: Examples
    fingerprint: str
    facts: dict[str, Any]
    summary: str
    prompt: Prompt
    """What a sample continues."""

    @property
    def highest(self) -> int:
        """The highest token."""
        return max(self.train.highest, self.held_out.highest)


def read_data(options: TrainOptions) -> SplitText | SplitInstructions:
    """Reads and splits what `--data` names: text or instruction data.

    Raises:
        UsageError: see `read_text` and `read_instructions`; or `--learn-prompts` was given for
            text, which has none.
    """
    if holds_instructions(options.data, options.text_field):
        return read_instructions(
            options.data, options.text_field, options.held_out, options.seed
        )
    if options.learn_prompts:
        raise UsageError("--learn-prompts: the data is text, of which all is learned")
    return read_text(options.data, options.text_field, options.held_out, options.seed)


def tokenize(
    split: SplitText | SplitInstructions, tokenizer: Any, options: TrainOptions
) -> TrainingData:
    """Both parts as tokens.

    Raises:
        UsageError: see `cut_windows` and `encode_instructions`.
    """
    if isinstance(split, SplitText):
        return _tokenize_text(split, tokenizer, options)
    return _tokenize_instructions(split, tokenizer, options)


def _tokenize_text(split: SplitText, tokenizer: Any, options: TrainOptions) -> TrainingData:
    windows = cut_windows(split, tokenizer, options.sequence_length, options.eval_tokens)
    train, held_out = Examples(windows.train), Examples(windows.held_out)
    facts = _facts(split.source, train, held_out, split.held_out_names, options)
    summary = (
        f"text     {split.source}: {train.tokens:,} tokens to train on, "
        f"{held_out.tokens:,} held out"
    )
    prompt = Prompt(options.prompt or default_prompt(split.held_out[0]))
    return TrainingData(train, held_out, windows.fingerprint, facts, summary, prompt)


def _tokenize_instructions(
    split: SplitInstructions, tokenizer: Any, options: TrainOptions
) -> TrainingData:
    length = options.sequence_length
    rows = encode_instructions(
        split, tokenizer, length, options.eval_tokens, options.learn_prompts
    )
    train, held_out = rows.train, rows.held_out
    names = [record.where for record in split.held_out]
    learned = train.predictions
    facts = {
        **_facts(split.source, train, held_out, names, options),
        "train_records": len(train),
        "held_out_records": len(held_out),
        "learned_tokens": learned,
        "cut_records": rows.cut,
        "skipped_records": rows.skipped,
    }
    summary = (
        f"data     {split.source}: {len(train):,} records to train on, of {train.tokens:,} "
        f"tokens ({learned:,} learned); {len(held_out):,} held out, of {held_out.tokens:,}"
    )
    if rows.cut:
        summary += f"\n         {rows.cut:,} of them cut at {length:,} tokens"
    if rows.skipped:
        summary += (
            f"\n         {rows.skipped:,} skipped: nothing to learn in their first {length:,} "
            "tokens"
        )
    prompt = _prompt(rows.sample, tokenizer, options.prompt)
    return TrainingData(train, held_out, rows.fingerprint, facts, summary, prompt)


def _prompt(record: Instruction, tokenizer: Any, given: str | None) -> Prompt:
    """What is given, as the user's message where the data is messages; or a record's own."""
    if isinstance(record.prompt, str):
        return Prompt(given or record.prompt)
    if given:
        record = Instruction("--prompt", [{"role": "user", "content": given}])
    return Prompt(render_prompt(record, tokenizer), rendered=True)


def _facts(
    source: str, train: Examples, held_out: Examples, names: list[str], options: TrainOptions
) -> dict[str, Any]:
    return {
        "source": source,
        "train_tokens": train.tokens,
        "held_out_tokens": held_out.tokens,
        "held_out": names,
        "sequence_length": options.sequence_length,
    }
