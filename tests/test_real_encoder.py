# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""On a real encoder: a text's vector is the same beside other texts as alone, and the base model comes back."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS
from tiny import adapted, assert_same


@pytest.mark.slow
@torch.no_grad()
def test_minilm(kind: str) -> None:
    from minilm import load_minilm

    try:
        base, tokenizer = load_minilm()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be had here: {error}")
    texts = ["A gripping, beautiful film.", "I loved every minute of this movie.", "The printer is out of paper."]

    def vectors(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]  # (B, S, d), (B, S, 1)
        return torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)  # (B, d)

    plain = vectors(base, texts)
    model = adapted(base, METHODS[kind](task_type="FEATURE_EXTRACTION"))
    together = vectors(model, texts)
    assert (together - plain).abs().max() > 1e-2
    for row, text in enumerate(texts):
        assert_same(together[row], vectors(model, [text])[0])
    close, far = (plain @ plain.T)[0, 1:]
    assert close > 0.3 > far, "the model is not what it should be"
    assert torch.equal(vectors(model.unload(), texts), plain)
