"""Instruction data: conversations as tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hqqlora.command.errors import UsageError

IGNORED = -100
"""The label of a token that is not learned."""

_ROLES = ("system", "user", "assistant")


def check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """`messages` as a list of ``{"role", "content"}``, both text.

    Raises:
        UsageError: they are anything else; the message begins with `where`, a file and line.
    """
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: the messages are no list, or an empty one")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise UsageError(f"{where}: message {number} has other keys than role and content")
        if message["role"] not in _ROLES:
            raise UsageError(
                f"{where}: message {number} has the role {message['role']!r}; "
                f"known are {', '.join(_ROLES)}"
            )
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise UsageError(f"{where}: the content of message {number} is not text but {kind}")
    return [dict(message) for message in messages]


def encode_messages(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    where: str,
    assistant_only: bool = True,
) -> tuple[list[int], list[int]]:
    """A conversation's token ids and its labels, equally many: `IGNORED` outside of the
    assistant's turns, unless all tokens are to be learned.

    The turns are those that a template marks with ``{% generation %}``; else they are found by
    rendering the conversation up to each, so that a turn's end is learned too.

    Raises:
        UsageError: the tokenizer has no chat template; or the conversation up to a turn is
            not how the whole one begins. The message begins with `where`.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            f"{where}: the tokenizer {tokenizer.name_or_path!r} has no chat template: take an "
            "instruction-tuned model's, or set chat_template in tokenizer_config.json"
        )
    if assistant_only and "{% generation" in tokenizer.chat_template.replace("{%-", "{%"):
        found = tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(found["input_ids"]), found["assistant_masks"]
        return ids, [t if learn else IGNORED for t, learn in zip(ids, mask, strict=True)]
    ids = _render(messages, tokenizer, False)
    if not assistant_only:
        return ids, list(ids)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:turn], tokenizer, True) if turn else []
        after = _render(messages[: turn + 1], tokenizer, False)
        for part in (before, after):
            if ids[: len(part)] != part:
                raise UsageError(
                    f"{where}: message {turn + 1} cannot be told from the others: the chat "
                    "template renders the conversation up to it in another way alone"
                )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def pad_batch(rows: Sequence[tuple[list[int], list[int]]], padding: int) -> dict[str, Tensor]:
    """`rows` of ids and labels as ``input_ids``, ``labels`` and ``attention_mask``, each int64
    [rows, longest], filled up on the right."""
    longest = max(len(ids) for ids, _ in rows)

    def filled(values: list[list[int]], rest: int) -> Tensor:
        return torch.tensor([v + [rest] * (longest - len(v)) for v in values])

    return {
        "input_ids": filled([ids for ids, _ in rows], padding),
        "labels": filled([labels for _, labels in rows], IGNORED),
        "attention_mask": filled([[1] * len(ids) for ids, _ in rows], 0),
    }


def _render(messages: Sequence[Mapping[str, str]], tokenizer: Any, prompt: bool) -> list[int]:
    found = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=prompt, return_dict=True
    )
    return list(found["input_ids"])
