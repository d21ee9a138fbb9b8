# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The response template: ids, text or what a chat template writes, and rows in which it does not stand."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import get_peft_model
from scoped_rows import IDS, MASK, SPLIT, TEMPLATE, TOKENS, prompted, prompts
from tiny import adapted, assert_same, causal_lm, letters, tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.engine.scope import from_template


# ------------------------------------------------------------------------------------------------------------- its form


@pytest.fixture
def tokenizer_folder(tmp_path) -> str:
    words = ["[UNK]", "<s>", "</s>", "Question", "Answer", ":", *(f"w{i}" for i in range(40))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.slots
def test_template_as_text(kind: str, tokenizer_folder: str) -> None:
    config = METHODS[kind](
        task_type="CAUSAL_LM", response_template="Answer :", tokenizer_name_or_path=tokenizer_folder
    )
    model = adapted(causal_lm(), config)
    assert model.peft_config["default"].response_template == [4, 5]
    ids = torch.tensor([[3, 5, 8, 9, 4, 5, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    assert_same(prompts(model, ids), prompts(prompted(kind), ids, instruction_mask=mask))


def test_template_as_text_with_the_models_own_tokenizer(kind: str, tokenizer_folder: str) -> None:
    base = causal_lm()
    base.config._name_or_path = base.name_or_path = tokenizer_folder
    model = get_peft_model(base, METHODS[kind](task_type="CAUSAL_LM", response_template="w1 Answer"))
    assert model.peft_config["default"].response_template == [7, 4]


def test_template_as_text_without_a_tokenizer(kind: str) -> None:
    with pytest.raises(ValueError, match="`tokenizer_name_or_path`"):
        get_peft_model(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", response_template="Answer:"))


@pytest.mark.slots
def test_template_is_stable_over_the_turns_of_a_chat(method: str) -> None:
    model = prompted(method, response_template=TEMPLATE)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(IDS[:, :SPLIT], attention_mask=MASK[:, :SPLIT], **how)
    turn = torch.cat([first.sequences, IDS[:, 2:SPLIT]], dim=1)  # the second question ends with the template as well
    mask = torch.ones_like(turn)
    goes_on = model.generate(turn, attention_mask=mask, past_key_values=first.past_key_values, **how)
    afresh = model.generate(turn, attention_mask=mask, **how)
    uncached = model.generate(turn, attention_mask=mask, use_cache=False, **how)
    assert torch.equal(goes_on.sequences, afresh.sequences)
    assert torch.equal(uncached.sequences, afresh.sequences)


# ------------------------------------------------------------------------------------------------------ rows without it


def test_template_that_does_not_occur(kind: str) -> None:
    model = prompted(kind, response_template=TEMPLATE)
    ids = IDS.clone()
    ids[1, SPLIT - 1] = 4
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"\[90, 91\] does not occur in row\(s\) \[1\]"):
            model(ids)
        with pytest.raises(ValueError, match="does not occur"):
            model(IDS[:, :1])
        embeds = model.get_input_embeddings()(IDS)
        with pytest.raises(ValueError, match="pass `instruction_mask`"):
            model(inputs_embeds=embeds)
        assert_same(model(inputs_embeds=embeds, instruction_mask=MASK).logits, model(IDS).logits)


def test_rows_without_the_template() -> None:
    ids = IDS.clone()
    ids[1, 3] = 40
    with pytest.raises(ValueError, match=r"does not occur in row\(s\) \[1\].*missing_template='all'"):
        from_template(TEMPLATE, ids, TOKENS)
    mask = from_template(TEMPLATE, ids, TOKENS, missing="all")
    assert mask.sum(dim=1).tolist() == [SPLIT, 11]
    short = from_template(TEMPLATE, torch.tensor([[5]]), torch.ones(1, 1).bool(), missing="all")
    assert short.tolist() == [[True]]


@pytest.mark.slots
def test_a_row_that_asks_for_nothing_needs_no_template(kind: str) -> None:
    """As `max_length` leaves a conversation that it cuts off before the answer, where only answers are learned."""
    ids, labels = IDS.clone(), IDS.clone()
    ids[1, 3] = 40
    labels[:, :SPLIT] = labels[1] = -100
    mask = MASK.clone()
    mask[1] = 1
    model = prompted(kind, response_template=TEMPLATE)
    assert_same(prompts(model, ids, labels=labels), prompts(prompted(kind), ids, instruction_mask=mask))
    labels[1, -1] = 40
    with pytest.raises(ValueError, match=r"does not occur in row\(s\) \[1\]"):
        prompts(model, ids, labels=labels)


def test_a_template_that_another_tokenizer_writes(tmp_path) -> None:
    """The adapter's ids are of the tokenizer that it was made with; the data may come from another."""
    words = tokenizer()
    words.save_pretrained(tmp_path / "first")
    words.chat_template = words.chat_template.replace("w1 ", "w2 ")
    model = adapted(
        causal_lm(),
        IAPTConfig(task_type="CAUSAL_LM", response_template="chat", tokenizer_name_or_path=str(tmp_path / "first")),
    )
    chat = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w7"}]
    ids = torch.tensor([words.apply_chat_template(chat, tokenize=True, return_dict=False)])
    says = r"`response_template` 'w1' does not occur in row\(s\) \[0\]: row 0 ends in 'w0 w9 </s> w2 w7 </s>'"
    with pytest.raises(ValueError, match=says):
        model(ids, labels=ids)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        (
            "tokenizer.json",
            '{"added_tokens": [], "model": {"type": "none"}}',
        ),  # `tokenizers` raises `Exception` itself
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["a.X", null]}}'),
    ],
)
def test_a_tokenizer_that_cannot_be_read(file: str, text: str | None, tmp_path, monkeypatch) -> None:
    """The complaint is about the template all the same, in ids, and nobody is asked whether remote code may run."""
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"asked: {prompt}"))
    model = prompted("iapt", response_template=TEMPLATE, tokenizer_name_or_path=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"`response_template` \[.*\] does not occur in row\(s\) \[0, 1\]: row 0 ends in the"
    ):
        prompts(model, IDS + 1)


