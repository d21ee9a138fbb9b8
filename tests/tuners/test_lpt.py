# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Late prompt tuning against references written here."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder, instances, pair
from torch import nn

from peft_instance_prompt import LPTConfig
from peft_instance_prompt.tuners.lpt import LPTGenerator


KINDS = ("npg", "appg", "mppg", "none")


def config(**fields) -> LPTConfig:
    return LPTConfig(**{"bottleneck_dim": 8, "dropout": 0.0, "num_virtual_tokens": 3, **fields})


def lpt(family: str = "llama", seed: int = 0, attn_implementation: str | None = None, **fields):
    changes = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    if family != "gemma3":
        del changes["layer_types"]
    base = causal_lm(family, attn_implementation=attn_implementation, **changes)
    return adapted(base, config(task_type="CAUSAL_LM", **fields), seed=seed)


def generator_of(model, adapter: str = "default") -> LPTGenerator:
    (found,) = (m for name, m in model.named_modules() if isinstance(m, LPTGenerator) and name.endswith("." + adapter))
    return found


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
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    ids = batch(8, 8)["input_ids"]
    labels = ids.clone()
    labels[:, :5] = -100
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in generator.parameters())


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


# ------------------------------------------------------------------------------------------------- below the prompt


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
    model = adapted(encoder(family, attn_implementation=attention), config(insertion_layer=1))
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
