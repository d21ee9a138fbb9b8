# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`generate` without a KV cache: rows grow, and prompts stay those of what `generate` was called with. Against loops by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from greedy_loop import EOS, GREEDY, NEW, prompted
from methods import METHODS, WITHOUT_SLOTS
from peft import PeftModel
from tiny import adapted, assert_same, batch, causal_lm
from transformers import GenerationConfig, StoppingCriteria

from peft_instance_prompt import instruction_scope


RULES = ["none", "mask", "template", "written_template", "split_template", "missing_all", "instruction_length"]
TEMPLATE = [90, 91]
Text = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids, padding mask and instruction, (B, S) each


@torch.no_grad()
def by_hand(model: PeftModel, texts: list[Text], scale: float = 1.0, steps: int = NEW) -> tuple[torch.Tensor, ...]:
    """Greedy text (B, S + steps) and scores (B, steps, V) of the first text, guided by the second, each with its own prompts."""
    scores = []
    for _ in range(steps):
        logits = [
            model(ids, attention_mask=mask, instruction_mask=scope, use_cache=False).logits[:, -1]
            for ids, mask, scope in texts
        ]
        if len(logits) == 2:
            own, other = (each.log_softmax(dim=-1) for each in logits)
            logits = [scale * (own - other) + other]
        scores.append(logits[0].index_fill(1, torch.tensor(EOS), -torch.inf))  # as `min_new_tokens` has it
        token = scores[-1].argmax(dim=-1, keepdim=True)  # (B, 1)
        beside = (token, torch.ones_like(token), torch.zeros_like(token))
        texts = [tuple(torch.cat(pair, dim=1) for pair in zip(text, beside)) for text in texts]
    return texts[0][0], torch.stack(scores, dim=1)


def check(model: PeftModel, expected: tuple[torch.Tensor, ...], **call: Any) -> None:
    """With the cache and without one, `generate` writes and scores what the loop does."""
    for use_cache in (True, False):
        out = model.generate(**call, **GREEDY, use_cache=use_cache, output_scores=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected[0]), use_cache
        found = torch.stack(out.scores, dim=1)
        assert torch.equal(found.isinf(), expected[1].isinf())
        assert_same(found.nan_to_num(neginf=0), expected[1].nan_to_num(neginf=0))


def whole(inputs: dict[str, torch.Tensor]) -> Text:
    return inputs["input_ids"], inputs["attention_mask"], inputs["attention_mask"]


def ruled(kind: str, rule: str, family: str) -> tuple[PeftModel, dict[str, Any], torch.Tensor]:
    """A model with an adapter of a rule, the call, and the instruction (B, S) that the rule finds."""
    inputs = batch(9, 6)
    scope, fields = inputs["attention_mask"].clone(), {}
    if rule == "template":
        inputs["input_ids"][:, 5:7] = torch.tensor(TEMPLATE)
        scope[:, 7:], fields = 0, {"response_template": TEMPLATE}
    elif rule.endswith("_template"):  # the model itself writes it, or its second half
        text = by_hand(prompted(kind, family), [whole(inputs)])[0][0, 8 if rule == "split_template" else 10 :].tolist()
        fields = {"response_template": text[:2], "missing_template": "all"}
    elif rule == "missing_all":
        fields = {"response_template": TEMPLATE, "missing_template": "all"}
    elif rule == "instruction_length":
        if kind == "dynamic_prompt":
            pytest.skip("it has no `prompt_position='end'`, which this rule needs")
        fields = {"instruction_length": 12}
        if kind not in WITHOUT_SLOTS:
            fields["prompt_position"] = "end"
    model = adapted(causal_lm(family), METHODS[kind](task_type="CAUSAL_LM", **fields))
    if rule == "mask":
        scope[:, -3:] = 0
        inputs["instruction_mask"] = scope
    return model, inputs, scope


@pytest.mark.parametrize("guidance", ["none", "last_token", "negative"])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule(kind: str, rule: str, guidance: str) -> None:
    # In sliding windows late prompts cannot stand at the end, where this rule has them.
    family = "gemma3" if guidance == "none" and rule != "instruction_length" else "llama"
    model, inputs, scope = ruled(kind, rule, family)
    texts, call, scale = [(inputs["input_ids"], inputs["attention_mask"], scope)], {}, 1.0
    if guidance != "none":
        scale = call["guidance_scale"] = 1.5
        last = inputs["input_ids"][:, -1:]
        unlike = {"input_ids": last, "attention_mask": torch.ones_like(last)}
        if guidance == "negative":
            unlike = batch(12, 10, seed=3)
            call.update(
                negative_prompt_ids=unlike["input_ids"], negative_prompt_attention_mask=unlike["attention_mask"]
            )
        texts.append(whole(unlike))
    expected = by_hand(model, texts, scale)
    assert len(expected[0][0, 9:].unique()) > 1
    check(model, expected, **inputs, **call)


