# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""PreFT against a reference written here: the base model, row by row, with the edits added by hooks of the test's own."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from tiny import ENCODERS, adapted, assert_same, batch, causal_lm, encoder, generator_of, pair, perturb, tokenizer
from transformers import DynamicCache, StaticCache

from peft_instance_prompt import IAPTConfig, PreFTConfig
from peft_instance_prompt.engine import edits
from peft_instance_prompt.engine.calls import cache_argument


ASK, END = [40, 41], [42]  # what stands before an answer, and what ends it
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


def config(**fields) -> PreFTConfig:
    return PreFTConfig(**{"r": 4, "task_type": "CAUSAL_LM", **fields})


def preft(family: str = "llama", seed: int = 0, **fields) -> PeftModel:
    return adapted(causal_lm(family), config(**fields), seed=seed)


def chat(family: str = "llama", seed: int = 0, **fields) -> PeftModel:
    return preft(family, seed, response_template=ASK, response_end=END, **fields)


# ---------------------------------------------------------------------------------------------------------- reference


@contextmanager
def edited_by_hand(layers, weights: dict[str, torch.Tensor], edited: torch.Tensor) -> Iterator[None]:
    """Within, each of the layers gets `h + (h W_down + b) W_up` in place of h (1, S, d), where `edited` (S,) is True."""

    def hook(number: int):
        def before(module, args, kwargs):
            h = args[0] if args else kwargs["hidden_states"]
            rows = [
                state + (state @ weights["down"][number] + weights["bias"][number, 0]) @ weights["up"][number]
                if one
                else state
                for state, one in zip(h[0], edited.tolist())
            ]
            h = torch.stack(rows)[None]  # (1, S, d)
            return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

        return before

    handles = [layer.register_forward_pre_hook(hook(n), with_kwargs=True) for n, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    for path in (
        "model.layers",
        "transformer.h",
        "encoder.layer",
        "bert.encoder.layer",
        "gpt_neox.layers",
        "backbone.layers",
    ):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError("no list of layers")


def weights_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in generator_of(model).named_parameters()}


@torch.no_grad()
def by_hand(
    model: PeftModel, ids: torch.Tensor, edited: torch.Tensor, family: str = "llama", **kwargs
) -> torch.Tensor:
    """Logits (S, V) of one row of ids (S,), in a copy of the base model that knows no adapters."""
    weights = weights_of(model)
    base = causal_lm(family)
    with edited_by_hand(layers_of(base), weights, edited):
        return base(ids[None], use_cache=False, **kwargs).logits[0]


def roles(ids: torch.Tensor) -> torch.Tensor:
    """Which tokens of one row (S,) lie in no answer: a walk from the left."""
    answering, out, ids = False, [], ids.tolist()
    for at in range(len(ids)):
        out.append(not answering)
        if ids[: at + 1][-len(ASK) :] == ASK:
            answering = True
        elif ids[: at + 1][-len(END) :] == END:
            answering = False
    return torch.tensor(out)


def turn(seed: int, n: int = 5) -> torch.Tensor:
    return torch.cat([torch.randint(3, 38, (n,), generator=torch.Generator().manual_seed(seed)), torch.tensor(ASK)])


def answer(seed: int, n: int = 4) -> torch.Tensor:
    return torch.cat(
        [torch.randint(3, 38, (n,), generator=torch.Generator().manual_seed(100 + seed)), torch.tensor(END)]
    )


def conversation(turns: int, seed: int = 0) -> torch.Tensor:
    """Turns and answers one behind the other, with a token of the template's between an answer and the next turn: (S,)."""
    parts = []
    for number in range(turns):
        parts += [turn(seed + number, 3 + number), answer(seed + number, 2 + number), torch.tensor([43])]
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------------------- counts


def test_counts() -> None:
    d, L, r = 32, 3, 4
    model = get_peft_model(causal_lm(), config())
    assert model.get_nb_trainable_parameters()[0] == 2 * d * r * L + r * L
    model = get_peft_model(causal_lm(), config(layers_to_transform=[1, 2], r=8))
    assert model.get_nb_trainable_parameters()[0] == 2 * (2 * d * 8 + 8)


