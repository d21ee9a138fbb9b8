# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Dynamic prompting: sizes, configs, arrangements and the start, against references written here."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from dynamic_prompts import ORDERS, K, L, choose, dynamic, labels_for, prompts_of
from peft import get_peft_model
from tiny import assert_same, batch, causal_lm, encoder, generator_of

from peft_instance_prompt import DynamicPromptConfig, record_choices
from peft_instance_prompt.methods.dynamic_prompt import PRESETS


def arrangement(prompt: torch.Tensor, embeds: torch.Tensor, start: int, end: int, j: int, order: str) -> torch.Tensor:
    """C_j: (S + l, e) of prompt (l, e) and embeds (S, e)."""
    front, back = (prompt[: L - j], prompt[L - j :]) if order == "paper" else (prompt[j:], prompt[:j])
    front, back = (prompt, prompt[:0]) if start == end else (front, back)  # which all stand there in their own order
    return torch.cat([embeds[:start], front, embeds[start:end], back, embeds[end:]])


# --------------------------------------------------------------------------------------------------- config and sizes


def test_parameter_counts_of_the_paper() -> None:
    expected = {"adap_pos": 21, "adap_ins_pos": 21_525, "adap_length": 21, "adap_ins_length": 21_525}
    expected["adap_ins_vec"] = 3 * 20 * 1024 + 4 * 1025  # a pool of 4 prompts and its head, beyond the one prompt
    expected["adap_ins_vec_pos"] = expected["adap_ins_vec"] + 21_525
    expected["adap_pos_ins_vec"] = expected["adap_ins_vec"] + 21
    assert expected.keys() == PRESETS.keys()
    for name, count in expected.items():
        with torch.device("meta"):
            bert = tf.BertModel(
                tf.BertConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=1, vocab_size=8)
            )
            model = get_peft_model(bert, DynamicPromptConfig.preset(name))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20 * 1024 + count, name


def test_preset_overrides() -> None:
    config = DynamicPromptConfig.preset("adap_pos", length="instance", num_virtual_tokens=3)
    assert (config.position, config.length, config.representation, config.num_virtual_tokens) == (
        "task",
        "instance",
        "off",
        3,
    )
    with pytest.raises(ValueError, match="no preset 'adap'.*adap_ins_vec_pos.*adap_pos_ins_vec"):
        DynamicPromptConfig.preset("adap")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "row"}, "`position` must be one of .*'row'"),
        ({"length": True}, "`length` must be one of .*True"),
        ({"representation": "row"}, "`representation` must be one of .*'row'"),
        ({"representation": "task"}, "`representation='task'` needs `num_tasks`"),
        ({"position": 21}, "`position` must be one of .* from 0 to `num_virtual_tokens` 20; .*got 21"),
        ({"position": -1}, "`position` must be .*got -1"),
        ({"position": True}, "`position` must be .*got True"),
        ({"position": [1, 2]}, "`position` must be .*got .1, 2. with `num_tasks` None"),
        (
            {"position": [1, 2], "num_tasks": 3},
            "`position` must be .*one for each task; got .1, 2. with `num_tasks` 3",
        ),
        ({"num_tasks": 0}, "`num_tasks` must be at least 1, got 0"),
        ({"num_tasks": 2}, "`num_tasks` is for choices per task: .*got 2 with 'instance', 'off' and 'off'"),
        ({"init": "vocab"}, "`init` must be one of .*'vocab'"),
        ({"init": "embeddings"}, "`init='embeddings'` needs `init_weights='paper'`, got True"),
        ({"tanh_logits": 1}, "`tanh_logits` must be one of .* got 1"),
        ({"order": "reverse"}, "`order` must be one of .*'reverse'"),
        ({"num_pool": 0}, "`num_pool` must be at least 1, got 0"),
        ({"anneal_steps": 0}, "`anneal_steps` must be at least 1, got 0"),
        ({"temperature": 0}, "`temperature` must lie between 0.0001 and 10000, got 0"),
        ({"min_temperature": 1e-40}, "`min_temperature` must lie between 0.0001 and 10000, got 1e-40"),
        ({"temperature": math.inf}, "`temperature` must be finite, got inf"),
        ({"instance_source": "cls"}, "`instance_source` must be one of .*'cls'"),
        ({"instance_embeds_dim": 3}, "`instance_embeds_dim` must be .* None otherwise, got 3 with 'frozen'"),
        ({"prompt_position": "end"}, "`prompt_position` must be one of .*'end'"),
        (
            {"prompt_position": "end", "instruction_length": 2},
            "`instruction_length` must be None, got 2.*split around",
        ),
        ({"layers_to_transform": 0}, "`layers_to_transform` must be None.* got 0"),
        ({"sample_at_eval": 1}, "`sample_at_eval` must be one of .* got 1"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicPromptConfig(**fields)


def test_a_prompt_that_does_not_fit_the_positions() -> None:
    model = dynamic("gpt2", base=causal_lm("gpt2", n_positions=12))
    with pytest.raises(ValueError, match="the model has 12 positions, and 9 tokens with 4 prompt slots need 13"):
        model(batch(9)["input_ids"])


# ------------------------------------------------------------------------------------------------------- arrangement


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [6, 2, 1])
@pytest.mark.parametrize("prompt_position", ["before", "after_first"])
def test_arrangement_in_a_causal_model(order: str, prompt_position: str, n: int) -> None:
    """Between instruction and response; the first response token is predicted at the last vector behind the n instruction tokens."""
    ids = batch(9)["input_ids"]
    start = int(prompt_position == "after_first")
    for j in range(L + 1):
        model = dynamic(position="task", init_weights="paper", order=order, prompt_position=prompt_position)
        choose(model, position=j)
        with torch.no_grad():
            actual = model(ids, instruction_mask=torch.arange(9)[None] < n).logits[0]
            base = model.get_base_model()
            prompt = prompts_of(model)[0]
            with model.disable_adapter():
                rows = arrangement(prompt, base.model.embed_tokens(ids)[0], start, n, j, order)
                logits = base(inputs_embeds=rows[None]).logits[0]
        places = [t + (L - j) * (t >= start) + j * (t >= n) for t in range(9)]
        places[n - 1] += (
            L if n == start else j
        )  # behind the first token, an instruction of one has all of them behind it
        assert_same(actual, logits[places])


