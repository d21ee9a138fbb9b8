# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Packed rows: which tokens of each sequence its prompt is generated from."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS
from packed_rows import LENGTHS, labels_of, packed, texts
from tiny import VOCAB, adapted, assert_same, causal_lm, generator_of

from peft_instance_prompt.engine.intercept import intercept


@pytest.mark.parametrize("how", ["instruction_mask", "response_template", "instruction_length", "nothing"])
@torch.no_grad()
def test_scope_of_each_sequence(how: str) -> None:
    a, b, c = texts(*LENGTHS)
    for ids in (a, b, c):
        ids[0, 2] = 2
    fields = {"response_template": [2]} if how == "response_template" else {}
    if how == "instruction_length":
        fields = {"instruction_length": 3, "prompt_position": "end"}
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM", **fields))
    masks = [torch.arange(ids.shape[1])[None] < 3 for ids in (a, b, c)]
    batch = packed([[a, b, c]])
    del batch["labels"]
    told = {"instruction_mask": torch.cat(masks, dim=1)} if how == "instruction_mask" else {}
    found = model(**batch, **told).logits
    column = 0
    for ids, mask in zip((a, b, c), masks):
        told = {} if how == "nothing" else {"instruction_mask": mask}
        own = slice(column, column := column + ids.shape[1])
        assert_same(found[:, own], model(ids, **told).logits)


@pytest.mark.parametrize("form", ["padded", "packed"])
@torch.no_grad()
@pytest.mark.slots
def test_plain_text_does_not_leak(kind: str, form: str) -> None:
    """No logit at or before a token depends on later tokens, and no prompt on a token behind the first three of its text."""
    if kind == "dynamic_prompt":
        pytest.skip("it chooses the places itself, and has no `instruction_length`")
    config = METHODS[kind](task_type="CAUSAL_LM", instruction_length=3, prompt_position="end")
    model = adapted(causal_lm(), config).train()
    row = texts(7, 5)
    batch = packed([row]) if form == "packed" else {"input_ids": row[0]}
    batch["labels"] = batch["input_ids"].clone()
    starts = (0, 7) if form == "packed" else (0,)

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        made: list[torch.Tensor] = []
        with intercept(lambda found: made.append(found.values)):
            return model(**{**batch, "input_ids": ids, "labels": ids}).logits, made

    ids = batch["input_ids"]
    logits, prompts = run(ids)
    for column in range(1, ids.shape[1]):
        other = ids.clone()
        other[:, column:] = (other[:, column:] + 7) % (VOCAB - 3) + 3
        found, changed = run(other)
        assert_same(found[:, :column], logits[:, :column])
        assert (found[:, column:] - logits[:, column:]).abs().max() > 1e-3
        for number, start in enumerate(starts):
            differs = max(float((one[number] - two[number]).abs().max()) for one, two in zip(prompts, changed))
            assert differs < 1e-5 if column >= start + 3 else differs > 1e-4, (column, number)


@pytest.mark.parametrize("shifted", [False, True])
def test_scope_by_labels(shifted: bool) -> None:
    """Labels of all tokens beside the one that belongs to the next sequence, which tells this one nothing."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    batch, row = packed([texts(*LENGTHS)]), texts(*LENGTHS)
    labels = batch.pop("labels")
    labels[0, 7:11] = -100  # the second sequence has no answer, so it is an instruction as a whole
    labels[0, 11] = 5  # the first label of the third, of a collator that does not mask it
    labels[0, 12] = -100
    if shifted:
        found = model(**batch, shift_labels=torch.cat([labels[:, 1:], labels.new_full((1, 1), -100)], dim=1)).logits
        assert_same(found[:, 7:11], model(row[1], labels=torch.full_like(row[1], -100)).logits)
        return
    with pytest.raises(ValueError, match=r"No token is left .* in row\(s\) \[2\].*of a packed batch"):
        model(**batch, labels=labels)


def test_continuation_without_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collator masks the first label of each sequence, so its first token is all the instruction that there is."""
    monkeypatch.setattr(
        "peft_instance_prompt.engine.scope._SAID", dict.fromkeys(("turns", "plain", "continuation"), False)
    )
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")).train()
    batch, row = packed([texts(*LENGTHS)]), texts(*LENGTHS)
    batch["input_ids"][0, 7] = row[1][0, 0] = 2  # a special token at its head does not end a run
    batch["labels"][0, 8:11] = batch["input_ids"][0, 8:11]
    with pytest.warns(UserWarning, match="first token alone.*`instruction_length`"):
        found = model(**batch).logits
    first = torch.arange(4)[None] < 1
    assert_same(found[:, 7:11], model(row[1], instruction_mask=first, labels=labels_of(row[1], 1)).logits)


def test_continuation_without_the_template() -> None:
    config = METHODS["iapt"](task_type="CAUSAL_LM", response_template=[2], missing_template="all")
    model = adapted(causal_lm(), config).train()
    row = texts(*LENGTHS)
    row[0][0, 1] = 2
    batch = packed([row])
    batch["labels"][0, 8:11] = batch["input_ids"][0, 8:11]
    found = model(**batch).logits
    first = torch.arange(4)[None] < 1
    assert_same(found[:, 7:11], model(row[1], instruction_mask=first, labels=labels_of(row[1], 1)).logits)
    generator_of(model).config.missing_template = "error"
    with pytest.raises(ValueError, match=r"does not occur in row\(s\) \[1, 2\].*of a packed batch"):
        model(**batch)


def test_training_without_a_scope_is_refused() -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")).train()
    batch = packed([texts(*LENGTHS)])
    del batch["labels"]
    with pytest.raises(ValueError, match="cannot tell instruction from response"):
        model(**batch)
    with pytest.raises(ValueError, match=r"the shape of the tokens, \(1, 20\), got \(1, 7\)"):
        model(**batch, instruction_mask=torch.ones(1, 7).bool())
    with pytest.raises(TypeError, match="bools or 0/1 integers"):
        model(**batch, instruction_mask=torch.ones(1, 20))


@torch.no_grad()
def test_vectors_of_sequences() -> None:
    """`instance_embeds` have a row per sequence."""
    config = METHODS["idpg"](task_type="CAUSAL_LM", instance_source="instance_embeds", instance_embeds_dim=8)
    model = adapted(causal_lm(), config)
    vectors, row = torch.randn(3, 8), texts(*LENGTHS)
    found = model(**packed([row]), instance_embeds=vectors).logits
    for number, own in enumerate((slice(0, 7), slice(7, 11), slice(11, 20))):
        alone = model(row[number], labels=labels_of(row[number]), instance_embeds=vectors[number : number + 1])
        assert_same(found[:, own], alone.logits)
    with pytest.raises(ValueError, match=r"`instance_embeds` must have the shape.*\(3, 8\), got \(1, 8\)"):
        model(**packed([row]), instance_embeds=vectors[:1])