def test_fresh_adapter_is_a_no_op_and_learns() -> None:
    base, inputs = causal_lm(), batch(7)
    before = base(**inputs).logits
    model = get_peft_model(base, config()).train()
    assert torch.equal(model.eval()(**inputs).logits, before)
    labels = inputs["input_ids"].where(torch.arange(7) > 3, -100)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    names = {}
    for step in range(2):
        optimizer.zero_grad()
        model.train()(**inputs, labels=labels).loss.backward()
        names[step] = {
            n.rpartition(".")[2] for n, p in generator_of(model).named_parameters() if p.grad.abs().sum() > 0
        }
        optimizer.step()
    assert names == {0: {"up"}, 1: {"up", "down", "bias"}}


# -------------------------------------------------------------------------------------------------------- one forward


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mistral", "mixtral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_those_of_the_reference(family: str, side: str) -> None:
    model, inputs = preft(family), batch(9, 5, 7, side=side)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    mask = inputs["attention_mask"].clone()
    for row in range(3):  # the instruction is all but the last two tokens
        mask[row, mask[row].nonzero()[-2:]] = 0
    with torch.no_grad():
        logits = model(**inputs, position_ids=positions, instruction_mask=mask).logits
    for row in range(3):
        own = inputs["attention_mask"][row].bool()
        want = by_hand(model, inputs["input_ids"][row, own], mask[row, own].bool(), family)
        assert_same(logits[row, own], want)


def test_layers_that_are_not_chosen() -> None:
    model, ids = preft(layers_to_transform=[1]), batch(7)["input_ids"]
    base = causal_lm()
    weights = weights_of(model)
    with torch.no_grad(), edited_by_hand(layers_of(base)[1:2], weights, torch.ones(7)):
        assert_same(model(ids).logits, base(ids).logits)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "albert", "deberta-v2"])
def test_all_tokens_of_an_encoder(family: str) -> None:
    """A padded row is the row alone; and what is edited is every token, which the reference shows for BERT."""
    assert family in ENCODERS
    model = adapted(encoder(family), PreFTConfig(r=4))
    inputs = batch(9, 6, side="right")
    with torch.no_grad():
        out = model(**inputs).last_hidden_state
        alone = model(inputs["input_ids"][1:, :6]).last_hidden_state
    assert_same(out[1, :6], alone[0])
    bare = encoder(family)
    assert not torch.allclose(bare(inputs["input_ids"][:1]).last_hidden_state, out[:1], atol=1e-2)
    if family == "bert":
        weights = weights_of(model)
        with torch.no_grad(), edited_by_hand(layers_of(bare), weights, torch.ones(9)):
            assert_same(out[0], bare(inputs["input_ids"][:1]).last_hidden_state[0])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_pairs(family: str) -> None:
    model = adapted(pair(family), PreFTConfig(r=4, task_type="SEQ_2_SEQ_LM"))
    inputs, labels = batch(9, 6, side="right"), torch.tensor([[5, 6, 7], [8, 9, 2]])
    with torch.no_grad():
        whole = model(**inputs, labels=labels).logits
        alone = model(inputs["input_ids"][1:, :6], labels=labels[1:]).logits
    assert_same(whole[1], alone[0])
    assert not torch.allclose(pair(family)(**inputs, labels=labels).logits, whole, atol=1e-2)
    text = model.generate(**inputs, **GREEDY)
    assert torch.equal(text, model.generate(**inputs, **GREEDY, use_cache=False))


def test_packed_sequences() -> None:
    model = preft()
    rows = [conversation(1, seed)[:-1] for seed in (0, 5)]
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    labels = torch.cat([torch.where(torch.arange(len(row)) < len(row) - 3, -100, row) for row in rows])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, labels=labels).logits[0]
    at = 0
    for row in rows:
        edited = torch.arange(len(row)) < len(row) - 3
        assert_same(packed[at : at + len(row)], by_hand(model, row, edited))
        at += len(row)


# --------------------------------------------------------------------------------------------------- chats, by their roles


def test_every_turn_but_the_answers() -> None:
    model, ids = chat(), conversation(3)
    want = by_hand(model, ids, roles(ids))
    with torch.no_grad():
        assert_same(model(ids[None]).logits[0], want)
        masked = ids.where(torch.arange(len(ids)) > len(ids) - 4, -100)  # earlier answers are masked
        assert_same(model(ids[None], labels=masked[None]).logits[0], want)
        everything = model(ids[None], labels=ids[None])
    assert_same(everything.logits[0], want)
    # A row that is shorter, padded on either side.
    short = conversation(2, seed=7)
    for side in ("left", "right"):
        rows = torch.zeros(2, len(ids), dtype=torch.long)
        mask = torch.zeros_like(rows)
        rows[0], mask[0] = ids, 1
        own = slice(-len(short), None) if side == "left" else slice(0, len(short))
        rows[1, own], mask[1, own] = short, 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(rows, attention_mask=mask, position_ids=positions).logits
        assert_same(logits[0], want)
        assert_same(logits[1, own], by_hand(model, short, roles(short)))


