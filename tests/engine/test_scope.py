# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which tokens the prompt is generated from: every rule, and no leak from the response."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel, get_peft_model
from scoped_rows import IDS, LABELS, MASK, SPLIT, TEMPLATE, changed, prompted, prompts
from tiny import VOCAB, adapted, assert_same, batch, causal_lm, configure, perturb

from peft_instance_prompt import IAPTConfig, instruction_scope
from peft_instance_prompt.engine.edits import from_length
from peft_instance_prompt.engine.request import Request
from peft_instance_prompt.engine.scope import find_scope, from_labels, from_mask, from_template


SHIFTED = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], dim=1)


# ------------------------------------------------------------------------------------------------------ what tells it

TELLS = {
    "instruction_mask": {"instruction_mask": MASK},
    "bool_mask": {"instruction_mask": MASK.bool()},
    "labels": {"labels": LABELS},
    "shift_labels": {"shift_labels": SHIFTED},
    "context": {},
    "template": {},
}


def depends_on(model: PeftModel, columns: range, expected: torch.Tensor, **kwargs) -> bool:
    """Whether the prompts of each row change with one of these tokens; a method may pass over some, or choose in steps."""
    others = torch.stack([prompts(model, changed(column, by), **kwargs) for column in columns for by in (3, 17, 40)])
    return bool(((others - expected).abs().amax(dim=(0, 1, 3, 4)) > 1e-3).all())


@pytest.mark.parametrize("tell", TELLS)
@pytest.mark.slots
def test_no_leak(method: str, tell: str) -> None:
    model = prompted(method, response_template=TEMPLATE if tell == "template" else None)
    with instruction_scope(MASK if tell == "context" else None):
        expected = prompts(model, IDS, **TELLS[tell])
        assert_same(expected, prompts(prompted(method), IDS, instruction_mask=MASK))
        for column in range(SPLIT, 11):
            assert_same(prompts(model, changed(column), **TELLS[tell]), expected)
        assert depends_on(model, range(3), expected, **TELLS[tell])
    # What is said of one call does not outlive it: here the whole row is the instance.
    if tell != "template":
        assert_same(prompts(model, IDS), prompts(model, IDS, instruction_mask=torch.ones_like(IDS)))


@pytest.mark.slots
def test_whole_row_is_the_instance_of_a_plain_call(method: str) -> None:
    model = prompted(method)
    assert depends_on(model, range(SPLIT, 11), prompts(model, IDS))


def test_response_logits_do_not_depend_on_later_tokens(method: str) -> None:
    model = prompted(method)
    with torch.no_grad():
        expected, actual = model(IDS, labels=LABELS), model(changed(10), labels=LABELS)
    assert_same(actual.logits[:, :10], expected.logits[:, :10])


@pytest.mark.slots
def test_precedence(kind: str) -> None:
    some = torch.zeros_like(IDS).index_fill(1, torch.arange(1, 4), 1)
    by_mask = prompts(prompted(kind), IDS, instruction_mask=some)
    by_template = prompts(prompted(kind), IDS, instruction_mask=MASK)
    early = IDS.clone()
    early[:, :4] = -100
    both = prompted(kind, response_template=TEMPLATE)
    assert_same(prompts(both, IDS, instruction_mask=some, labels=early), by_mask)
    assert_same(prompts(both, IDS, labels=early), by_template)
    with instruction_scope(MASK):  # what is given to the call itself is nearer
        assert_same(prompts(prompted(kind), IDS, instruction_mask=some), by_mask)
    # In `generate` the template is nearer than the prompt.
    how = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        assert_same(both.generate(IDS, **how).logits[0], both(IDS, instruction_mask=MASK).logits[:, -1])