def test_another_error_than_that_of_a_tokenizer_is_not_hidden(monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", broken)
    model = prompted("iapt", response_template=TEMPLATE, tokenizer_name_or_path="some/name")
    with pytest.raises(RuntimeError, match="out of memory"):
        prompts(model, IDS + 1)


def test_a_template_that_ends_in_a_space(tmp_path) -> None:
    """It is there as text, but the tokenizer writes the space with the word behind it. The message tells the ids that are there."""
    name = letters(tmp_path)
    words = tf.AutoTokenizer.from_pretrained(name)
    rows = words(["Question: {no} Answer: yes", "Question: on Answer: no"], padding=False)["input_ids"]
    ids = torch.zeros(2, 30, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(rows):
        ids[row, -len(own) :], mask[row, -len(own) :] = torch.tensor(own), 1
    model = adapted(
        causal_lm(), IAPTConfig(task_type="CAUSAL_LM", response_template="Answer: ", tokenizer_name_or_path=name)
    )
    with pytest.raises(
        ValueError, match=r"'Answer: ' does not occur in row\(s\) \[0, 1\] as the tokens \[.*Give these ids"
    ) as caught:
        model(ids, attention_mask=mask)
    told = json.loads(re.search(r"row 0 has its text as (\[.*?\])", str(caught.value))[1])
    assert words.decode(told) in ("Answer:", " Answer:")
    cured = prompted("iapt", response_template=told)
    behind = [n - len(words(" yes" if row == 0 else " no")["input_ids"]) for row, n in enumerate(map(len, rows))]
    scope = mask.cumsum(dim=1).le(torch.tensor(behind)[:, None]) & mask.bool()
    assert_same(
        prompts(cured, ids, attention_mask=mask),
        prompts(prompted("iapt"), ids, attention_mask=mask, instruction_mask=scope),
        1e-6,
    )


def test_a_row_without_the_template_is_shown(tmp_path) -> None:
    """The first one, by its end and without its padding; as ids, where the tokenizer is not on this machine."""
    name = letters(tmp_path)
    words = tf.AutoTokenizer.from_pretrained(name)
    good, bad = (words(text)["input_ids"] for text in ("Answer: no", "{}yes: no"))
    ids = torch.tensor([good, bad + [0] * (len(good) - len(bad))])
    mask = torch.tensor([[1] * len(good), [1] * len(bad) + [0] * (len(good) - len(bad))])
    how = {"task_type": "CAUSAL_LM", "response_template": words("Answer:")["input_ids"]}
    model = adapted(causal_lm(), IAPTConfig(tokenizer_name_or_path=name, **how))
    with pytest.raises(
        ValueError, match=r"'Answer:' does not occur in row\(s\) \[1\]: row 1 ends in '\{\}yes: no'\. "
    ):
        model(ids, attention_mask=mask)
    model = adapted(causal_lm(), IAPTConfig(tokenizer_name_or_path=str(tmp_path / "nowhere"), **how))
    shown = re.escape(", ".join(map(str, bad[-6:])))
    with pytest.raises(
        ValueError, match=rf"\] does not occur in row\(s\) \[1\]: row 1 ends in the tokens \[\.\.\., {shown}\]"
    ):
        model(ids, attention_mask=mask)


@pytest.mark.slots
def test_the_config_says_what_a_row_without_the_template_is(kind: str) -> None:
    ids = IDS.clone()
    ids[1, 3] = 40
    with pytest.raises(ValueError, match="does not occur in row"):
        prompts(prompted(kind, response_template=TEMPLATE), ids)
    found = prompts(prompted(kind, response_template=TEMPLATE, missing_template="all"), ids)
    mask = MASK.clone()
    mask[1] = 1
    assert_same(found, prompts(prompted(kind), ids, instruction_mask=mask))


# ------------------------------------------------------------------------------------------------------- chat templates


@pytest.fixture
def chat_folder(tmp_path) -> str:
    tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.slots
def test_chat_template_is_what_stands_before_an_answer(chat_folder: str, kind: str) -> None:
    make = METHODS[kind]
    config = make(task_type="CAUSAL_LM", response_template="chat", tokenizer_name_or_path=chat_folder)
    model = adapted(causal_lm(), config)
    words = tokenizer()
    assert model.peft_config["default"].response_template == words("w1", add_special_tokens=False)["input_ids"]
    text = words.apply_chat_template(
        [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}],
        tokenize=True,
        return_dict=False,
    )
    ids = torch.tensor([text])
    question = text.index(words("w1", add_special_tokens=False)["input_ids"][0]) + 1
    mask = (torch.arange(len(text)) < question)[None].long()
    assert_same(prompts(model, ids), prompts(prompted(kind), ids, instruction_mask=mask))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "has no chat template"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "writes nothing between a user's turn and the answer",
        ),
        (
            "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}",
            "and something else before an answer that is there",
        ),
        (
            "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}w0 {% endfor %}",
            r"refuses a user's turn and an assistant's answer \(users only\)",
        ),
    ],
)
def test_chat_templates_that_tell_nothing(tmp_path, template: str | None, complaint: str) -> None:
    words = tokenizer()
    words.chat_template = template
    words.save_pretrained(tmp_path)
    config = IAPTConfig(task_type="CAUSAL_LM", response_template="chat", tokenizer_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=complaint):
        get_peft_model(causal_lm(), config)
