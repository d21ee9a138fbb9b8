# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`generate` in all its ways, against a loop that has no cache and feeds the whole text again for each token."""

from __future__ import annotations

import threading

import pytest
import torch
from greedy_loop import GREEDY, NEW, by_hand, prompted
from tiny import VOCAB, assert_same, batch
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.generation import BaseStreamer


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"num_beams": 1, "num_return_sequences": 1},
        {"logits_to_keep": 1},
    ],
    ids=str,
)
def test_greedy(method: str, family: str, how: dict) -> None:
    model, inputs = prompted(method, family), batch(12, 9)
    text, logits = by_hand(model, inputs)
    out = model.generate(
        **inputs, **GREEDY, **how, output_logits=True, output_scores=True, return_dict_in_generate=True
    )
    assert torch.equal(out.sequences, text)
    assert_same(torch.stack(out.logits, dim=1), logits)
    assert [scores.shape for scores in out.scores] == [(2, VOCAB)] * NEW
    assert (out.past_key_values is None) == (how.get("use_cache") is False)
    assert len(text[0, 12:].unique()) > 2, "a text that repeats one token would prove little"


def test_instruction_mask_in_generate(method: str, family: str) -> None:
    model, inputs = prompted(method, family), batch(12, 9)
    part = inputs["attention_mask"].clone()
    part[:, -3:] = 0
    text, logits = by_hand(model, {**inputs, "instruction_mask": part})
    for how in ({}, {"use_cache": False}):
        out = model.generate(
            **inputs, instruction_mask=part, **GREEDY, **how, output_logits=True, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences, text)
        assert_same(torch.stack(out.logits, dim=1), logits)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=str,
)
def test_with_cache_is_without(method: str, family: str, how: dict) -> None:
    model, inputs = prompted(method, family), batch(12, 9)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        texts.append(model.generate(**inputs, **{**GREEDY, **how}, use_cache=use_cache))
    assert torch.equal(*texts)
    assert len(texts[0]) == 2 * how.get("num_return_sequences", 1)


def test_beams_of_a_row_alone(method: str) -> None:
    model, inputs = prompted(method), batch(9, 6)
    together = model.generate(**inputs, **{**GREEDY, "num_beams": 3})
    for row, n in enumerate((9, 6)):
        alone = model.generate(inputs["input_ids"][row : row + 1, -n:], **{**GREEDY, "num_beams": 3})
        assert torch.equal(together[row, 9:], alone[0, n:])


def test_prompt_lookup(method: str, family: str) -> None:
    model, inputs = prompted(method, family), batch(6)
    inputs = {name: value.repeat(1, 3) for name, value in inputs.items()}  # repeats, so that look-ups are found
    text, _ = by_hand(model, inputs)
    assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), text)


def test_inputs_embeds(method: str, family: str) -> None:
    model, inputs = prompted(method, family), batch(12, 9)
    text, logits = by_hand(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        **GREEDY,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, text[:, 12:])
    assert_same(torch.stack(out.logits, dim=1), logits)
    ids_too = model.generate(**inputs, inputs_embeds=embeds, **GREEDY)
    assert torch.equal(ids_too, text)


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(method: str, family: str, attention: str) -> None:
    inputs = batch(12, 9)
    eager = prompted(method, family, attn_implementation="eager")
    other = prompted(method, family, attn_implementation=attention)
    assert other.get_base_model().config._attn_implementation == attention
    # Flex attention would be compiled, for half a minute.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected, actual = eager(**inputs).logits, other(**inputs).logits
        text = other.generate(**inputs, **GREEDY)
    real = inputs["attention_mask"].bool()
    assert_same(actual[real], expected[real])
    assert torch.equal(text, by_hand(eager, inputs)[0])


# ------------------------------------------------------------------------------------------------------------ streaming


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


class Letters:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, ids: list[int], **kwargs) -> str:
        return "".join(f"<{int(n)}> " for n in ids)


def test_streaming(kind: str) -> None:
    model, inputs = prompted(kind), batch(9)
    text = by_hand(model, inputs)[0][0].tolist()
    collector = Collector()
    model.generate(**inputs, **GREEDY, streamer=collector)
    assert collector.tokens == [*text, -1]
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.split() == [f"<{n}>" for n in text[9:]]


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.slots
def test_chunked_prefill_is_refused(kind: str) -> None:
    model, inputs = prompted(kind), batch(9)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, generation_config=GenerationConfig(prefill_chunk_size=4, **GREEDY))


def test_continuous_batching_is_refused(kind: str) -> None:
    """On the tuner and on the inner model, which once gave empty answers, and on every way to it."""
    model = prompted(kind)
    base = model.get_base_model()
    ids = batch(5)["input_ids"]
    for ask in (
        lambda: model.generate_batch([[1, 2, 3]]),
        lambda: model.base_model.generate_batch([[1, 2, 3]]),
        lambda: base.generate_batch([[1, 2, 3]]),
        lambda: base.init_continuous_batching(),
        lambda: base.continuous_batching_context_manager().__enter__(),
        lambda: base.generate(ids, cache_implementation="paged", max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="continuous batching"):
            ask()
    assert model.unload() is base and "init_continuous_batching" not in vars(base)


@torch.no_grad()
def test_positions_that_only_start_elsewhere_are_no_packing(kind: str) -> None:
    model, ids = prompted(kind), batch(9)["input_ids"]
    assert_same(
        model(ids, position_ids=torch.arange(9)[None] + 3).logits, model(ids).logits
    )  # RoPE tells distances only
