"""Conversations as tokens and labels, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hqqlora.command.errors import UsageError
from hqqlora.training.batches import IGNORED, pad_batch
from hqqlora.training.chat_data import (
    Instruction,
    check_messages,
    encode,
    encode_messages,
    render_prompt,
)
from hqqlora.training.next_token_loss import NextTokenLoss

pytest.importorskip("transformers")

PLAIN = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' end ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role + ' ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + ' end ' }}{% endgeneration %}"
    "{% else %}{{ m.content + ' end ' }}{% endif %}{% endfor %}"
)
MARKED_OTHERWISE = MARKED.replace("{% generation %}", "{%-generation   -%}")
UNENDED = MARKED.replace(
    "m.content + ' end ' }}{% endgen", "m.content + ' ' }}{% endgen"
).replace("{% endgeneration %}", "{% endgeneration %}{{ 'end ' }}")
LAST_ONLY = (
    "{% for m in messages %}{{ m.content + (' end ' if loop.last else ' ') }}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d d"},
]


def tokenizer(template: str | dict[str, str] | None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["?", "system", "user", "assistant", "end", "s", "a", "b", "c", "d"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token="end")
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [PLAIN, MARKED, MARKED_OTHERWISE, UNENDED])
def test_the_assistants_turns_and_their_ends_alone_are_learned(template: str) -> None:
    words = tokenizer(template)
    ids, labels = encode_messages(TALK, words, "f:1")
    assert words.decode(ids) == (
        "system s end user a end assistant b end user c end assistant d d end"
    )
    learned = [i for i, label in enumerate(labels) if label != IGNORED]
    assert learned == [7, 8, 13, 14, 15]
    assert [labels[i] for i in learned] == [ids[i] for i in learned]


def test_of_several_templates_the_default_one_is_used() -> None:
    words = tokenizer({"other": LAST_ONLY, "default": MARKED})
    assert encode_messages(TALK, words, "f:1") == encode_messages(TALK, tokenizer(MARKED), "")
    words = tokenizer({"other": PLAIN, "another": PLAIN})
    with pytest.raises(UsageError, match=r"^f:1: .*no default"):
        encode_messages(TALK, words, "f:1")


def test_what_a_template_refuses_is_said() -> None:
    words = tokenizer("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(UsageError, match=r"^f:1: the chat template .*Roles must alternate"):
        encode_messages(TALK, words, "f:1")


@pytest.mark.parametrize("completion", ["c d", "c d end"])
def test_a_completion_and_its_end_are_learned(completion: str) -> None:
    words = tokenizer(None)
    record = Instruction("f:1", "a b ", completion)
    ids, labels = encode(record, words)
    assert words.decode(ids) == "a b c d end"
    assert labels == [IGNORED, IGNORED, *ids[2:]]
    assert encode(record, words, learn_prompts=True) == (ids, ids)
    assert render_prompt(record, words) == "a b "


def test_a_token_of_prompt_and_completion_is_learned() -> None:
    """The words a and b without a space between them are another one."""
    ids, labels = encode(Instruction("f:1", "s a", "b c"), tokenizer(None))
    assert ids == [5, 0, 8, 4]
    assert labels == [IGNORED, 0, 8, 4]


def test_a_completion_of_messages_is_learned_whole() -> None:
    words = tokenizer(PLAIN)
    record = Instruction("f:1", TALK[:2], TALK[2:])
    ids, labels = encode(record, words)
    assert ids == encode_messages(TALK, words, "f:1")[0]
    assert labels == [IGNORED] * 7 + ids[7:]
    assert render_prompt(record, words) == "system s end user a end assistant "
    assert render_prompt(Instruction("f:1", TALK), words) == render_prompt(record, words)
    with pytest.raises(UsageError, match=r"^f:1: the completion cannot be told"):
        encode(record, tokenizer(LAST_ONLY))


def test_every_token_is_learned_if_asked_for() -> None:
    ids, labels = encode_messages(TALK, tokenizer(PLAIN), "f:1", assistant_only=False)
    assert labels == ids
    assert len(ids) == 16


def test_a_template_that_renders_beginnings_otherwise_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^f:7: message 3 cannot"):
        encode_messages(TALK, tokenizer(LAST_ONLY), "f:7")


def test_a_missing_template_is_named() -> None:
    with pytest.raises(UsageError, match=r"^f:1: the tokenizer .* has no chat template"):
        encode_messages(TALK, tokenizer(None), "f:1")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "an empty one"),
        ("a", "no list"),
        ([{"role": "user"}], "message 1 has other keys"),
        ([TALK[1], {"role": "x", "content": "a"}], "message 2 has the role 'x'"),
        ([{"role": ["user"], "content": "a"}], "message 1 has the role"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 is not text but list"),
    ],
)
def test_bad_messages_are_refused(messages: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=f"^f:3: .*{reason}"):
        check_messages(messages, "f:3")


def test_padding_is_neither_learned_nor_seen() -> None:
    batch = pad_batch([([5, 6, 7], [IGNORED, 6, 7]), ([8], [8])])
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.labels is not None
    assert batch.mask is not None
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.tokens == 4
    assert batch.predictions == 2  # not the 8: nothing is before it


@pytest.mark.parametrize("chunked", [True, False])
def test_a_padded_and_masked_batch_has_the_rows_own_loss_and_gradient(chunked: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    loss = NextTokenLoss(model)
    loss.chunked = chunked
    rows = [([5, 6, 7, 9, 3], [IGNORED, IGNORED, 7, 9, 3]), ([8, 4], [IGNORED, 4])]
    expected = torch.zeros(())
    for ids, labels in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), reduction="sum"
        )
    expected = expected / 4  # learned tokens of the whole batch, not a mean of the rows' means
    weight = model.model.embed_tokens.weight
    (gradient,) = torch.autograd.grad(expected, weight)
    batch = pad_batch(rows)
    found = loss.backward(*batch)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)
    everything = loss.backward(batch.ids, None, batch.mask)
    assert abs(everything - found) > 1e-3
    assert loss.sum(*batch) == pytest.approx(4 * expected.item(), rel=1e-5)
