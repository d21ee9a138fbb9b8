# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""ID-SPAM against references written here."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from late_prompts import assert_all_learn_at_the_second_step
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder, generator_of, instances

from peft_instance_prompt import IDSPAMConfig
from peft_instance_prompt.engine.intercept import intercept


l = 3


def config(**fields) -> IDSPAMConfig:
    return IDSPAMConfig(**{"bottleneck_dim": 8, "dropout": 0.0, "num_virtual_tokens": l, **fields})


def idspam(seed: int = 0, **fields) -> PeftModel:
    return adapted(causal_lm(num_hidden_layers=4), config(task_type="CAUSAL_LM", **fields), seed=seed)


# ------------------------------------------------------------------------------------------------------------- counts


def count(sizes: dict, **fields) -> int:
    """The parameters of an adapter for RoBERTa of some size."""
    with torch.device("meta"):
        base = tf.RobertaModel(tf.RobertaConfig(num_hidden_layers=24, vocab_size=8, intermediate_size=8, **sizes))
        return get_peft_model(base, IDSPAMConfig(**fields)).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        ({"hidden_size": 768, "num_attention_heads": 12}, 2_064_384),
        ({"hidden_size": 1024, "num_attention_heads": 16}, 3_538_944),
    ],
)
def test_parameter_counts_of_the_paper(sizes: dict, published: int) -> None:
    """Table 12 leaves out the bias behind the first matrix of the bottleneck, m numbers; without them it is met."""
    assert count(sizes) - IDSPAMConfig().bottleneck_dim == published


def test_parameter_counts_by_the_formula() -> None:
    e, d_k, m, slots = 64, 16, 8, 5
    sizes = {"hidden_size": e, "num_attention_heads": 4}
    attention, bottleneck = 2 * e * d_k + e * e, e * m + m + m * slots * e + slots * e
    fields = {"attention_dim": d_k, "bottleneck_dim": m, "num_virtual_tokens": slots}
    assert count(sizes, **fields) == attention + bottleneck
    assert count(sizes, **fields, condition="constant") == e + bottleneck


# -------------------------------------------------------------------------------------------------------------- maths


def pooled(weights: dict[str, torch.Tensor], E: torch.Tensor, paper: bool) -> torch.Tensor:
    """A (e,) of one instance from its embeddings E (n, e), equation 1, token by token."""
    W_Q, W_K, W_V = (weights[f"attention.{name}"] for name in ("query", "key", "value"))
    E = E if paper else E / E.pow(2).mean(dim=1, keepdim=True).sqrt()
    outputs = []
    for i in range(len(E)):
        scores = torch.stack([(E[i] @ W_Q) @ (E[j] @ W_K) for j in range(len(E))]) / math.sqrt(W_Q.shape[1])
        shares = torch.exp(scores) / torch.exp(scores).sum()
        outputs.append(sum(share * (E[j] @ W_V) for j, share in enumerate(shares)))
    return sum(outputs) / len(E)


def generated(weights: dict[str, torch.Tensor], E: torch.Tensor, first: torch.Tensor, paper: bool) -> torch.Tensor:
    """The prompt (l, d) of one instance, equation 2, and the state (d,) that ours starts from."""
    u = (pooled(weights, E, paper) @ weights["down"][0] + weights["down_bias"][0, 0]).clamp(min=0)  # (m,)
    p = (u @ weights["up"][0] + weights["up_bias"][0, 0]).reshape(l, -1)  # (l, d)
    return p.clamp(min=0) if paper else first + first.pow(2).mean().sqrt() * p


@pytest.mark.parametrize("attention_dim", [None, 6])
@pytest.mark.parametrize("form", [True, "paper"])
@torch.no_grad()
def test_against_a_loop_over_rows_and_layers(form, attention_dim: int | None) -> None:
    """Each row alone: its tokens run up to layer k, where the prompt is put before them; from there on they run together."""
    model = idspam(insertion_layer=2, init_weights=form, attention_dim=attention_dim)
    inputs = batch(9, 6)
    instruction = inputs["attention_mask"].bool() & (torch.arange(9) < 7)
    weights = dict(generator_of(model).named_parameters())
    actual = model(**inputs, instruction_mask=instruction).logits
    base = model.unload()
    for row, n in enumerate((9, 6)):
        E = base.model.embed_tokens(inputs["input_ids"][row, -n:])  # (n, d)
        states, positions = E[None], torch.arange(n)[None]
        for number, layer in enumerate(base.model.layers):
            if number == 2:
                prompt = generated(weights, E[: n - 2], states[0, 0], form == "paper")
                states = torch.cat([prompt[None], states], dim=1)  # (1, l + n, d)
                positions = torch.cat([torch.zeros(1, l, dtype=torch.long), positions], dim=1)
            causal = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril()[None, None]
            embeddings = base.model.rotary_emb(states, positions)
            states = layer(states, attention_mask=causal, position_ids=positions, position_embeddings=embeddings)
        assert_same(actual[row, -n:], base.lm_head(base.model.norm(states[0, l:])))