@pytest.mark.parametrize("cache", ["returned", "own", "static"])
def test_a_chat_of_three_turns_with_a_cache_that_goes_on(cache: str) -> None:
    """Each turn equals one forward over the whole text; the last token of an answer comes in with the next turn."""
    model, text, kept = chat(), torch.zeros(1, 0, dtype=torch.long), None
    if cache == "own":
        kept = DynamicCache()
    elif cache == "static":
        kept = StaticCache(config=model.get_base_model().config, max_cache_len=96)
    for number in range(3):
        text = torch.cat([text, turn(number)[None]], dim=1)
        out = model.generate(text, **GREEDY, past_key_values=kept, return_dict_in_generate=True, output_logits=True)
        want = by_hand(
            model, out.sequences[0], roles(out.sequences[0]) & (torch.arange(out.sequences.shape[1]) < text.shape[1])
        )
        assert_same(torch.cat(list(out.logits)), want[text.shape[1] - 1 : -1])
        kept = out.past_key_values if cache == "returned" else kept
        # the answer is ended, and the template writes a token more
        text = torch.cat([out.sequences, torch.tensor([[*END, 43]])], dim=1)


@pytest.mark.parametrize("parts", [[3, 4, 5], [1] * 8, [7]])
def test_parts_of_a_text_by_plain_calls(parts: list[int]) -> None:
    """A text that comes in parts of any size has the logits of one call, whatever the parts cut in two."""
    model, ids = chat(), conversation(3)
    want, cache, at, logits = by_hand(model, ids, roles(ids)), DynamicCache(), 0, []
    sizes = [*parts, len(ids) - sum(parts)]
    for size in sizes:
        with torch.no_grad():
            out = model(ids[None, at : at + size], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + size
        logits.append(out.logits[0])
    assert_same(torch.cat(logits), want)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_stack_without_attention(family: str) -> None:
    """Its cache holds states, and no count of the tokens that they have read."""
    if cache_argument(tf.MambaModel.forward) is None:
        with pytest.raises(
            ValueError, match="The forward of .* is not understood: it takes no `cache or past_key_values`"
        ):
            chat(family)
        return
    model, ids = chat(family), conversation(2)
    want = by_hand(model, ids, roles(ids), family)
    with torch.no_grad():
        assert_same(model(ids[None]).logits[0], want)
        cache, logits = None, []
        for part in (ids[:3], *ids[3:].split(1)):
            out = model(part[None], cache=cache, use_cache=True)
            cache = out.cache
            logits.append(out.logits[0])
        assert_same(torch.cat(logits), want)
        kept = copy.deepcopy(cache)
        kept.reset()
        assert_same(model(ids[None], cache=kept, use_cache=True).logits[0], want)
    out = model.generate(turn(1)[None], **GREEDY, return_dict_in_generate=True, output_logits=True)
    text = out.sequences[0]
    want = by_hand(model, text, torch.arange(len(text)) < len(turn(1)), family)
    assert_same(torch.cat(list(out.logits)), want[len(turn(1)) - 1 : -1])


def test_the_cache_can_be_copied_cropped_and_reordered() -> None:
    model, ids = chat(), torch.stack([conversation(2), conversation(2, seed=9)])
    cut = 9
    with torch.no_grad():
        cache = model(ids[:, :-4], use_cache=True).past_key_values
        cache = copy.deepcopy(cache)
        cache.crop(-(ids.shape[1] - 4 - cut))
        assert cache.get_seq_length() == cut
        cache.reorder_cache(torch.tensor([1, 0]))
        rest = model(ids[[1, 0], cut:], past_key_values=cache).logits
    for row, number in enumerate((1, 0)):
        assert_same(rest[row], by_hand(model, ids[number], roles(ids[number]))[cut:])


@pytest.mark.parametrize(
    "how",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 3, "cache_implementation": "static"},
        {"num_beams": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("templated", [True, False])
def test_ways_to_generate(how: dict, templated: bool) -> None:
    model = chat() if templated else preft()
    ids = torch.stack([torch.cat([conversation(1, seed), turn(seed)]) for seed in (0, 4)])
    out = model.generate(ids, **{**GREEDY, **how}, return_dict_in_generate=True, output_logits=True)
    P = ids.shape[1]
    for row, text in enumerate(out.sequences):
        edited = torch.arange(len(text)) < P
        want = by_hand(model, text, edited & roles(text) if templated else edited)
        if "num_beams" in how:  # of the likeliest texts by beam search, each is as likely as the reference says
            continue
        assert_same(torch.stack([step[row] for step in out.logits]), want[P - 1 : -1])
        assert torch.equal(text[P:], want[P - 1 : -1].argmax(-1))
    if "num_beams" in how:
        bare = copy.deepcopy(model)
        again = bare.generate(ids, **{**GREEDY, **how, "use_cache": False})
        assert torch.equal(out.sequences, again)


def test_assisted_decoding() -> None:
    """Prompt and candidates come in one forward."""
    model, ids = chat(), torch.cat([conversation(1), turn(3)])[None]
    plain = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), plain)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=causal_lm(seed=1)), plain)


