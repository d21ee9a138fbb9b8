# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`generate` with caches that are kept, given or moved away: several turns, prefixes and steps by the user."""

from __future__ import annotations

import copy

import pytest
import torch
from greedy_loop import GREEDY, NEW, by_hand, prompted
from methods import METHODS, WITHOUT_SLOTS
from tiny import assert_same, batch, causal_lm
from transformers import DynamicCache, StaticCache


# ---------------------------------------------------------------------------------------------------- several turns


def second_turn(method: str, first: torch.Tensor, mask: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A second question behind the text of the first turn; and the scope. It stays that of the first turn for a method with slots; one that
    edits states also edits what the cache does not hold yet, as nothing says what in it is an answer."""
    question = batch(4, 4, seed=5)["input_ids"]
    ids = torch.cat([first, question], dim=1)  # (B, S + NEW + 4)
    whole = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], dim=1)
    scope = torch.cat([mask, mask.new_zeros(2, ids.shape[1] - mask.shape[1])], dim=1)
    if method in WITHOUT_SLOTS:
        scope[:, first.shape[1] - 1 :] = 1
    return {"input_ids": ids, "attention_mask": whole}, scope


def test_second_turn_from_the_returned_cache(method: str, family: str) -> None:
    model, inputs = prompted(method, family), batch(12, 9)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn, scope = second_turn(method, out.sequences, inputs["attention_mask"])
    text, logits = by_hand(model, {**turn, "instruction_mask": scope})
    seen = out.past_key_values.get_seq_length()
    assert seen == 12 + NEW - 1
    prefix = copy.deepcopy(out.past_key_values)
    again = model.generate(
        **turn, **GREEDY, past_key_values=out.past_key_values, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(again.sequences, text)
    assert_same(torch.stack(again.logits, dim=1), logits)
    # The copy knows nothing of what became of the original, and a plain forward goes on from it just as well.
    assert prefix.get_seq_length() == seen
    with torch.no_grad():
        told = {}
        if method in WITHOUT_SLOTS:  # what a plain call brings is edited where a mask says so
            told = {"instruction_mask": scope}
        step = model(
            turn["input_ids"][:, seen:], attention_mask=turn["attention_mask"], past_key_values=prefix, **told
        )
    assert_same(step.logits[:, -1], logits[:, 0])


@pytest.mark.parametrize("kind_of_cache", ["dynamic", "dynamic_with_config", "static"])
def test_second_turn_from_the_callers_own_cache(method: str, family: str, kind_of_cache: str) -> None:
    model, inputs = prompted(method, family), batch(12, 9)
    config = model.get_base_model().config
    cache = {
        "dynamic": lambda: DynamicCache(),
        "dynamic_with_config": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=12 + NEW + 4 + NEW),
    }[kind_of_cache]()
    out = model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert torch.equal(out, by_hand(model, inputs)[0])
    turn, scope = second_turn(method, out, inputs["attention_mask"])
    text, _ = by_hand(model, {**turn, "instruction_mask": scope})
    assert torch.equal(model.generate(**turn, **GREEDY, past_key_values=cache), text)


@pytest.mark.parametrize("kind_of_cache", ["dynamic", "static"])
def test_own_cache_used_again_after_reset(kind: str, kind_of_cache: str) -> None:
    model = prompted(kind)
    room = {"config": model.get_base_model().config, "max_cache_len": 9 + NEW}
    cache = DynamicCache() if kind_of_cache == "dynamic" else StaticCache(**room)
    for seed in (0, 3):
        inputs = batch(9, 6, seed=seed)
        assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), by_hand(model, inputs)[0])
        cache.reset()


def test_prefix_cache_for_several_continuations(method: str, family: str) -> None:
    model, inputs = prompted(method, family), batch(12)
    with torch.no_grad():
        prefix = model(**inputs, past_key_values=DynamicCache()).past_key_values
    for seed in (1, 2):
        ids = torch.cat([inputs["input_ids"], batch(3, seed=seed)["input_ids"]], dim=1)  # (1, 15)
        scope = torch.cat([inputs["attention_mask"], torch.full((1, 3), int(method in WITHOUT_SLOTS))], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        text, _ = by_hand(model, {**whole, "instruction_mask": scope})
        assert torch.equal(model.generate(**whole, **GREEDY, past_key_values=copy.deepcopy(prefix)), text)


def test_cache_filled_without_adapter_is_refused(kind: str) -> None:
    model, inputs = prompted(kind), batch(9)
    with torch.no_grad(), model.disable_adapter():
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="9 tokens and was filled without an adapter"), torch.no_grad():
        model(batch(2, seed=1)["input_ids"], past_key_values=cache)


def test_step_by_step_decoding_by_the_user(method: str, family: str) -> None:
    model, inputs = prompted(method, family), batch(12, 9)
    text, logits = by_hand(model, inputs)
    mask, cache, ids = inputs["attention_mask"], None, inputs["input_ids"]
    for step in range(NEW):
        with torch.no_grad():
            out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        assert_same(out.logits[:, -1], logits[:, step])
        cache, ids = out.past_key_values, text[:, 12 + step : 13 + step]
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    # Also as a tuple, and without a mask where nothing is padded.
    with torch.no_grad():
        row = inputs["input_ids"][:1]
        first, cache = model(row, use_cache=True, return_dict=False)[:2]
        second = model(text[:1, 12:13], past_key_values=cache, return_dict=False)[0]
    assert_same(first[:, -1], logits[:1, 0])
    assert_same(second[:, -1], logits[:1, 1])


@pytest.mark.slots
@pytest.mark.native
def test_own_cache_of_a_model_with_a_native_adapter(kind: str) -> None:
    """The cache that the caller made holds slots after the first turn, and the second goes on from it."""
    native = causal_lm()
    native.add_adapter(METHODS[kind](task_type="CAUSAL_LM", init_weights=False))
    native.eval()
    for lengths in ((9,), (9, 6)):
        inputs, cache = batch(*lengths), DynamicCache()
        text = native.generate(**inputs, **GREEDY, past_key_values=cache)
        for more in (3, 4, 5, 8):  # fewer tokens than slots, as many, more
            ids = torch.cat([text, text.new_full((len(lengths), more), 40)], dim=1)
            mask = torch.cat([inputs["attention_mask"], ids.new_ones(len(lengths), NEW + more)], dim=1)
            goes_on = native.generate(ids, attention_mask=mask, **GREEDY, past_key_values=copy.deepcopy(cache))
            scope = torch.cat([inputs["attention_mask"], torch.zeros_like(ids[:, 9:])], dim=1)
            assert torch.equal(goes_on, native.generate(ids, attention_mask=mask, instruction_mask=scope, **GREEDY))
        with pytest.raises(ValueError, match="Pass the cache that the model returned"):
            positions = torch.arange(20, 21).expand(len(lengths), -1)  # counted with the slots in the cache
            native(ids[:, -1:], attention_mask=mask[:, :14], position_ids=positions, past_key_values=cache)


# ------------------------------------------------------------------------------------------------ caches off the device


@pytest.mark.parametrize("cache_implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache(kind: str, cache_implementation: str) -> None:
    model, inputs = prompted(kind), batch(9, 6)
    how = {**GREEDY, "cache_implementation": cache_implementation}
    try:
        with model.disable_adapter():
            model.generate(**inputs, **how)
    except Exception as error:
        pytest.skip(f"the base model cannot do it on this device either: {error}")
    assert torch.equal(model.generate(**inputs, **how), by_hand(model, inputs)[0])
