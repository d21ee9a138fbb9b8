# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which masks, labels and batches are refused, and the warnings on a scope, which are given once."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from scoped_rows import IDS, LABELS, MASK, TOKENS, prompted
from tiny import assert_same, batch, causal_lm

from peft_instance_prompt import IAPTConfig, instruction_scope
from peft_instance_prompt.engine import scope as rules
from peft_instance_prompt.engine.scope import from_labels


# ------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (MASK[:, :5], ValueError, r"\(2, 11\).*\(2, 5\)"),
        (MASK[:1], ValueError, r"2.*\(1, 11\)"),
        (MASK[0], ValueError, r"2.*\(11,\)"),
        (MASK.float(), TypeError, "torch.float32"),
        (MASK.tolist(), TypeError, "list"),
        (MASK * torch.tensor([[1], [0]]), ValueError, r"all false in row\(s\) \[1\]"),
    ],
    ids=["short", "rows", "flat", "float", "list", "empty_row"],
)
def test_bad_instruction_mask(kind: str, mask, error: type, says: str) -> None:
    model = prompted(kind)
    with torch.no_grad():
        good = model(IDS, instruction_mask=MASK).logits
        with pytest.raises(error, match=says):
            model(IDS, instruction_mask=mask)
        with pytest.raises(error, match=says):
            model.generate(IDS, instruction_mask=mask, max_new_tokens=2)
        # Nothing of the broken call is left.
        assert torch.equal(model(IDS, instruction_mask=MASK).logits, good)


def test_instruction_mask_over_padding_only(kind: str) -> None:
    model, inputs = prompted(kind), batch(9, 6)
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"), torch.no_grad():
        model(**inputs, instruction_mask=(torch.arange(9) < 3).expand(2, -1))


def test_generate_with_a_mask_of_fewer_rows() -> None:
    """Within `generate` a row can have become several beams, so a mask of one row would be taken for all of them."""
    model, inputs = prompted("iapt").eval(), batch(9, 6)
    mask, message = torch.ones(1, 9), r"`instruction_mask` must have 2 row\(s\), as the input has; got \(1, 9\)"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2, instruction_mask=mask)
    with instruction_scope(mask), pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_labels_from_the_first_token_on(kind: str) -> None:
    model = prompted(kind).train()
    labels = LABELS.clone()
    labels[1] = IDS[1]
    with pytest.raises(ValueError, match=r"^All tokens of row\(s\) \[1\] are scored.*`response_template`"):
        model(IDS, labels=labels)
    with pytest.raises(ValueError, match=r"row\(s\) \[0, 1\]"):
        model(IDS, labels=IDS)
    # A row without any label has no response.
    labels[1] = -100
    assert model(IDS, labels=labels).loss.isfinite()


def test_an_instruction_of_special_tokens_only() -> None:
    """A collator that puts -100 on padding does so on BOS, where both are one token."""
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 1]])
    labels = ids.masked_fill(ids == 1, -100)
    tokens = torch.ones_like(ids).bool()
    with pytest.raises(
        ValueError, match=r"^All tokens of row\(s\) \[0, 1\] but special ones are scored.*`instruction_length`"
    ):
        from_labels(labels, tokens, False, ids, special_ids=(1, 2))
    model = get_peft_model(causal_lm(pad_token_id=1), IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=8))
    with pytest.raises(ValueError, match="but special ones are scored"):
        model(ids, labels=labels)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batch(kind: str, shape: tuple[int, int]) -> None:
    with (
        pytest.raises(ValueError, match=f"The batch is empty: {shape[0]} row\\(s\\) of {shape[1]} token"),
        torch.no_grad(),
    ):
        prompted(kind)(torch.zeros(shape, dtype=torch.long))


def test_bad_attention_mask(kind: str) -> None:
    model = prompted(kind)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"`attention_mask` must have the shape \(2, 11\), got \(2, 10\)"):
            model(IDS, attention_mask=torch.ones(2, 10))
        causal = torch.ones(2, 1, 11, 11).tril().bool()
        assert_same(model(IDS, attention_mask=causal).logits, model(IDS).logits)
        causal[:, :, 5:, 2] = False  # not padding: the tokens before 5 see it
        with pytest.raises(ValueError, match=r"`attention_mask` does not tell.*\(2, 1, 11, 11\).*as None, as 2-D"):
            model(IDS, attention_mask=causal)


# ------------------------------------------------------------------------------------------ several turns, and warnings


GAP = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0]] * 2)  # two turns, an answer between them


def test_a_mask_with_a_response_between_instructions() -> None:
    model = prompted("iapt")
    labels = IDS.clone()
    labels[GAP.bool()] = -100
    with pytest.raises(ValueError, match=r"predicted from a prompt that has read it: row\(s\) \[0, 1\] have labels"):
        model(IDS, instruction_mask=GAP, labels=labels)
    labels[:, :6] = -100  # the answer between is not asked for
    model(IDS, instruction_mask=GAP, labels=labels)
    model.train()
    with pytest.raises(ValueError, match="tokens between their instruction tokens, which are predicted in training"):
        model(IDS, instruction_mask=GAP)
    model.eval()
    model.generate(IDS, instruction_mask=GAP, max_new_tokens=2, do_sample=False)


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning was given before."""
    monkeypatch.setattr(rules, "_SAID", dict.fromkeys(rules._SAID, False))


def test_several_turns_are_said_once(unsaid: None) -> None:
    labels = torch.full_like(IDS, -100)
    labels[:, 3:5] = IDS[:, 3:5]
    from_labels(labels, TOKENS, shifted=False)
    labels[:, 8:] = IDS[:, 8:]
    with pytest.warns(UserWarning, match="several labelled spans.*`response_template`"):
        mask = from_labels(labels, TOKENS, shifted=False)
    assert mask.sum(dim=1).tolist() == [3, 3]
    from_labels(labels, TOKENS, shifted=False)  # warnings are errors here


def test_scoring_without_a_scope_is_said_once(unsaid: None) -> None:
    model = prompted("iapt")
    model(IDS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(IDS, logits_to_keep=1)  # of the next token: nothing in the rows is scored
        model.generate(IDS, max_new_tokens=1, do_sample=False)
    with pytest.warns(UserWarning, match="was not told which of their tokens are the instruction"):
        model(IDS)
    model(IDS)


@pytest.mark.parametrize("kept", [0, 2, torch.tensor([1])], ids=str)
def test_scoring_more_than_the_next_token_is_said(unsaid: None, kept: int | torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="was not told which of their tokens are the instruction"):
        prompted("iapt")(IDS, logits_to_keep=kept)