def test_rule_of_generate_is_its_prompt(kind: str) -> None:
    model = prompted(kind)
    how = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    out = model.generate(IDS[:, :SPLIT], **how, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        forced = model(out.sequences, instruction_mask=MASK[:, : SPLIT + 2]).logits  # (2, SPLIT + 2, V)
    assert_same(torch.stack(out.logits, dim=1), forced[:, SPLIT - 1 : SPLIT + 1])


def test_training_with_labels_and_without(kind: str) -> None:
    model = prompted(kind).train()
    assert model(IDS, labels=LABELS).loss.isfinite()
    with pytest.raises(
        ValueError, match=r"training mode.*`instruction_mask`.*`instruction_scope\(mask\)`.*`response_template`"
    ):
        model(IDS)
    with instruction_scope(MASK):
        assert model(IDS).logits.shape == (2, 11, VOCAB)
    with pytest.raises(ValueError, match="training mode"):  # the context is over
        model(IDS)
    assert prompted(kind, response_template=TEMPLATE).train()(IDS).logits.shape == (2, 11, VOCAB)


def test_classifier_has_no_response(kind: str) -> None:
    torch.manual_seed(0)
    base = tf.LlamaForSequenceClassification(configure("llama", num_labels=3))
    model = get_peft_model(base, METHODS[kind](task_type="SEQ_CLS"))
    perturb(model).train()
    loss = model(**batch(9, 6), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite()


def test_all_padding_row_is_finite(method: str) -> None:
    model, inputs = prompted(method), batch(9, 6)
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        logits = model(**inputs).logits
        alone = model(inputs["input_ids"][:1]).logits
    assert logits.isfinite().all()
    assert_same(logits[:1], alone)
    labels = inputs["input_ids"].where(torch.arange(9) > 6, -100)
    labels[1] = -100
    model.train()(**inputs, labels=labels).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------- the rules as functions of tensors


def test_rules_by_hand() -> None:
    tokens = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    given = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 1]])
    assert from_mask(given, tokens).int().tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert from_mask(given[:, :2], tokens, prompt_length=2).int().tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
    ids = torch.tensor([[7, 3, 7, 3, 7], [3, 7, 3, 7, 3]])
    assert from_template([3, 7], ids, tokens).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert from_template([7, 3], ids, tokens).int().tolist() == [
        [0, 1, 1, 1, 0],
        [1, 1, 1, 0, 0],
    ]  # not in the padding
    labels = torch.tensor([[-100, -100, 3, -100, 7], [-100, 7, 3, -100, -100]])
    assert from_labels(labels, tokens, shifted=False).int().tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert from_labels(labels, tokens, shifted=True).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert torch.equal(find_scope(tokens, Request()), tokens)
    assert find_scope(tokens, Request(prompt_length=2)).int().tolist() == [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert torch.equal(find_scope(tokens, Request(labels=labels)), tokens), "only a causal model has a response"


def test_request_of_rows() -> None:
    request = Request(instruction_mask=torch.arange(3)[:, None], labels=torch.arange(3)[:, None])
    assert request.of_rows(3, torch.tensor([2, 0])).instruction_mask.flatten().tolist() == [2, 0]
    assert request.of_rows(3, None).labels.flatten().tolist() == [0, 1, 2]
    beams = Request(instruction_mask=torch.arange(3)[:, None], prompt_length=1)
    assert beams.of_rows(6, torch.tensor([1, 5])).instruction_mask.flatten().tolist() == [0, 2]


# ----------------------------------------------------------------------------------------------------------- plain text


def test_first_tokens_of_plain_text() -> None:
    tokens = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    assert from_length(2, tokens).int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.slots
def test_plain_text_does_not_leak(training: bool) -> None:
    """No logit at or before a token depends on later ones, and every token behind the first n sees the prompt."""
    config = IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=8, instruction_length=3, prompt_position="end")
    model, bare = adapted(causal_lm(), config), causal_lm()
    model.train(training)
    with torch.no_grad():
        expected, plain = model(IDS, labels=IDS).logits, bare(IDS).logits
        for column in range(1, 11):
            found = model(changed(column), labels=changed(column)).logits
            assert_same(found[:, :column], expected[:, :column])
        assert_same(expected[:, :2], plain[:, :2])
        assert ((expected - plain)[:, 2:].abs().amax(dim=(0, 2)) > 1e-3).all()


def test_plain_text_needs_slots_behind_it() -> None:
    with pytest.raises(ValueError, match="`instruction_length` needs `prompt_position='end'`, got 'before'"):
        IAPTConfig(instruction_length=4, prompt_position="before")
    with pytest.raises(ValueError, match="give one of them, got 4 and"):
        IAPTConfig(instruction_length=4, prompt_position="end", response_template=[3])
    with pytest.raises(ValueError, match="`instruction_length` must be at least 1, got 0"):
        IAPTConfig(instruction_length=0, prompt_position="end")
    with pytest.raises(ValueError, match="`missing_template` must be one of .*, got 'none'"):
        IAPTConfig(missing_template="none")
