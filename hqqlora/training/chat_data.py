"""Instruction data: conversations and completions as tokens and labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hqqlora.command.errors import UsageError, explaining
from hqqlora.training.batches import IGNORED, Row

Messages = list[dict[str, str]]

_ROLES = ("system", "user", "assistant")
# as transformers finds it
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Instruction:
    """One record: a prompt and its completion, or without one a whole conversation."""

    where: str
    prompt: str | Messages
    completion: str | Messages | None = None

    @property
    def characters(self) -> int:
        """How many it has."""
        return _characters(self.prompt) + _characters(self.completion or "")


def check_messages(messages: Any, where: str) -> Messages:
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


def encode(record: Instruction, tokenizer: Any, learn_prompts: bool = False) -> Row:
    """A record's token ids and its labels, equally many: `IGNORED` outside of the completion,
    or of the assistant's turns, unless all tokens are to be learned.

    Raises:
        UsageError: see `encode_messages`; or a completion's prompt is not how both together
            begin.
    """
    prompt, completion = record.prompt, record.completion
    if isinstance(prompt, str):
        assert isinstance(completion, str)
        ids, start = _encode_completion(prompt, completion, tokenizer)
    elif completion is None:
        return encode_messages(prompt, tokenizer, record.where, not learn_prompts)
    else:
        assert isinstance(completion, list)
        _check_template(tokenizer, record.where)
        ids = _render([*prompt, *completion], tokenizer, record.where)
        before = _render(prompt, tokenizer, record.where, prompt=True)
        if ids[: len(before)] != before:
            raise UsageError(
                f"{record.where}: the completion cannot be told from the prompt: the chat "
                "template renders the prompt in another way alone"
            )
        start = len(before)
    return ids, list(ids) if learn_prompts else [IGNORED] * start + ids[start:]


def encode_messages(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    where: str,
    assistant_only: bool = True,
) -> Row:
    """A conversation's token ids and its labels, equally many: `IGNORED` outside of the
    assistant's turns, unless all tokens are to be learned.

    The turns are those that a template marks with ``{% generation %}``, and a special token
    right behind one that has none, which ends it; else they are found by rendering the
    conversation up to each, so that a turn's end is learned too.

    Raises:
        UsageError: the tokenizer has no chat template, or it refuses the conversation; or the
            conversation up to a turn is not how the whole one begins. The message begins with
            `where`.
    """
    template = _check_template(tokenizer, where)
    if assistant_only and _GENERATION.search(template):
        return _encode_marked(messages, tokenizer, where)
    ids = _render(messages, tokenizer, where)
    if not assistant_only:
        return ids, list(ids)
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:turn], tokenizer, where, prompt=True) if turn else []
        last = turn + 1 == len(messages)
        after = ids if last else _render(messages[: turn + 1], tokenizer, where)
        for part in (before, after):
            if ids[: len(part)] != part:
                raise UsageError(
                    f"{where}: message {turn + 1} cannot be told from the others: the chat "
                    "template renders the conversation up to it in another way alone"
                )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def render_prompt(record: Instruction, tokenizer: Any) -> str:
    """What a model is to continue, as text: the prompt; of a whole conversation, what comes
    before the assistant's first turn.

    Raises:
        UsageError: see `encode_messages`.
    """
    if isinstance(record.prompt, str):
        return record.prompt
    messages = record.prompt
    if record.completion is None:
        roles = [message["role"] for message in messages]
        messages = messages[: roles.index("assistant") if "assistant" in roles else None]
    _check_template(tokenizer, record.where)
    with explaining(f"{record.where}: the chat template refuses the prompt"):
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    return text


def _encode_completion(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], int]:
    """The ids of both together, and how many of them are the prompt's: where a token holds
    characters of both, the completion begins with it."""
    end = tokenizer.eos_token
    if end is not None and not completion.endswith(end):
        completion += end
    ids = list(tokenizer(prompt + completion, verbose=False).input_ids)
    before = tokenizer(prompt, verbose=False).input_ids
    start = 0
    while start < min(len(before), len(ids)) and before[start] == ids[start]:
        start += 1
    return ids, start


def _encode_marked(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, where: str
) -> tuple[list[int], list[int]]:
    with explaining(f"{where}: the chat template refuses the conversation"):
        found = tokenizer.apply_chat_template(
            list(messages),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
    ids, learned = list(found["input_ids"]), list(map(bool, found["assistant_masks"]))
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ended = False  # whether the run of learned tokens so far holds a special one
    for place, id in enumerate(ids):
        if learned[place]:
            ended = ended or id in special
        elif place and learned[place - 1] and not ended and id in special:
            learned[place] = ended = True
        else:
            ended = False
    return ids, [id if learn else IGNORED for id, learn in zip(ids, learned, strict=True)]


def _check_template(tokenizer: Any, where: str) -> str:
    """The chat template, the default one of several."""
    if not tokenizer.chat_template:
        raise UsageError(
            f"{where}: the tokenizer {tokenizer.name_or_path!r} has no chat template: take an "
            "instruction-tuned model's, or set chat_template in tokenizer_config.json"
        )
    with explaining(f"{where}: the tokenizer's chat template"):
        template: str = tokenizer.get_chat_template()
    return template


def _render(
    messages: Sequence[Mapping[str, str]], tokenizer: Any, where: str, prompt: bool = False
) -> list[int]:
    with explaining(f"{where}: the chat template refuses the conversation"):
        found = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=prompt,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )
    return list(found["input_ids"])


def _characters(text: str | Messages) -> int:
    if isinstance(text, str):
        return len(text)
    return sum(len(message["content"]) for message in text)
