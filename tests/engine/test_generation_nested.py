# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`generate` that calls a model on something else: assistants, a criterion of the caller's, and guidance."""

from __future__ import annotations

import pytest
import torch
from greedy_loop import EOS, GREEDY, NEW, by_hand, prompted
from methods import METHODS
from peft import PeftModel
from tiny import adapted, batch, causal_lm
from transformers import StoppingCriteria


@pytest.mark.parametrize("who", ["another", "itself", "itself_bare", "adapted"])
def test_assistant_model(method: str, family: str, who: str) -> None:
    model, inputs = prompted(method, family), batch(12)
    text, _ = by_hand(model, inputs)
    assistant = {
        "another": lambda: causal_lm(family, seed=1),
        "itself": lambda: model,  # every candidate is right
        "itself_bare": lambda: model.get_base_model(),
        "adapted": lambda: adapted(causal_lm(family, seed=1), METHODS[method](task_type="CAUSAL_LM")),
    }[who]()
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=assistant), text)


def test_adapted_assistant_of_a_bare_model(kind: str) -> None:
    model, inputs = causal_lm(), batch(9)
    text = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=prompted(kind)), text)


# ----------------------------------------------------------------------------------- the model called within `generate`


class Judge(StoppingCriteria):
    """Calls the model on a text of its own after each token."""

    def __init__(self, model: PeftModel, text: dict[str, torch.Tensor]):
        self.model, self.text, self.seen = model, text, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.seen.append(self.model(**self.text).logits)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("masked", [False, True])
def test_another_text_within_generate(kind: str, masked: bool) -> None:
    model, inputs, text = prompted(kind), batch(9, 6), batch(12, 10, seed=3)
    fields = {"instruction_mask": inputs["attention_mask"] * (torch.arange(9) < 7)} if masked else {}
    expected, judge = model(**text).logits, Judge(model, text)
    alone = model.generate(**inputs, **fields, **GREEDY)
    assert torch.equal(model.generate(**inputs, **fields, **GREEDY, stopping_criteria=[judge]), alone)
    assert len(judge.seen) == NEW and all(torch.equal(logits, expected) for logits in judge.seen)


def test_classifier_free_guidance(kind: str) -> None:
    """Against guidance by hand, where each of the two texts has the prompts of its own instruction."""
    model, inputs, negative = prompted(kind), batch(9), batch(12, seed=3)
    names = {"negative_prompt_ids": "input_ids", "negative_prompt_attention_mask": "attention_mask"}
    found = model.generate(
        **inputs, **GREEDY, guidance_scale=1.5, **{ours: negative[theirs] for ours, theirs in names.items()}
    )
    ids, unlike = inputs["input_ids"], negative["input_ids"]
    for _ in range(NEW):
        logits, other = (
            model(part, instruction_mask=torch.arange(part.shape[1])[None] < length, use_cache=False)
            .logits[:, -1]
            .log_softmax(dim=-1)
            for part, length in ((ids, 9), (unlike, 12))
        )
        guided = (1.5 * (logits - other) + other).index_fill(1, torch.tensor(EOS), -torch.inf)
        token = guided.argmax(dim=-1, keepdim=True)  # (1, 1)
        ids, unlike = torch.cat([ids, token], dim=1), torch.cat([unlike, token], dim=1)
    assert torch.equal(found, ids)
