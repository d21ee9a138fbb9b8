# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`generate` in all its ways, against a loop that has no cache and feeds the whole text again for each token."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from methods import METHODS
from peft import PeftModel
from tiny import VOCAB, adapted, assert_same, batch, causal_lm
from transformers import DynamicCache, GenerationConfig, StaticCache, StoppingCriteria, TextIteratorStreamer
from transformers.generation import BaseStreamer


NEW = 8
EOS = 2
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def prompted(method: str, family: str = "llama", **changes) -> PeftModel:
    return adapted(causal_lm(family, **changes), METHODS[method](task_type="CAUSAL_LM"))


@torch.no_grad()
def by_hand(model: PeftModel, inputs: dict[str, torch.Tensor], steps: int = NEW) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy text (B, S + steps) and the logits of its steps (B, steps, V)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    scope = inputs.get("instruction_mask", mask)
    logits = []
    for _ in range(steps):
        logits.append(model(ids, attention_mask=mask, instruction_mask=scope, use_cache=False).logits[:, -1])
        allowed = logits[-1].index_fill(1, torch.tensor(EOS), -torch.inf)  # as `min_new_tokens` has it
        ids = torch.cat([ids, allowed.argmax(dim=-1, keepdim=True)], dim=1)  # (B, S + 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        scope = torch.cat([scope, scope.new_zeros(len(scope), 1)], dim=1)
    return ids, torch.stack(logits, dim=1)


# gemma3 has sliding layers, and both rows are longer than its window.
@pytest.fixture(params=["llama", "gemma3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


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


# ---------------------------------------------------------------------------------------------------- several turns


def second_turn(first: torch.Tensor, mask: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A second question behind the text of the first turn; and the scope, which stays that of the first turn."""
    question = batch(4, 4, seed=5)["input_ids"]
    ids = torch.cat([first, question], dim=1)  # (B, S + NEW + 4)
    whole = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], dim=1)
    scope = torch.cat([mask, mask.new_zeros(2, ids.shape[1] - mask.shape[1])], dim=1)
    return {"input_ids": ids, "attention_mask": whole}, scope


def test_second_turn_from_the_returned_cache(method: str, family: str) -> None:
    model, inputs = prompted(method, family), batch(12, 9)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn, scope = second_turn(out.sequences, inputs["attention_mask"])
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
        step = model(turn["input_ids"][:, seen:], attention_mask=turn["attention_mask"], past_key_values=prefix)
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
    turn, scope = second_turn(out, inputs["attention_mask"])
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
        scope = torch.cat([inputs["attention_mask"], torch.zeros(1, 3, dtype=torch.long)], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        text, _ = by_hand(model, {**whole, "instruction_mask": scope})
        assert torch.equal(model.generate(**whole, **GREEDY, past_key_values=copy.deepcopy(prefix)), text)


def test_cache_filled_without_adapter_is_refused(kind: str) -> None:
    model, inputs = prompted(kind), batch(9)
    with torch.no_grad(), model.disable_adapter():
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="9 tokens but no prompt slots"), torch.no_grad():
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


# --------------------------------------------------------------------------------------------------------- refusals


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


# ------------------------------------------------------------------------------------------------------- the kernels


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