@pytest.mark.parametrize("which", ["begins_the_prompt", "goes_on_from_the_prompt", "is_the_prompt"])
def test_second_text_that_begins_as_the_prompt(kind: str, which: str) -> None:
    model, inputs = prompted(kind), batch(9)
    part = inputs["attention_mask"] * (torch.arange(9) < 6)
    ids = inputs["input_ids"]
    if which == "begins_the_prompt":
        ids = ids[:, :4]
    elif which == "goes_on_from_the_prompt":  # by what the model will write
        for _ in range(3):
            unlike = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            text = by_hand(model, [(inputs["input_ids"], inputs["attention_mask"], part), whole(unlike)], 1.5)[0]
            ids = text[:, :11]
    unlike = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = by_hand(model, [(inputs["input_ids"], inputs["attention_mask"], part), whole(unlike)], 1.5)
    call = {**inputs, "instruction_mask": part, "guidance_scale": 1.5, "negative_prompt_ids": ids}
    check(model, expected, **call)


def test_text_from_nothing(kind: str) -> None:
    """`generate()` begins with BOS, its whole instruction."""
    model = prompted(kind)
    start = torch.tensor([[model.config.bos_token_id]])
    expected = by_hand(model, [(start, torch.ones_like(start), torch.ones_like(start))])
    check(model, expected)


@pytest.mark.parametrize("given", ["call", "config", "model"])
def test_guidance_set_anywhere(given: str) -> None:
    model, inputs = prompted("iapt"), batch(9)
    last = inputs["input_ids"][:, -1:]
    expected = by_hand(model, [whole(inputs), (last, torch.ones_like(last), torch.ones_like(last))], 1.5)
    call = {"guidance_scale": 1.5} if given == "call" else {}
    if given == "config":
        call = {"generation_config": GenerationConfig(guidance_scale=1.5, pad_token_id=0)}
    elif given == "model":
        model.generation_config.guidance_scale = 1.5
    check(model, expected, **inputs, **call)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("rule", ["none", "mask", "template", "missing_all", "instruction_length"])
def test_beams(kind: str, rule: str, how: dict) -> None:
    model, inputs, _ = ruled(kind, rule, "llama")
    texts = [model.generate(**inputs, **{**GREEDY, **how}, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("rule", ["mask", "template", "written_template", "missing_all", "instruction_length"])
@pytest.mark.slots
def test_drafts(kind: str, rule: str) -> None:
    """Assisted decoding, by the model itself and by looking up: the text is that of decoding alone."""
    model, inputs, scope = ruled(kind, rule, "llama")
    inputs = {name: value[:1] for name, value in inputs.items()}
    text, _ = by_hand(model, [(inputs["input_ids"], inputs["attention_mask"], scope[:1])])
    assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), text)
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=model), text)


class Judge(StoppingCriteria):
    """Calls a model after each token."""

    def __init__(self, call: Any):
        self.call, self.seen = call, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.seen.append(self.call(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("how", ["argument", "context"])
def test_a_call_within_generate_with_an_instruction_of_its_own(kind: str, how: str) -> None:
    model, inputs, text = prompted(kind), batch(9, 6), batch(12, 10, seed=3)
    own = text["attention_mask"] * (torch.arange(12) < 7)
    mask = inputs["attention_mask"] * (torch.arange(9) < 7)

    def call(_: torch.Tensor) -> torch.Tensor:
        if how == "argument":
            return model(**text, instruction_mask=own).logits
        with instruction_scope(own):
            return model(**text).logits

    with torch.no_grad():
        expected, judge = model(**text, instruction_mask=own).logits, Judge(call)
    alone = model.generate(**inputs, instruction_mask=mask, **GREEDY)
    for use_cache in (True, False):
        found = model.generate(
            **inputs, instruction_mask=mask, **GREEDY, stopping_criteria=[judge], use_cache=use_cache
        )
        assert torch.equal(found, alone)
    assert len(judge.seen) == 2 * NEW and all(torch.equal(logits, expected) for logits in judge.seen)


def test_generate_within_generate(kind: str) -> None:
    """On the text so far the prompts are the outer call's; on another text they are its own."""
    model, inputs, other = prompted(kind), batch(9), batch(12, seed=3)
    mask = inputs["attention_mask"] * (torch.arange(9) < 6)
    expected = by_hand(model, [(*whole(inputs)[:2], mask)])[0]
    alone = model.generate(**other, **GREEDY)
    on = Judge(lambda ids: model.generate(ids, **{**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2}))
    off = Judge(lambda ids: model.generate(**other, **GREEDY))
    for use_cache in (True, False):
        how = {**GREEDY, "use_cache": use_cache, "instruction_mask": mask}
        assert torch.equal(model.generate(**inputs, **how, stopping_criteria=[on, off]), expected)
    assert len(on.seen) == 2 * NEW
    for text in on.seen:
        length = min(text.shape[1], 9 + NEW)
        assert torch.equal(text[:, :length], expected[:, :length])
    assert all(torch.equal(text, alone) for text in off.seen)
