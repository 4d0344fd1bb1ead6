"""A sample completion, to see what the numbers mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hqqlora.evaluating import evaluating

_PROMPT_CHARACTERS = 200


@dataclass(frozen=True)
class Prompt:
    """What a sample continues: a text, or what a chat template has rendered, which holds every
    special token already."""

    text: str
    rendered: bool = False


def default_prompt(text: str) -> str:
    """The beginning of a text, cut between words."""
    prompt = text[: min(len(text) // 2, _PROMPT_CHARACTERS)]
    return prompt.rsplit(None, 1)[0] if len(prompt.split()) > 1 else prompt


@torch.no_grad()
def complete(model: nn.Module, tokenizer: Any, prompt: Prompt, tokens: int) -> str:
    """How `model` goes on after `prompt`, the likeliest token each time, at most `tokens`."""
    generator: Any = model
    inputs = tokenizer(
        prompt.text, add_special_tokens=not prompt.rendered, return_tensors="pt", verbose=False
    )
    padding = tokenizer.pad_token_id
    with evaluating(model):
        ids = generator.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.eos_token_id if padding is None else padding,
        )
    text: str = tokenizer.decode(
        ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text
