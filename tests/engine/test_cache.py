# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The cache that hides slots."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, assert_same, batch, causal_lm
from transformers import DynamicCache, StaticCache

from peft_instance_prompt.engine import slots
from peft_instance_prompt.engine.cache import SlotCache, make_room
from peft_instance_prompt.engine.slots import SlotTable


def prompted(method: str, family: str = "llama") -> PeftModel:
    return adapted(causal_lm(family), METHODS[method](task_type="CAUSAL_LM"))


@torch.no_grad()
def filled(model: PeftModel, inputs: dict[str, torch.Tensor]) -> SlotCache:
    return model(**inputs, use_cache=True).past_key_values


@torch.no_grad()
def going_on(model: PeftModel, cache: SlotCache, mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
    return model(ids, attention_mask=mask, past_key_values=cache).logits


NEXT = torch.tensor([[40, 41], [50, 51]])


def test_used_again_after_reset(kind: str) -> None:
    model, inputs = prompted(kind), batch(9, 6)
    text = model.generate(**inputs, max_new_tokens=4)
    cache = filled(model, batch(8, 5))
    cache.reset()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, past_key_values=cache), text)
    cache.reset()
    with pytest.raises(ValueError, match="instruction_mask"):  # what is refused must not make it useless
        model(**inputs, past_key_values=cache, instruction_mask=torch.zeros(2, 9, dtype=torch.bool))
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, past_key_values=cache), text)


@pytest.mark.slots
def test_counts_tokens_and_not_slots(method: str) -> None:
    model = prompted(method)
    cache = filled(model, batch(9, 6))
    assert isinstance(cache, SlotCache)
    assert cache.get_seq_length() == 9
    assert cache.inner.get_seq_length() == 9 + cache.table.num_slots > 9
    assert cache.get_max_length() == -1
    assert len(cache) == 3
    assert not cache.is_compileable
    assert f"slots={cache.table.num_slots}" in repr(cache)
    static = StaticCache(config=model.get_base_model().config, max_cache_len=20)
    with torch.no_grad():
        static = model(**batch(9), past_key_values=static).past_key_values
    assert (static.get_seq_length(), static.get_max_length()) == (9, 20)


def test_copies_and_pickles(method: str) -> None:
    model, inputs = prompted(method), batch(9, 6)
    cache = filled(model, inputs)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected = going_on(model, cache, inputs["attention_mask"], NEXT)
    assert cache.get_seq_length() == 11
    for one in copies:
        assert one.get_seq_length() == 9
        assert torch.equal(going_on(model, one, inputs["attention_mask"], NEXT), expected)


def test_crop(method: str) -> None:
    model, inputs = prompted(method), batch(9, 6)
    cache = filled(model, inputs)
    expected = going_on(model, copy.deepcopy(cache), inputs["attention_mask"], NEXT)
    going_on(model, cache, inputs["attention_mask"], NEXT + 7)
    cache.crop(-2)
    assert cache.get_seq_length() == 9
    assert_same(going_on(model, cache, inputs["attention_mask"], NEXT), expected)


def test_crop_into_the_instruction(method: str) -> None:
    model, ids = prompted(method), batch(9)["input_ids"]
    scope = (torch.arange(9) < 4)[None].long()
    with torch.no_grad():
        expected = model(ids, instruction_mask=scope).logits[:, 6:]
        cache = model(ids, instruction_mask=scope, use_cache=True).past_key_values
        cache.crop(-3)
        assert cache.get_seq_length() == 6
        assert_same(model(ids[:, 6:], past_key_values=cache).logits, expected)


def test_crop_into_the_slots_is_refused() -> None:
    cache = filled(prompted("iapt"), batch(9))  # its slots come first
    with pytest.raises(ValueError, match="cut off prompt slots"):
        cache.crop(-11)


def test_reorder_select_and_repeat(method: str) -> None:
    model, inputs = prompted(method), batch(9, 6)
    cache = filled(model, inputs)
    expected = going_on(model, copy.deepcopy(cache), inputs["attention_mask"], NEXT)
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        one = copy.deepcopy(cache)
        change(one)
        assert_same(going_on(model, one, inputs["attention_mask"][rows], NEXT[rows]), expected[rows])