def test_guidance_has_a_text_of_its_own() -> None:
    model, ids = preft(), torch.cat([conversation(1), turn(3)])[None]
    how = {**GREEDY, "guidance_scale": 1.5, "negative_prompt_ids": turn(8)[None]}
    assert torch.equal(model.generate(ids, **how), model.generate(ids, **how, use_cache=False))


@pytest.mark.parametrize("parts", [[3, 4], [9], [1] * 10])
def test_plain_text_in_parts(parts: list[int]) -> None:
    """With `instruction_length`, the first tokens of the text are edited, whatever the parts."""
    model, ids = preft(instruction_length=7), conversation(2)
    want, cache, at, logits = by_hand(model, ids, torch.arange(len(ids)) < 7), DynamicCache(), 0, []
    for size in [*parts, len(ids) - sum(parts)]:
        with torch.no_grad():
            logits.append(model(ids[None, at : at + size], past_key_values=cache, use_cache=True).logits[0])
        at += size
    assert_same(torch.cat(logits), want)
    text = model.generate(ids[None, :12], **GREEDY)
    assert torch.equal(text, model.generate(ids[None, :12], **GREEDY, use_cache=False))


def test_mask_of_a_prompt_in_parts_with_beams() -> None:
    model, ids = preft(), torch.stack([conversation(1, seed) for seed in (0, 4)])
    mask = torch.arange(ids.shape[1]).expand(2, -1) % 3 > 0
    how = {**GREEDY, "num_beams": 2, "instruction_mask": mask}
    assert torch.equal(model.generate(ids, **how, prefill_chunk_size=4), model.generate(ids, **how, use_cache=False))


def test_mask_in_parts() -> None:
    """`instruction_mask` says which of the new tokens are edited, by itself or as part of the mask of the whole text."""
    model, ids = preft(), conversation(2)
    edited = torch.rand(len(ids), generator=torch.Generator().manual_seed(1)) < 0.5
    edited[0] = True
    want = by_hand(model, ids, edited)
    for whole in (True, False):
        with torch.no_grad():
            cache = model(ids[None, :6], instruction_mask=edited[None, :6], use_cache=True).past_key_values
            mask = edited[None] if whole else edited[None, 6:]
            assert_same(model(ids[None, 6:], instruction_mask=mask, past_key_values=cache).logits[0], want[6:])


# ------------------------------------------------------------------------------------------------------- mixed batches


