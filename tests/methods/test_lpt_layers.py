# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Late prompts and the layers: those below run as if there were no prompt, in batches of several adapters too."""

from __future__ import annotations

import pytest
import torch
from late_prompts import config, lpt
from tiny import adapted, assert_same, batch, encoder, generator_of, pair
from torch import nn


NUMBERED = ("llama", "gpt2", "opt")  # their slots may stand among the tokens
COLUMNS = (
    "gemma3",
    "bloom",
    "mpt",
    "falcon",
)  # windows and ALiBi biases count columns, so a token would stand farther away


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("family", "position"),
    [
        *((family, position) for family in NUMBERED for position in ("before", "after_first", "end")),
        *((family, "before") for family in COLUMNS),
    ],
)
def test_layers_below_are_the_base_model(family: str, position: str, attention: str) -> None:
    if family in ("bloom", "mpt") and attention == "sdpa":
        pytest.skip("it has eager attention only")
    model = lpt(family, insertion_layer=2, prompt_position=position, attn_implementation=attention)
    inputs = batch(9, 6)
    instruction = inputs["attention_mask"].bool() & (torch.arange(9) < 7)
    with torch.no_grad():
        actual = model(**inputs, instruction_mask=instruction, output_hidden_states=True).hidden_states
        with model.disable_adapter():
            # Given, as GPT-2 counts padding on the left as positions where it counts itself.
            positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
            positions = {} if family in ("bloom", "mpt", "falcon") else {"position_ids": positions}
            expected = model(**inputs, **positions, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    for depth in range(3):
        assert_same(actual[depth][real], expected[depth][real])
    assert (actual[3] - expected[3])[real].abs().max() > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_graph_below(attention: str) -> None:
    model = lpt(attn_implementation=attention).train()
    seen = {}
    for depth, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(lambda _, args, out, depth=depth: seen.__setitem__(depth, out.requires_grad))
    inputs = batch(8, 6)
    labels = inputs["input_ids"].clone()
    labels[:, :5] = -100
    model(**inputs, labels=labels).loss.backward()
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert all(p.grad is not None for p in generator_of(model).parameters())


def test_no_attention_to_the_prompt_below() -> None:
    model = lpt(attn_implementation="eager", insertion_layer=2)
    inputs = batch(9, 6)
    with torch.no_grad():
        first = model(**inputs, output_attentions=True, use_cache=True)
        mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = model(
            torch.tensor([[4], [5]]),
            attention_mask=mask,
            past_key_values=first.past_key_values,
            output_attentions=True,
        )
    for out in (first, step):
        for depth, maps in enumerate(out.attentions):
            among_tokens = maps.sum(dim=-1)[0]  # (heads, S); the rest goes to the prompt
            assert bool((among_tokens < 1 - 1e-4).any()) == (depth >= 2)
            if depth < 2:
                assert_same(among_tokens, torch.ones_like(among_tokens))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert", "mpnet", "albert"])
def test_encoders(family: str, attention: str) -> None:
    if attention == "sdpa" and family in ("deberta-v2", "mpnet"):
        pytest.skip("it has eager attention only")
    base = encoder(family, attn_implementation=attention).double()  # what is compared is equal but for rounding
    model = adapted(base, config(insertion_layer=1))
    with torch.no_grad():
        for side in ("left", "right"):
            inputs = batch(9, 6, side=side)
            out = model(**inputs, output_hidden_states=True)
            for row, n in enumerate((9, 6)):
                alone = model(batch(9, 6, side="right")["input_ids"][row : row + 1, :n]).last_hidden_state[0]
                assert_same(out.last_hidden_state[row, slice(9 - n, 9) if side == "left" else slice(0, n)], alone)
        with model.disable_adapter():
            plain = model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    for depth in range(2):
        assert_same(out.hidden_states[depth][real], plain[depth][real])
    assert (out.hidden_states[2] - plain[2])[real].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoders_of_pairs(family: str) -> None:
    """The decoder sees the prompt; the encoder's first layers do not, and text does not depend on the cache."""
    model = adapted(pair(family), config(task_type="SEQ_2_SEQ_LM", insertion_layer=1))
    inputs = batch(9, 6, side="right")
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        states = model(**inputs, decoder_input_ids=torch.ones(2, 3).long(), output_hidden_states=True)
        text = model.generate(**inputs, **how)
        assert torch.equal(model.generate(**inputs, **how, use_cache=False), text)
        for row, n in enumerate((9, 6)):
            assert torch.equal(model.generate(input_ids=inputs["input_ids"][row : row + 1, :n], **how)[0], text[row])
        with model.disable_adapter():
            plain = model(**inputs, decoder_input_ids=torch.ones(2, 3).long(), output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    if family == "t5":  # BART's encoder counts positions by itself, those of the slots too
        assert_same(states.encoder_hidden_states[1][real], plain.encoder_hidden_states[1][real])
    assert (states.logits - plain.logits).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------- several adapters, masks


def test_adapters_that_enter_at_different_layers_in_one_batch() -> None:
    """Each row sees its own prompt from its own layer on, in the prompt's pass, in decoding, and with beams."""
    for family in ("llama", "gemma3"):
        model = lpt(family, insertion_layer=1)
        for name, fields in {
            "b": {"insertion_layer": 3},
            "c": {"insertion_layer": 0},
            "d": {"insertion_layer": 1},
        }.items():
            model.add_adapter(name, config(task_type="CAUSAL_LM", **fields))
            with torch.no_grad():
                for number, parameter in enumerate(generator_of(model, name).parameters()):
                    generator = torch.Generator().manual_seed(10 * ord(name) + number)
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        names = ["default", "b", "__base__", "c", "d"]
        inputs = batch(9, 6, 12, 5, 9)
        ways = ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"})
        with torch.no_grad():
            together = model(**inputs, adapter_names=names).logits
            texts = [
                model.generate(
                    **inputs, adapter_names=names, max_new_tokens=4, do_sample=False, eos_token_id=None, **way
                )
                for way in ways
            ]
            for row, name in enumerate(names):
                alone = {key: value[row : row + 1] for key, value in inputs.items()}
                real = alone["attention_mask"][0].bool()
                assert_same(together[row, real], model(**alone, adapter_names=[name]).logits[0, real])
                for way, text in zip(ways, texts):
                    own = model.generate(
                        **alone, adapter_names=[name], max_new_tokens=4, do_sample=False, eos_token_id=None, **way
                    )
                    assert torch.equal(text[row], own[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_going_on_from_a_cache_whose_rows_were_reordered(family: str) -> None:
    """Rows keep the layers from which their prompts are seen, and the positions of the base model."""
    model = lpt(family, insertion_layer=1)
    model.add_adapter("b", config(task_type="CAUSAL_LM", insertion_layer=3, init_weights=False))
    names = ["default", "b", "default"]
    ids = batch(12, 12, 12)["input_ids"]
    with torch.no_grad():
        scope = torch.arange(12).expand(3, -1) < 9
        whole = model(ids, instruction_mask=scope, adapter_names=names).logits
        cache = model(ids[:, :9], adapter_names=names).past_key_values
        rows = torch.tensor([1, 2, 0, 1])
        cache.batch_select_indices(rows)
        middle = model(ids[rows, 9:11], past_key_values=cache)
        last = model(ids[rows, 11:], past_key_values=middle.past_key_values)
    assert_same(torch.cat([middle.logits, last.logits], dim=1), whole[rows, 9:])
