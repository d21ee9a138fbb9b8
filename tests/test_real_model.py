# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""On a real language model: a fresh adapter of each method must hardly change what the model says."""

from __future__ import annotations

import math

import pytest
import torch
from methods import KINDS, METHODS
from peft import get_peft_model

from smollm2 import load_smollm2
from vader import sentiment_splits


pytestmark = pytest.mark.slow

# At their own defaults, unlike the tiny ones of the other tests.
DEFAULTS = {name: type(METHODS[name]()) for name in KINDS}


@pytest.fixture(scope="module")
def reviews():
    model, tokenizer = load_smollm2()
    examples = sentiment_splits("movie", n_test=24, seed=0)[1]
    texts = [f"Review: {example['text']}\nSentiment: {example['label']}" for example in examples]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    first = batch["attention_mask"].argmax(dim=1, keepdim=True)  # (B, 1)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # The first token has nothing before it without a prompt, but has the prompt with one: it does not count.
    labels = labels.scatter(1, first, -100)
    return model, {**batch, "labels": labels}


@torch.no_grad()
def per_token_loss(model, batch) -> float:
    return model(**batch).loss.item()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapter_is_nearly_a_no_op(reviews, kind) -> None:
    model, batch = reviews
    before = per_token_loss(model, batch)
    # The whole text is scored here, and any scope does: a fresh adapter's prompts do not depend on it.
    scope = batch["attention_mask"]
    extra = {"instruction_mask": scope}
    peft_model = get_peft_model(model, DEFAULTS[kind](task_type="CAUSAL_LM")).eval()
    try:
        with torch.no_grad():
            after = peft_model(**batch, **extra).loss.item()
    finally:
        model = peft_model.unload()
    assert math.isclose(after, before, rel_tol=0.02), f"{kind}: {before:.3f} -> {after:.3f}"
    assert per_token_loss(model, batch) == before