@pytest.mark.parametrize("family", ["bert", "electra"])
@torch.no_grad()
def test_vectors_in_an_encoder(family: str) -> None:
    """What is pooled has the width of the embeddings, what is written that of the layers; the layer defaults to the middle."""
    model, seen = adapted(encoder(family), config()), []
    inputs = batch(9, 6, side="right")
    weights = dict(generator_of(model).named_parameters())
    with intercept(lambda made: seen.append(made)):
        model(**inputs)
    base = encoder(family)
    states = base(**inputs, output_hidden_states=True).hidden_states[2]  # (B, S, d)
    A, prompts = seen
    assert (A.depth, prompts.depth) == (None, 2)
    for row, n in enumerate((9, 6)):
        E = base.get_input_embeddings()(inputs["input_ids"][row, :n])  # (n, e)
        assert_same(A.values[row], pooled(weights, E, paper=False))
        assert_same(prompts.values[row], generated(weights, E, states[row, 0], paper=False))


@torch.no_grad()
def test_adapters_of_a_batch() -> None:
    """Each row has its own adapter's attention and bottleneck."""
    model = idspam()
    model.add_adapter("b", config(task_type="CAUSAL_LM", init_weights=False))
    inputs = batch(9, 6, 8)
    names = ["default", "b", "default"]
    together = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}, adapter_names=[name]).logits[0]
        real = inputs["attention_mask"][row].bool()
        assert_same(together[row, real], alone[real])
    assert (together[1] - model(**inputs).logits[1]).abs().max() > 1e-3


@torch.no_grad()
def test_layer_0_is_a_prompt_at_the_input() -> None:
    model, seen = idspam(insertion_layer=0), []
    ids = batch(7)["input_ids"]
    with intercept(lambda made: seen.append(made)):
        actual = model(ids).logits
    base = model.unload()
    embeds = torch.cat([seen[-1].values, base.model.embed_tokens(ids)], dim=1)
    assert_same(actual, base(inputs_embeds=embeds).logits[:, l:])


# ----------------------------------------------------------------------------------------------------------- training


def test_no_graph_below() -> None:
    model = idspam(insertion_layer=2).train()
    seen = {}
    for depth, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(lambda _, args, out, depth=depth: seen.__setitem__(depth, out.requires_grad))
    inputs = batch(8, 6)
    labels = inputs["input_ids"].clone()
    labels[:, :5] = -100
    model(**inputs, labels=labels).loss.backward()
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert all(p.grad is not None and p.grad.any() for p in generator_of(model).parameters())


def test_embeddings_that_require_a_gradient_get_none_from_the_prompt() -> None:
    """As with `enable_input_require_grads`, which gradient checkpointing switches on."""
    model = idspam(insertion_layer=2)
    embeds = model.get_input_embeddings()(batch(8)["input_ids"]).detach().requires_grad_(True)
    with intercept(lambda made: made.values.sum().backward() if made.depth is None else None):
        model(inputs_embeds=embeds)
    assert embeds.grad is None


def test_fresh_adapter_and_its_gradients() -> None:
    """A fresh adapter's vectors are copies of the first token's state; at the second step all weights learn."""
    model = get_peft_model(causal_lm(), config(task_type="CAUSAL_LM"))
    generator = generator_of(model)
    states, mask = torch.randn(2, 6, 32), torch.arange(6) >= torch.tensor([[0], [2]])
    prompts = generator(instances(states, mask, torch.randn(2, 32)), 1)
    assert torch.equal(prompts, states[[0, 1], [0, 2]][:, None].expand(-1, l, -1))
    assert_all_learn_at_the_second_step(model, generator)


def test_dropout_in_training_only() -> None:
    torch.manual_seed(0)
    generator = generator_of(idspam(dropout=0.5, bottleneck_dim=64))
    given = instances(torch.randn(1, 6, 32), vector=torch.randn(1, 32))
    with torch.no_grad():
        plain = [generator(given, 2) for _ in range(2)]
        dropped = [generator.train()(given, 2) for _ in range(2)]
    assert torch.equal(*plain)
    assert (dropped[0] - dropped[1]).abs().max() > 1e-2


def test_constant_condition_sees_no_instance() -> None:
    model, seen = idspam(condition="constant", init_weights="paper"), []
    with intercept(lambda made: seen.append(made)), torch.no_grad():
        model(**batch(8, 8))
    (prompts,) = seen  # there is no vector of the instance
    assert torch.equal(prompts.values[0], prompts.values[1])
    assert prompts.values.shape == (2, l, 32)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"attention_dim": 0}, ValueError, r"`attention_dim` must be at least 1, got 0"),
        ({"attention_dim": 8.0}, TypeError, r"`attention_dim` must be an integer, got 8.0"),
        ({"insertion_layer": -1}, ValueError, r"`insertion_layer` must be at least 0, got -1"),
        ({"dropout": 1.0}, ValueError, r"`dropout` must lie in .*1.0"),
        ({"layers_to_transform": [1]}, ValueError, r"`layers_to_transform` must be None.*\[1\]"),
    ],
)
def test_bad_fields(fields: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        IDSPAMConfig(**fields)


def test_a_layer_outside_the_stack_changes_nothing() -> None:
    base = causal_lm()
    names = set(base.state_dict())
    with pytest.raises(ValueError, match=r"`insertion_layer` must lie in 0..2 for 'model.layers', got 3"):
        get_peft_model(base, config(insertion_layer=3))
    assert set(base.state_dict()) == names
    assert not any(module._forward_pre_hooks for module in base.modules())
