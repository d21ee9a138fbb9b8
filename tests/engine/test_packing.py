# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Packed rows: several sequences in a row, each of which must be what it is in a batch of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from methods import METHODS
from packed_rows import LENGTHS, labels_of, packed, texts
from peft import PeftModel
from tiny import DECODERS, VOCAB, adapted, assert_same, causal_lm, perturb
from torch.nn.functional import cross_entropy

from peft_instance_prompt import record_choices
from peft_instance_prompt.engine.tokens import find_packing


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def total(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed loss of all labels."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def check(model: PeftModel, rows: list[list[torch.Tensor]], **changes: Any) -> torch.Tensor:
    """Logits, states, loss and gradients of packed rows are those of each sequence alone; the logits."""
    batch = {**packed(rows), **changes}
    torch.manual_seed(0)
    out = model(**batch, output_hidden_states=True)
    assert out.logits.shape[:2] == batch["input_ids"].shape and out.hidden_states[1].shape[:2] == out.logits.shape[:2]
    loss = total(out.logits, batch["labels"])
    loss.backward()
    found, whole = gradients(model), 0.0
    for number, row in enumerate(rows):
        column = 0
        for ids in row:
            alone = model(ids, labels=labels_of(ids), output_hidden_states=True)
            own = slice(column, column + ids.shape[1])
            assert_same(out.logits[number : number + 1, own], alone.logits)
            for together, states in zip(out.hidden_states, alone.hidden_states):
                assert_same(together[number : number + 1, own], states)
            one = total(alone.logits, labels_of(ids))
            one.backward()
            whole, column = whole + float(one), own.stop
    assert float(loss) == pytest.approx(whole, rel=1e-5)
    expected = gradients(model)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert_same(found[name], gradient, 2e-5)  # the sums of three losses
    return out.logits.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_are_the_sequences_alone(method: str, attention: str) -> None:
    model = adapted(causal_lm(attn_implementation=attention), METHODS[method](task_type="CAUSAL_LM"))
    a, b, c, d = texts(*LENGTHS, 5)
    found = check(model, [[a, b, c]])
    with model.disable_adapter():
        bare = model(**packed([[a, b, c]]), use_cache=False).logits
    assert (found - bare).abs().max() > 1e-2, "the adapter does nothing"
    check(model, [[a, b], [c, d, a], [b]])


SPREAD = ("gpt2", "gemma3", "mistral", "falcon", "opt", "mpt", "bloom")
CASES = [(method, family) for method in ("iapt", "lpt", "dynamic_prompt_all") for family in SPREAD]
CASES += [("idpg", family) for family in DECODERS if family not in SPREAD] + [
    ("idpg", "opt")
]  # which leaks, frozen too
LEAKY = ("opt", "mpt", "bloom")


@pytest.mark.parametrize(("method", "family"), CASES)
def test_every_family_keeps_sequences_apart(method: str, family: str) -> None:
    """Also those whose bare model does not; and sequences that are longer than a sliding window of 8."""
    model = adapted(causal_lm(family), METHODS[method](task_type="CAUSAL_LM"))
    check(model, [texts(7, 12, 4), texts(11, 9, seed=1)])


def test_biogpt() -> None:
    """A family beside those of `tiny.py` whose bare model leaks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    base = tf.BioGptForCausalLM(tf.BioGptConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes)).eval()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    check(adapted(base, METHODS["iapt"](task_type="CAUSAL_LM")), [texts(7, 12, 4), texts(11, 9, seed=1)])


@pytest.mark.parametrize("family", LEAKY)
@torch.no_grad()
def test_families_whose_bare_model_leaks(family: str) -> None:
    """No sequence depends on the one before it, as it does in the bare model."""
    base, batch = causal_lm(family), packed([texts(*LENGTHS)])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :7] = (other["input_ids"][0, :7] + 1) % VOCAB
    model = adapted(base, METHODS["iapt"](task_type="CAUSAL_LM"))

    def difference() -> float:
        one, two = (model(**each, use_cache=False).logits[0, 7:] for each in (batch, other))
        return float((one - two).abs().max())

    assert difference() < 1e-5
    with model.disable_adapter():
        assert difference() > 1e-3, "the bare model does not leak"


@pytest.mark.slots
def test_slots_behind_the_instruction(kind: str) -> None:
    if kind == "dynamic_prompt":
        pytest.skip("it chooses the places itself")
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", prompt_position="end"))
    check(model, [texts(*LENGTHS), texts(5, 6, seed=3)])


def test_gradient_checkpointing(kind: str) -> None:
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")).train()
    if kind == "dynamic_prompt":
        model.eval()  # its choices are drawn at random in training
    batch = packed([texts(*LENGTHS)])
    model(**batch).loss.backward()
    expected = gradients(model)
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model(**batch).loss.backward()
        for name, gradient in gradients(model).items():
            assert_same(gradient, expected[name], 2e-5)


def test_the_bare_model_is_left_alone() -> None:
    base, batch = causal_lm(), packed([texts(*LENGTHS)])
    expected = base(**batch, use_cache=False).logits
    model = adapted(base, METHODS["iapt"](task_type="CAUSAL_LM"))
    model(**batch)
    with model.disable_adapter():
        assert torch.equal(model(**batch, use_cache=False).logits, expected)


# ------------------------------------------------------------------------------------------------------- how many slots


@torch.no_grad()
def test_pads_and_single_tokens_have_no_prompt() -> None:
    """TRL's pads stand at position 0: the sequences before them and the number of slots stay as they are."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    seen: list[tuple] = []
    layers = model.get_base_model().model.layers
    layers[0].register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    row = texts(*LENGTHS)
    plain, wide = model(**packed([row])).logits, model(**packed([row], width=26)).logits
    assert_same(wide[:, :20], plain)
    assert [shape[1] for shape in seen] == [20 + 3 * 4, 26 + 3 * 4], "four slots for each of three sequences"
    found = find_packing(packed([row], width=26), 1, 26)
    assert found.sequence[0, 19:].tolist() == [2, *[-1] * 6] and len(found.rows) == 3
    with pytest.raises(ValueError, match="no sequence of two or more tokens"):
        model(**packed([[texts(1)[0]]], width=4))


@pytest.mark.parametrize("order", ["paper", "dpt"])
def test_dead_slots_take_no_place(order: str) -> None:
    """Dynamic prompting may use fewer slots: a packed row has the used ones only, and no more than the fullest row needs."""
    config = METHODS["dynamic_prompt_all"](task_type="CAUSAL_LM", order=order, init_weights=False)
    model = adapted(causal_lm(), config)
    seen: list[int] = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    rows = [texts(*LENGTHS, 5, 8), texts(6, seed=4)]
    with record_choices() as choices:
        model(**packed(rows))
    lengths = choices[0].lengths.tolist()
    assert seen == [33 + max(sum(lengths[:5]), lengths[5])]
    assert len({*lengths}) > 2 and len({*choices[0].positions.tolist()}) > 2, "the choices hardly differ"
    check(model, rows)


# ---------------------------------------------------------------------------------------------------------- adapters


@torch.no_grad()
def test_adapters_of_packed_rows(kind: str) -> None:
    """`adapter_names` names an adapter for each row, and all sequences of the row have it."""
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"), "a")
    model.add_adapter("b", METHODS[kind](task_type="CAUSAL_LM", num_virtual_tokens=2))
    perturb(model, seed=5, adapter="b").eval()
    rows = [texts(*LENGTHS), texts(5, 8, seed=1), texts(6, 6, seed=2), texts(9, 3, seed=3)]
    names = ["b", "a", "__base__", "a"]
    found = model(**packed(rows), adapter_names=names).logits
    for number, (row, name) in enumerate(zip(rows, names)):
        column = 0
        for ids in row:
            own = slice(column, column := column + ids.shape[1])
            alone = model(ids, labels=labels_of(ids), adapter_names=[name]).logits
            assert_same(found[number : number + 1, own], alone)
    with pytest.raises(ValueError, match="`adapter_names` must name an adapter for each of the 4 rows"):
        model(**packed(rows), adapter_names=["a"] * 9)


def test_rows_without_a_sequence() -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"), "a")
    rows = [texts(1), texts(*LENGTHS)]
    expected = model(**packed(rows[1:]), adapter_names=["a"]).logits
    assert_same(model(**packed(rows), adapter_names=["a", "a"]).logits[1:], expected)
    with pytest.raises(ValueError, match="No packed row with an adapter"):
        model(**packed(rows), adapter_names=["a", "__base__"])