@pytest.mark.parametrize("order", ORDERS)
def test_arrangement_in_an_encoder(order: str) -> None:
    """Before the end token, beside padding on either side."""
    for j in (1, L):
        model = dynamic(base=encoder("bert"), task_type=None, position="task", init_weights="paper", order=order)
        choose(model, position=j)
        base = model.get_base_model()
        for side in ("left", "right"):
            inputs = batch(9, 6, side=side)
            with torch.no_grad():
                actual = model(**inputs).last_hidden_state
                for row, n in enumerate((9, 6)):
                    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
                    embeds = base.get_input_embeddings()(ids)
                    rows = arrangement(prompts_of(model)[0], embeds, 1, n - 1, j, order)
                    with model.disable_adapter():
                        states = base(inputs_embeds=rows[None]).last_hidden_state[0]
                    places = [t + (L - j) * (t >= 1) + j * (t >= n - 1) for t in range(n)]
                    assert_same(actual[row][inputs["attention_mask"][row].bool()], states[places])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mpt"])
def test_unused_vectors_are_not_there(family: str) -> None:
    """A prompt of length i is the prompt of its first i vectors alone, whatever the others hold."""
    inputs = batch(9, 6)
    for i in (0, 1, 3):
        model = choose(dynamic(family, position="off", length="task"), length=i)
        with torch.no_grad():
            prompts_of(model)[:, i:] = 1e4
            actual = model(**inputs)
            if i == 0:
                with model.disable_adapter():
                    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                    expected = model(**inputs, **({"position_ids": positions} if family in ("llama", "gpt2") else {}))
            else:
                shorter = dynamic(family, position="off", num_virtual_tokens=i)
                prompts_of(shorter).copy_(prompts_of(model)[:, :i])
                expected = shorter(**inputs)
        real = inputs["attention_mask"].bool()
        assert_same(actual.logits[real], expected.logits[real])


def test_unused_vectors_in_half_precision_and_decoding() -> None:
    model = choose(dynamic(position="task", length="task", order="dpt"), position=2, length=3).to(torch.bfloat16)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    inputs = batch(9, 6)
    runs = []
    for value in (0.0, 1e30):
        with torch.no_grad():
            prompts_of(model)[:, 3:] = value
            runs.append(model.generate(**inputs, **how, return_dict_in_generate=True))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(runs[0].logits, runs[1].logits))


# ------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("preset", PRESETS)
def test_fresh_adapter_and_its_gradients(preset: str) -> None:
    """It begins with the plain prompt, and at the second step all weights learn."""
    model = get_peft_model(
        causal_lm(), DynamicPromptConfig.preset(preset, task_type="CAUSAL_LM", num_virtual_tokens=L)
    )
    ids = batch(9, 9)["input_ids"]
    with record_choices() as record, torch.no_grad():
        model.eval()(ids)
    assert record[0].positions is None or not record[0].positions.any()
    assert record[0].lengths is None or (record[0].lengths == L).all()
    generator = generator_of(model.train())
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    torch.manual_seed(0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=labels_for(ids, 6)).loss.backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in generator.parameters())


def test_all_off_is_prompt_tuning() -> None:
    model = dynamic(position="off", init_weights="paper", prompt_position="before")
    ids, prompt = batch(7)["input_ids"], prompts_of(model)
    with torch.no_grad():
        actual = model(ids).logits
        base = model.unload()
        assert_same(actual, base(inputs_embeds=torch.cat([prompt, base.model.embed_tokens(ids)], 1)).logits[:, L:])


def test_assisted_decoding() -> None:
    """With an assistant the text is the same, and as an assistant, whose vectors stand in part behind the text."""
    model, assistant = choose(dynamic(position="task"), position=2), causal_lm(seed=3)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = batch(9)
    expected = model.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, **how, assistant_model=assistant), expected)
    alone = assistant.generate(**inputs, **how)
    assert torch.equal(assistant.generate(**inputs, **how, assistant_model=model), alone)


# -------------------------------------------------------------------------------------------- start from the vocabulary


@pytest.mark.parametrize("representation", ["off", "instance"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_start_from_embeddings(family: str, representation: str) -> None:
    """They are what the stack makes of the first ids: Gemma 3 scales its embeddings."""
    base = causal_lm(family)
    config = DynamicPromptConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=L,
        num_pool=K,
        representation=representation,
        init="embeddings",
        init_weights="paper",
    )
    prompts = generator_of(get_peft_model(base, config)).prompts.detach()
    k = K if representation == "instance" else 1
    with torch.no_grad():
        expected = [base.get_input_embeddings()(torch.tensor(number)) for number in range(k * L)]
    assert torch.equal(prompts, torch.stack(expected).reshape(1, k, L * 32))


def test_more_prompts_than_the_vocabulary_has_embeddings() -> None:
    fields = {"init": "embeddings", "init_weights": "paper", "representation": "instance"}
    config = DynamicPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=33, num_pool=3, **fields)
    with pytest.raises(ValueError, match="`init='embeddings'` needs 3 x 33 embeddings .* has 96"):
        get_peft_model(causal_lm(), config)
