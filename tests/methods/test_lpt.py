# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Late prompt tuning against references written here."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from late_prompts import assert_all_learn_at_the_second_step, config, lpt
from peft import get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder, generator_of, instances, pair
from torch import nn

from peft_instance_prompt import LPTConfig


KINDS = ("npg", "appg", "mppg", "none")


# --------------------------------------------------------------------------------------------------------- generator


@pytest.mark.parametrize(
    ("kind", "fields", "count"),
    [("npg", {}, 791_680), ("appg", {}, 263_296), ("mppg", {}, 263_296), ("none", {"num_virtual_tokens": 20}, 20_480)],
)
def test_parameter_counts_of_the_paper(kind: str, fields: dict, count: int) -> None:
    with torch.device("meta"):
        bert = tf.BertModel(tf.BertConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=2, vocab_size=8))
        model = get_peft_model(bert, LPTConfig(generator_type=kind, **fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def generated(weights: dict, kind: str, states: torch.Tensor, form: str) -> torch.Tensor:
    """The prompt (l, d) of one row from its instruction's states (n, d), as the paper has it."""
    if kind == "none":
        p = weights["prompt"][0]
    else:
        inputs = states if form == "paper" else states / states.pow(2).mean(-1, keepdim=True).sqrt()
        projected = inputs @ weights["down"][0] + weights["down_bias"][0]  # (n, m)
        pool = {"appg": nn.AdaptiveAvgPool1d, "mppg": nn.AdaptiveMaxPool1d}.get(kind)
        pooled = projected[-1:] if pool is None else pool(3)(projected.T[None])[0].T
        p = (pooled.relu() @ weights["up"][0] + weights["up_bias"][0]).reshape(3, -1)
    if form == "paper":
        return p
    return states[0] + states[0].pow(2).mean().sqrt() * p


@pytest.mark.parametrize("form", [True, "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_a_loop_over_the_layers(kind: str, form) -> None:
    """The tokens alone run up to layer k, where the prompt is put before them; from there on they run together."""
    model = lpt(generator_type=kind, insertion_layer=2, init_weights=form)
    ids, mask = batch(9)["input_ids"], torch.arange(9)[None] < 6
    weights = dict(generator_of(model).named_parameters())
    with torch.no_grad():
        actual = model(ids, instruction_mask=mask).logits[0]
        base = model.get_base_model()
        states = base.model.embed_tokens(ids)
        positions = torch.arange(9)[None]
        for number, layer in enumerate(base.model.layers):
            if number == 2:
                states = torch.cat([generated(weights, kind, states[0, :6], form)[None], states], dim=1)  # (1, 12, d)
                positions = torch.cat([torch.zeros(1, 3, dtype=torch.long), positions], dim=1)
            causal = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()[None, None]
            for hook in list(layer._forward_pre_hooks):
                del layer._forward_pre_hooks[hook]
            embeddings = base.model.rotary_emb(states, positions)
            states = layer(states, attention_mask=causal, position_ids=positions, position_embeddings=embeddings)
        expected = base.lm_head(base.model.norm(states[0, 3:]))
    assert_same(actual, expected)


def test_layer_0_is_prompt_tuning() -> None:
    model = lpt(generator_type="none", insertion_layer=0, init_weights="paper")
    ids, prompt = batch(7)["input_ids"], generator_of(model).prompt.detach()  # (1, l, d)
    with torch.no_grad():
        actual = model(ids).logits
        base = model.unload()
        assert_same(actual, base(inputs_embeds=torch.cat([prompt, base.model.embed_tokens(ids)], dim=1)).logits[:, 3:])


def test_the_layer_defaults_to_the_middle() -> None:
    assert generator_of(lpt()).depths == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapter_and_its_gradients(kind: str) -> None:
    """A fresh adapter's vectors are copies of the first token's state; at the second step all weights learn."""
    model = get_peft_model(causal_lm(), config(task_type="CAUSAL_LM", generator_type=kind))
    generator = generator_of(model)
    states, mask = torch.randn(2, 6, 32), torch.arange(6) >= torch.tensor([[0], [2]])
    prompts = generator(instances(states, mask), 1)
    assert torch.equal(prompts, states[[0, 1], [0, 2]][:, None].expand(-1, 3, -1))
    assert_all_learn_at_the_second_step(model, generator)


def test_dropout_in_training_only() -> None:
    torch.manual_seed(0)
    model = lpt(dropout=0.9)
    generator = generator_of(model)
    states = torch.randn(1, 6, 32)
    plain = generator(instances(states), 2) - states[:, :1]
    assert (plain != 0).all()
    dropped = generator.train()(instances(states), 2) - states[:, :1]
    assert (dropped.abs() < 1e-6).float().mean() > 0.6


def test_constant_condition_sees_no_instance() -> None:
    for kind in KINDS[:3]:
        generator = generator_of(lpt(condition="constant", generator_type=kind, init_weights="paper"))
        prompts = generator(instances(torch.randn(2, 6, 32)), 2)
        assert torch.equal(prompts[0], prompts[1])
        assert prompts.shape == (2, 3, 32)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generator_type": "mlp"}, r"`generator_type` must be one of .*'mlp'"),
        ({"insertion_layer": -1}, r"`insertion_layer` must be at least 0, got -1"),
        ({"dropout": 1.0}, r"`dropout` must lie in .*1.0"),
        ({"layers_to_transform": [1]}, r"`layers_to_transform` must be None.*\[1\]"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LPTConfig(**fields)


@pytest.mark.parametrize("position", ["after_first", "end"])
@pytest.mark.parametrize(
    ("make", "family", "refused"),
    [
        (pair, "t5", True),
        (causal_lm, "bloom", True),
        (causal_lm, "falcon", True),  # with ALiBi
        (causal_lm, "mpt", True),
        (encoder, "deberta-v2", True),
        (encoder, "mpnet", True),
        (causal_lm, "mistral", True),  # with a sliding window
        (causal_lm, "gemma3", True),
        (causal_lm, "qwen2", False),
        (causal_lm, "falcon_rotary", False),
        (causal_lm, "llama", False),
        (causal_lm, "gpt2", False),
        (encoder, "bert", False),
    ],
)
def test_slots_among_tokens_where_distances_are_those_of_columns(
    make, family: str, refused: bool, position: str
) -> None:
    base = make(family)
    names = set(base.state_dict())
    if refused:
        with pytest.raises(ValueError, match=rf"`prompt_position` must be 'before' for late prompts.*'{position}'"):
            get_peft_model(base, config(insertion_layer=1, prompt_position=position))
        assert set(base.state_dict()) == names
        # It is the layers below that must not notice.
        get_peft_model(base, config(insertion_layer=0, prompt_position=position))
    else:
        get_peft_model(base, config(insertion_layer=1, prompt_position=position))


def test_a_layer_outside_the_stack_changes_nothing() -> None:
    base = causal_lm()
    names = set(base.state_dict())
    with pytest.raises(ValueError, match=r"`insertion_layer` must lie in 0..2 for 'model.layers', got 3"):
        get_peft_model(base, config(insertion_layer=3))
    assert set(base.state_dict()) == names
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_deep_copy_keeps_its_layer() -> None:
    model = lpt()
    inputs = batch(7, 5)
    with torch.no_grad():
        expected = model(**inputs).logits
        twin = copy.deepcopy(model)
        for parameter in generator_of(model).parameters():
            parameter.zero_()
        assert torch.equal(twin(**inputs).logits, expected)


def test_layers_with_a_state_and_no_attention() -> None:
    """Nothing can be hidden from them by a mask; an insertion below them is right."""
    fields = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    fields.update(intermediate_size=48, num_key_value_heads=2, full_attn_idxs=[2], pad_token_id=0)
    base = tf.Lfm2ForCausalLM(tf.Lfm2Config(**fields))
    before = {name for name, _ in base.named_modules()}
    with pytest.raises(ValueError, match=r"hidden from the layers \[0, 1\].*got 2"):
        get_peft_model(base, LPTConfig(task_type="CAUSAL_LM"))
    assert {name for name, _ in base.named_modules()} == before
    model = adapted(base, LPTConfig(task_type="CAUSAL_LM", insertion_layer=0))
    assert model(**batch(9)).logits.isfinite().all()