def test_reset_makes_a_fresh_start(method: str) -> None:
    model, inputs = prompted(method), batch(9, 6)
    cache = filled(model, batch(7, 5, seed=4))
    cache.reset()
    with torch.no_grad():
        out = model(**inputs, past_key_values=cache)
        expected = model(**inputs).logits
    assert_same(out.logits, expected)
    assert out.past_key_values.get_seq_length() == 9


def test_the_inside_of_a_cache_is_known_again(method: str) -> None:
    model, inputs = prompted(method), batch(9, 6)
    own = DynamicCache()
    with torch.no_grad():
        cache = model(**inputs, past_key_values=own).past_key_values
    assert cache.inner is own
    expected = going_on(model, copy.deepcopy(cache), inputs["attention_mask"], NEXT)
    assert torch.equal(going_on(model, own, inputs["attention_mask"], NEXT), expected)


def test_base_model_gets_its_own_cache_back(kind: str) -> None:
    model = prompted(kind)
    with torch.no_grad(), model.disable_adapter():
        assert type(model(**batch(9), use_cache=True).past_key_values) is DynamicCache


# ----------------------------------------------------------------------------------------------------- the slot table


def table(before_token: list, num_tokens: int, used: list | None = None) -> SlotTable:
    layout = slots.arrange(torch.tensor(before_token), num_tokens, None if used is None else torch.tensor(used).bool())
    return layout.table


def test_widen_mask() -> None:
    both = table([[0, 2], [1, 1]], 3)
    assert both.widen_mask(None, 5) is None
    assert both.widen_mask(torch.ones(2, 5), 5) is None, "a mask of ones costs the fast kernel"
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    assert both.widen_mask(mask, 5).tolist() == [[1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1]]
    unused = table([[0, 2], [1, 1]], 3, [[0, 1], [1, 1]])
    assert unused.widen_mask(None, 5).tolist() == [[0, 1, 1, 1, 1, 1, 1], [1] * 7]
    assert unused.num_counted.tolist() == [[1], [2]]


def test_token_positions_and_select() -> None:
    both = table([[0, 2], [1, 1]], 3, [[0, 1], [1, 1]])
    assert both.token_positions(7).tolist() == [[1, 2, 4, 5, 6], [0, 3, 4, 5, 6]]
    both.select(torch.tensor([1, 0, 0]))
    assert both.token_positions(5).tolist() == [[0, 3, 4], [1, 2, 4], [1, 2, 4]]
    assert both.num_counted.tolist() == [[2], [1], [1]]
    both.crop(9)  # nothing known lies there
    assert both.order.shape == (3, 5)


@pytest.mark.slots
def test_crop_that_is_refused_changes_nothing(kind: str) -> None:
    """By the cache inside, which takes negative numbers only, or since slots would be cut off."""
    place = {"prompt_position": "before"} if kind == "iapt" else {}  # at the end, the slots are cut off first
    model, inputs = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", **place)), batch(9, 6)
    cache = filled(model, inputs)
    order, expected = cache.table.order.clone(), going_on(model, copy.deepcopy(cache), inputs["attention_mask"], NEXT)
    for number, error in (
        (3, (ValueError, RuntimeError)),
        (-99, ValueError),
        (-9 - cache.table.num_slots, ValueError),
    ):
        with pytest.raises(error):
            cache.crop(number)
        assert torch.equal(cache.table.order, order) and cache.get_seq_length() == 9
    assert torch.equal(going_on(model, copy.deepcopy(cache), inputs["attention_mask"], NEXT), expected)
    cache.crop(-2)
    assert cache.get_seq_length() == 7


def test_make_room_grows_an_empty_static_cache_once() -> None:
    config = causal_lm("gemma3").config  # window 8
    cache = StaticCache(config=config, max_cache_len=20)
    before = [layer.max_cache_len for layer in cache.layers]
    for _ in range(2):
        make_room(cache, 4, config.sliding_window)
    assert [layer.max_cache_len for layer in cache.layers] == [min(8, n + 4) if n < 20 else n + 4 for n in before]
    short = StaticCache(config=config, max_cache_len=5)
    make_room(short, 4, config.sliding_window)
    assert [layer.max_cache_len for layer in short.layers] == [8, 9, 8]
    dynamic = DynamicCache(config=config)
    make_room(dynamic, 4)
    assert dynamic.layers[1].get_max_length() == -1
