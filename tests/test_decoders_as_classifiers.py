# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Decoders under a classifier."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from methods import METHODS
from tiny import adapted, assert_same, batch, configure


CLASSIFIERS = [
    (m, f)
    for i, m in enumerate(METHODS)
    for f in ("llama", "gpt2", "gemma3", "mistral")
    if i == 0 or f in ("llama", "gpt2")
]


@pytest.mark.parametrize(("method", "family"), CLASSIFIERS)
@torch.no_grad()
def test_decoder_as_classifier(method: str, family: str) -> None:
    torch.manual_seed(0)
    base = tf.AutoModelForSequenceClassification.from_config(configure(family, num_labels=3, pad_token_id=0)).eval()
    base.double()  # what is compared is equal but for rounding
    for name, parameter in base.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.25)
    left, right = batch(9, 6, side="left"), batch(9, 6, side="right")
    plain = base(**right, output_hidden_states=True)
    model = adapted(base, METHODS[method](task_type="SEQ_CLS"))
    out = model(**right, output_hidden_states=True)
    assert out.logits.shape == (2, 3)
    # The last token of a row is pooled, wherever the padding stands.
    scored = model.get_base_model().score(out.hidden_states[-1])  # (B, S, 3)
    for row, n in enumerate((9, 6)):
        alone = model(right["input_ids"][row : row + 1, :n]).logits[0]
        assert_same(out.logits[row], alone)
        assert_same(model(**left).logits[row], alone)
        assert_same(scored[row, n - 1], alone)
    assert (out.logits - plain.logits).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(**right).logits, plain.logits)
    # PEFT leaves the trained head in place.
    assert torch.equal(model.unload()(**right, output_hidden_states=True).hidden_states[-1], plain.hidden_states[-1])


@torch.no_grad()
def test_decoder_as_classifier_with_slots_at_the_end(kind: str) -> None:
    """Then it is the last slot that is pooled, which has seen the whole text and the prompt."""
    try:
        config = METHODS[kind](task_type="SEQ_CLS", prompt_position="end")
    except (TypeError, ValueError) as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    base = tf.AutoModelForSequenceClassification.from_config(configure("llama", num_labels=3)).eval()
    model = adapted(base, config)
    right, left = batch(9, 6, side="right"), batch(9, 6, side="left")
    out = model(**right).logits
    seen = []
    handle = base.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(right["input_ids"][:1])
    handle.remove()
    states = seen[-1]  # (1, 9 + L, d); before it, IDPG has a frozen pass without slots
    assert states.shape[1] > 9
    assert_same(out[0], model.get_base_model().score(states)[0, -1])
    assert_same(out[1], model(right["input_ids"][1:, :6]).logits[0])
    assert_same(model(**left).logits, out)
