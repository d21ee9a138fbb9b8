# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""TRL's SFTTrainer on conversations of several turns, against losses computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, causal_lm, generator_of, tokenizer
from torch.nn.functional import cross_entropy
from trainers import (
    collate,
    little_garbage,  # noqa: F401, around all tests of a file
    sft,
)


@pytest.fixture
def chat_config(tmp_path: Path) -> Callable:
    """A config whose `response_template` is found in the tokenizer's chat template."""
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    fields = {"response_template": "chat", "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    return lambda kind="iapt", **kw: METHODS[kind](task_type="CAUSAL_LM", **fields, **kw)


def said(*turns: str) -> dict:
    """A conversation, in which user and assistant take turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def chat_batch(data: list[dict], cut: int | None = None, assistant_only: bool = False) -> dict[str, torch.Tensor]:
    """Conversations as token ids, by hand, cut off at a length; what is learned is the answers only, or all tokens."""
    made = []
    for row in data:
        ids, learned = [], []
        for turn in row["messages"]:
            words = tokenizer()(turn["content"] + " </s>", add_special_tokens=False)["input_ids"]
            answer = turn["role"] == "assistant"
            ids += [5 if answer else 4, *words]  # w1 or w0
            learned += [not assistant_only, *[answer or not assistant_only] * len(words)]
        labels = [token if own else -100 for token, own in zip(ids, learned)]
        made.append({"input_ids": ids[:cut], "labels": labels[:cut]})
    return collate(made)


@torch.no_grad()
def chat_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> float:
    """The loss with prompts that are made of what stands up to the first `w1`, by rule 1; of all of a row without it. A method that edits
    states edits all but the answers, from behind `w1` to `</s>`."""
    marks = batch["input_ids"] == 5
    scope = (marks.cumsum(dim=1) - marks.long() == 0) & (batch["attention_mask"] == 1)
    if generator_of(model).edits:
        for row, ids in enumerate(batch["input_ids"].tolist()):
            answering = False
            for column, token in enumerate(ids):
                scope[row, column] = bool(batch["attention_mask"][row, column]) and not answering
                answering = token == 5 or (answering and token != 2)
    logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"], instruction_mask=scope).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100))


def marks_user_turns() -> bool:
    """Whether the tokenizer says that the user's second turn is the assistant's, as transformers 5.18 does."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    turns = said("w5", "w6", "w7", "w8")["messages"]  # w0 w5 </s> w1 w6 </s> w0 w7 </s> w1 w8 </s>
    return tokenizer().apply_chat_template(turns, **how)["assistant_masks"] != [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("assistant_only", [False, True])
def test_sft_of_conversations(kind: str, assistant_only: bool, chat_config: Callable, tmp_path: Path) -> None:
    """`messages` as they are, of several turns: one more word in the config."""
    data = [said(f"w{5 + i} w{6 + i}", f"w{8 + i}", *[f"w{20 + i}", f"w{30 + i} w9"] * (i % 2)) for i in range(8)]
    if assistant_only and marks_user_turns():
        pytest.skip("this transformers takes what stands between two answers for an answer, too")
    model = adapted(causal_lm(), chat_config(kind))
    trainer = sft(tmp_path, data, model, assistant_only_loss=assistant_only)
    trainer.train()
    expected = chat_loss(model, chat_batch(data, assistant_only=assistant_only))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_sft_of_conversations_without_a_template_proposes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^All tokens of row.* are scored.*`response_template` .chats: 'chat'"):
        sft(tmp_path, [said("w5", "w6")] * 8).train()


LONG = [said("w9 " * (4 * i % 12), f"w{8 + i}") for i in range(8)]  # cut off at 8, some have no answer


def test_sft_of_conversations_that_are_cut_off(chat_config: Callable, tmp_path: Path) -> None:
    """Where answers only are learned, TRL leaves out a row that was cut off before its answer."""
    model = adapted(causal_lm(), chat_config())
    trainer = sft(tmp_path, LONG, model, assistant_only_loss=True, max_length=8)
    trainer.train()
    batch = chat_batch(LONG, cut=8, assistant_only=True)
    assert ((batch["labels"] == -100).all(dim=1)).sum() > 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(chat_loss(model, batch), rel=1e-5)


def test_sft_of_all_tokens_of_conversations_that_are_cut_off(chat_config: Callable, tmp_path: Path) -> None:
    """There the prompt would read what is learned: that must be asked for."""
    with pytest.raises(ValueError, match="does not occur in row.*set `missing_template='all'`"):
        sft(tmp_path / "error", LONG, adapted(causal_lm(), chat_config()), max_length=8).train()
    model = adapted(causal_lm(), chat_config(missing_template="all"))
    trainer = sft(tmp_path / "all", LONG, model, max_length=8)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(chat_loss(model, chat_batch(LONG, cut=8)), rel=1e-5)