def test_rows_with_different_adapters_and_methods() -> None:
    model = chat()
    model.add_adapter("second", config(response_template=ASK, response_end=END))
    model.add_adapter("wide", config(r=6))
    perturb(model, 3, "second")
    perturb(model, 4, "wide")
    ids = torch.stack([conversation(2, seed) for seed in range(5)])
    names = ["default", "__base__", "second", "wide", "default"]
    with torch.no_grad():
        mixed = model.eval()(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(ids[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(ids[row : row + 1]).logits
            assert_same(mixed[row], alone[0])
    text = model.generate(ids[:, :10], adapter_names=names, **GREEDY)
    assert torch.equal(text, model.generate(ids[:, :10], adapter_names=names, **GREEDY, use_cache=False))


def test_a_chat_of_mixed_rows() -> None:
    model = chat()
    model.add_adapter("second", config(response_template=ASK, response_end=END))
    perturb(model, 3, "second").eval()
    ids = torch.stack([conversation(3, seed) for seed in range(3)])
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        whole = model(ids, adapter_names=names).logits
        cache = model(ids[:, :9], adapter_names=names, use_cache=True).past_key_values
        rest = model(ids[:, 9:], adapter_names=names, past_key_values=cache).logits
    assert_same(rest, whole[:, 9:])


# ------------------------------------------------------------------------------------------------------- what is refused


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="`r` must be at most 32, the width of the layers of 'model.layers', got 33"):
        get_peft_model(causal_lm(), config(r=33))
    for bad in (0, -1, 2.5, True):
        with pytest.raises((ValueError, TypeError), match="`r`"):
            config(r=bad)
    with pytest.raises(ValueError, match="`response_end` ends an answer, which begins behind a different"):
        config(response_end=[3])
    with pytest.raises(ValueError, match="`response_end` ends an answer, which begins behind a different"):
        config(response_end=[3], response_template=[3])
    with pytest.raises(TypeError, match="num_virtual_tokens"):
        PreFTConfig(num_virtual_tokens=4)


def test_labels_that_contradict_the_template() -> None:
    model, ids = chat(), conversation(2)[None]
    labels = ids.where(torch.arange(ids.shape[1]) > 2, -100)  # from the midst of the first turn on
    with pytest.raises(ValueError, match=r"`labels` contradict `response_template` in row\(s\) \[0\]") as error:
        model(ids, labels=labels)
    assert len(str(error.value)) < 300
    with torch.no_grad():  # an answer's labels may go on over what the template writes behind it
        answers = torch.where(~roles(ids[0]) | (ids[0] == 43), ids[0], -100)[None]
        model(ids, labels=answers)


def test_several_answers_without_their_end() -> None:
    model, ids = preft(response_template=ASK), conversation(2)[None]
    with pytest.raises(
        ValueError, match=r"Where an answer ends is not known, and row\(s\) \[0\] have several: set `response_end`"
    ):
        model(ids)
    one = conversation(1)[None, :-1]
    assert_same(model(one).logits[0].detach(), by_hand(model, one[0], roles(one[0])))


def test_nothing_to_edit_is_told_in_training() -> None:
    model, ids = preft().train(), conversation(1)[None]
    with pytest.raises(ValueError, match="All tokens of row"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="cannot tell instruction from response without `labels`"):
        model(ids)


def test_another_adapter_does_not_go_on() -> None:
    model = chat()
    model.add_adapter("second", config(response_template=ASK, response_end=END))
    ids = conversation(2)[None]
    with torch.no_grad():
        cache = model.eval()(ids[:, :9], use_cache=True).past_key_values
        model.set_adapter("second")
        with pytest.raises(
            ValueError, match="The cache was filled with the adapter 'default', and 'second' is active"
        ):
            model(ids[:, 9:], past_key_values=cache)


def test_a_cache_without_ids() -> None:
    model, ids = chat(), conversation(2)[None]
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        cache = model(ids[:, :9], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="pass `instruction_mask`"):
            model(inputs_embeds=embeds[:, 9:], past_key_values=cache)


# ------------------------------------------------------------------------------------------------- the template's end


def test_chat_finds_template_and_end(tmp_path) -> None:
    tokenizer().save_pretrained(tmp_path)
    model = get_peft_model(causal_lm(), config(response_template="chat", tokenizer_name_or_path=str(tmp_path)))
    found = model.peft_config["default"]
    assert (found.response_template, found.response_end) == ([5], [2])
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(causal_lm(), tmp_path / "adapter").peft_config["default"]
    assert (again.response_template, again.response_end) == ([5], [2])


def test_an_end_given_as_text(tmp_path) -> None:
    tokenizer().save_pretrained(tmp_path)
    fields = {"response_template": "w3 w4", "response_end": "w5", "tokenizer_name_or_path": str(tmp_path)}
    found = get_peft_model(causal_lm(), config(**fields)).peft_config["default"]
    assert (found.response_template, found.response_end) == ([7, 8], [9])


# --------------------------------------------------------------------------------------------------------- other places


def test_iapt_after_preft_in_one_model() -> None:
    """A method with slots beside one without, by PEFT's mixed model of transformers' own adapters: one is active at a time."""
    base = causal_lm()
    ids = batch(7)["input_ids"]
    first = adapted(base, config())
    want = first(ids).logits.detach()
    assert re.search("preft", str(type(first.base_model)), re.I)
    base = first.unload()
    assert_same(base(ids).logits, causal_lm()(ids).logits)
    assert not torch.equal(adapted(base, IAPTConfig(task_type="CAUSAL_LM"))(ids).logits, want)
    assert edits.SHOWN > 0 and tf.__version__
