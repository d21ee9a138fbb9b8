# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Packed rows: several sequences in a row, each of which must be what it is in a batch of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel
from tiny import DECODERS, VLMS, VOCAB, adapted, assert_same, causal_lm, encoder, pair, perturb, vlm
from torch.nn.functional import cross_entropy

from peft_instance_prompt import record_choices
from peft_instance_prompt.engine.intercept import intercept
from peft_instance_prompt.engine.packing import find_packing


LENGTHS = (7, 4, 9)


def texts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """The ids (1, n) of a sequence of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (1, n), generator=generator) for n in lengths]


def labels_of(ids: torch.Tensor, instruction: int = 2) -> torch.Tensor:
    labels = ids.clone()
    labels[:, :instruction] = -100
    return labels


def packed(rows: list[list[torch.Tensor]], width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of several sequences (1, n), with pads at position 0 up to the width of the longest, as TRL writes them."""
    width = max(sum(one.shape[1] for one in row) for row in rows) if width is None else width
    batch: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        pads = torch.zeros(1, width - sum(one.shape[1] for one in row), dtype=torch.long)
        batch["input_ids"].append(torch.cat([*row, pads], dim=1))
        batch["labels"].append(torch.cat([*map(labels_of, row), pads - 100], dim=1))
        batch["position_ids"].append(torch.cat([*(torch.arange(one.shape[1])[None] for one in row), pads], dim=1))
    return {name: torch.cat(values) for name, values in batch.items()}


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
    if method == "iapt_paper":  # the powers of states that are not normalised cost float32 its last digits
        model.double()
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


# --------------------------------------------------------------------------------------------------- what tells sequences


def boundaries(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize("how", ["cu_seq_lens", "seq_idx", "all", "position_ids of all rows"])
@torch.no_grad()
def test_what_tells_sequences(how: str) -> None:
    model = adapted(causal_lm(), METHODS["lpt"](task_type="CAUSAL_LM"))
    batch = packed([texts(*LENGTHS)])
    expected = model(**batch).logits
    ends, numbers = boundaries(*LENGTHS), torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    if how == "position_ids of all rows":
        twice = {name: torch.cat([value, value]) for name, value in batch.items()}
        twice["position_ids"] = batch["position_ids"]  # (1, S) for two rows
        assert_same(model(**twice).logits, torch.cat([expected, expected]))
        return
    plain = {name: value for name, value in batch.items() if name != "position_ids"}
    told = {"cu_seq_lens": lengths, "seq_idx": {"seq_idx": numbers}, "all": {**batch, **lengths, "seq_idx": numbers}}
    assert_same(model(**plain, **{k: v for k, v in told[how].items() if k not in plain}).logits, expected)
    assert (model(**plain).logits - expected).abs().max() > 1e-2, "the rows of one sequence are no other"


@torch.no_grad()
def test_a_row_of_one_sequence_is_no_packed_row() -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    (ids,) = texts(6)
    expected = model(ids, labels=labels_of(ids), use_cache=True)
    ends = boundaries(6)
    told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    out = model(ids, labels=labels_of(ids), position_ids=torch.arange(6)[None], seq_idx=torch.zeros_like(ids), **told)
    assert torch.equal(out.logits, expected.logits)
    assert find_packing({"position_ids": torch.arange(5, 9)[None]}, 1, 4) is None, "rows may begin anywhere"
    assert find_packing({"position_ids": torch.zeros(1, 4), "attention_mask": torch.ones(1, 4)}, 1, 4) is None


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
    """Dynamic prompting may use fewer slots: a packed row has the live ones only, and no more than the fullest row needs."""
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


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"cu_seq_lens_q": boundaries(7, 4, 8)}, "must go up from 0 to the number of tokens, 20"),
        ({"cu_seq_lens_q": torch.tensor([0, 11, 11, 20])}, "must go up from 0"),
        ({"cu_seq_lens_q": torch.tensor([1, 11, 20])}, "must go up from 0"),
        ({"cu_seq_lens_k": boundaries(7, 5, 8)}, "by `cu_seq_lens_k` a sequence begins at token 12.*by `position_ids` none|by `position_ids`"),
        ({"cu_seq_lens_q": boundaries(7, 4, 9), "cu_seq_lens_k": boundaries(11, 9)}, "contradict each other: by `cu_seq_lens_q`"),
        ({"seq_idx": torch.zeros(1, 20)}, "by `position_ids` a sequence begins at token 7 of row 0, by `seq_idx` none"),
        ({"seq_idx": torch.zeros(1, 19)}, "`seq_idx` must have the shape of the tokens"),
        ({"cu_seq_lens_q": boundaries(7, 4, 9), "max_length_q": 8}, "`max_length_q` is 8, but a sequence has 9 tokens"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6, *range(16)]])}, "token 0 of row 0 has position 3.*middle of a text"),
        ({"position_ids": torch.tensor([[*range(10), *range(30, 40)]])}, "token 10 of row 0 has position 30"),
        (
            {"cu_seq_lens_q": boundaries(7, 4, 9), "attention_mask": torch.tensor([[0, *[1] * 19]])},
            "`attention_mask` hides tokens of rows that `cu_seq_lens_q` says",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_rows_that_contradict_themselves(told: dict, complaint: str) -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    batch = packed([texts(*LENGTHS)])
    with pytest.raises(ValueError, match=complaint):
        model(**{**batch, **told})
    assert model(**batch).loss.isfinite()


def test_lengths_of_several_rows() -> None:
    two = {"cu_seq_lens_q": torch.tensor([0, 3, 6, 8, 12])}
    assert find_packing(two, 2, 6).sequence.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="lies in two of the rows"):
        find_packing({"cu_seq_lens_q": torch.tensor([0, 3, 8, 12])}, 2, 6)
    assert find_packing({"cu_seq_lens_q": torch.tensor([0, 6, 12])}, 2, 6) is None


# ------------------------------------------------------------------------------------------------------------- scope


@pytest.mark.parametrize("how", ["instruction_mask", "response_template", "instruction_length", "nothing"])
@torch.no_grad()
def test_scope_of_each_sequence(how: str) -> None:
    a, b, c = texts(*LENGTHS)
    for ids in (a, b, c):
        ids[0, 2] = 2
    fields = {"response_template": [2]} if how == "response_template" else {}
    if how == "instruction_length":
        fields = {"instruction_length": 3, "prompt_position": "end"}
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM", **fields))
    masks = [torch.arange(ids.shape[1])[None] < 3 for ids in (a, b, c)]
    batch = packed([[a, b, c]])
    del batch["labels"]
    told = {"instruction_mask": torch.cat(masks, dim=1)} if how == "instruction_mask" else {}
    found = model(**batch, **told).logits
    column = 0
    for ids, mask in zip((a, b, c), masks):
        told = {} if how == "nothing" else {"instruction_mask": mask}
        own = slice(column, column := column + ids.shape[1])
        assert_same(found[:, own], model(ids, **told).logits)


@pytest.mark.parametrize("form", ["padded", "packed"])
@torch.no_grad()
def test_plain_text_does_not_leak(kind: str, form: str) -> None:
    """No logit at or before a token depends on later tokens, and no prompt on a token behind the first three of its text."""
    if kind == "dynamic_prompt":
        pytest.skip("it chooses the places itself, and has no `instruction_length`")
    config = METHODS[kind](task_type="CAUSAL_LM", instruction_length=3, prompt_position="end")
    model = adapted(causal_lm(), config).train()
    row = texts(7, 5)
    batch = packed([row]) if form == "packed" else {"input_ids": row[0]}
    batch["labels"] = batch["input_ids"].clone()
    starts = (0, 7) if form == "packed" else (0,)

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        made: list[torch.Tensor] = []
        with intercept(lambda found: made.append(found.values)):
            return model(**{**batch, "input_ids": ids, "labels": ids}).logits, made

    ids = batch["input_ids"]
    logits, prompts = run(ids)
    for column in range(1, ids.shape[1]):
        other = ids.clone()
        other[:, column:] = (other[:, column:] + 7) % (VOCAB - 3) + 3
        found, changed = run(other)
        assert_same(found[:, :column], logits[:, :column])
        assert (found[:, column:] - logits[:, column:]).abs().max() > 1e-3
        for number, start in enumerate(starts):
            differs = max(float((one[number] - two[number]).abs().max()) for one, two in zip(prompts, changed))
            assert differs < 1e-5 if column >= start + 3 else differs > 1e-4, (column, number)


@pytest.mark.parametrize("shifted", [False, True])
def test_scope_by_labels(shifted: bool) -> None:
    """Labels of all tokens beside the one that belongs to the next sequence, which tells this one nothing."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    batch, row = packed([texts(*LENGTHS)]), texts(*LENGTHS)
    labels = batch.pop("labels")
    labels[0, 7:11] = -100  # the second sequence has no answer, so it is an instruction as a whole
    labels[0, 11] = 5  # the first label of the third, of a collator that does not mask it
    labels[0, 12] = -100
    if shifted:
        found = model(**batch, shift_labels=torch.cat([labels[:, 1:], labels.new_full((1, 1), -100)], dim=1)).logits
        assert_same(found[:, 7:11], model(row[1], labels=torch.full_like(row[1], -100)).logits)
        return
    with pytest.raises(ValueError, match=r"No token is left .* in row\(s\) \[2\].*of a packed batch"):
        model(**batch, labels=labels)


def test_continuation_without_an_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collator masks the first label of each sequence, so its first token is all the instruction that there is."""
    monkeypatch.setattr(
        "peft_instance_prompt.engine.scope._SAID", dict.fromkeys(("turns", "plain", "continuation"), False)
    )
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")).train()
    batch, row = packed([texts(*LENGTHS)]), texts(*LENGTHS)
    batch["input_ids"][0, 7] = row[1][0, 0] = 2  # a special token at its head does not end a run
    batch["labels"][0, 8:11] = batch["input_ids"][0, 8:11]
    with pytest.warns(UserWarning, match="first token alone.*`instruction_length`"):
        found = model(**batch).logits
    first = torch.arange(4)[None] < 1
    assert_same(found[:, 7:11], model(row[1], instruction_mask=first, labels=labels_of(row[1], 1)).logits)


def test_continuation_without_the_template() -> None:
    config = METHODS["iapt"](task_type="CAUSAL_LM", response_template=[2], missing_template="all")
    model = adapted(causal_lm(), config).train()
    row = texts(*LENGTHS)
    row[0][0, 1] = 2
    batch = packed([row])
    batch["labels"][0, 8:11] = batch["input_ids"][0, 8:11]
    found = model(**batch).logits
    first = torch.arange(4)[None] < 1
    assert_same(found[:, 7:11], model(row[1], instruction_mask=first, labels=labels_of(row[1], 1)).logits)
    config.missing_template = "error"
    with pytest.raises(ValueError, match=r"does not occur in row\(s\) \[1, 2\].*of a packed batch"):
        model(**batch)


def test_training_without_a_scope_is_refused() -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")).train()
    batch = packed([texts(*LENGTHS)])
    del batch["labels"]
    with pytest.raises(ValueError, match="cannot tell instruction from response"):
        model(**batch)
    with pytest.raises(ValueError, match=r"the shape of the tokens, \(1, 20\), got \(1, 7\)"):
        model(**batch, instruction_mask=torch.ones(1, 7).bool())
    with pytest.raises(TypeError, match="bools or 0/1 integers"):
        model(**batch, instruction_mask=torch.ones(1, 20))


@torch.no_grad()
def test_vectors_of_sequences() -> None:
    """`instance_embeds` have a row per sequence."""
    config = METHODS["idpg"](task_type="CAUSAL_LM", instance_source="instance_embeds", instance_embeds_dim=8)
    model = adapted(causal_lm(), config)
    vectors, row = torch.randn(3, 8), texts(*LENGTHS)
    found = model(**packed([row]), instance_embeds=vectors).logits
    for number, own in enumerate((slice(0, 7), slice(7, 11), slice(11, 20))):
        alone = model(row[number], labels=labels_of(row[number]), instance_embeds=vectors[number : number + 1])
        assert_same(found[:, own], alone.logits)
    with pytest.raises(ValueError, match=r"`instance_embeds` must have the shape.*\(3, 8\), got \(1, 8\)"):
        model(**packed([row]), instance_embeds=vectors[:1])


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


# ---------------------------------------------------------------------------------------------------------- refusals


def test_no_cache_of_packed_rows() -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    batch = packed([texts(*LENGTHS)])
    assert model(**batch, use_cache=True).get("past_key_values") is None
    with pytest.raises(ValueError, match="cannot be continued"):
        model(**batch, past_key_values=tf.DynamicCache())


def test_encoders_and_pairs_are_refused() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    ids = torch.arange(4, 10)[None]
    model = adapted(encoder("bert"), METHODS["iapt"](task_type="FEATURE_EXTRACTION"))
    with pytest.raises(ValueError, match="packed rows are for decoder-only models"):
        model(ids, position_ids=position_ids)
    seq2seq = adapted(pair("t5"), METHODS["iapt"](task_type="SEQ_2_SEQ_LM"))
    with pytest.raises((ValueError, TypeError), match="decoder-only models|cu_seq_lens_q"):
        seq2seq(ids, labels=ids, cu_seq_lens_q=boundaries(3, 3))


@pytest.mark.parametrize("family", [name for name in VLMS if "qwen" in name])
def test_several_rows_of_positions_are_refused(family: str) -> None:
    model = adapted(vlm(family)[0], METHODS["iapt"](task_type="CAUSAL_LM"))
    ids = torch.arange(4, 10)[None]
    positions = torch.tensor([0, 1, 2, 0, 1, 2]).expand(3, 1, 6)
    with pytest.raises(ValueError, match=r"several rows of `position_ids`, got \(\d, 1, 6\)"):
        model(input_ids=ids, labels=labels_of(ids), position_ids=positions)


def test_layers_that_need_seq_idx_are_refused() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    base = tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**sizes, num_key_value_heads=2, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    )
    model = adapted(base.eval(), METHODS["iapt"](task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="mixes neighbouring tokens without attention, and would need `seq_idx`"):
        model(**packed([texts(*LENGTHS)]))


def test_other_kinds_of_attention_are_refused() -> None:
    model = adapted(causal_lm("gemma3"), METHODS["iapt"](task_type="CAUSAL_LM"))
    layer = model.get_base_model().model.iapt
    layer.info = dataclasses.replace(layer.info, attention_kinds=frozenset({"full_attention", "chunked_attention"}))
    with pytest.raises(ValueError, match="Gemma3TextModel: layers of the kind 'chunked_attention'"):
        model(**packed([texts(*LENGTHS)]))


def test_rows_without_a_sequence() -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"), "a")
    rows = [texts(1), texts(*LENGTHS)]
    expected = model(**packed(rows[1:]), adapter_names=["a"]).logits
    assert_same(model(**packed(rows), adapter_names=["a", "a"]).logits[1:], expected)
    with pytest.raises(ValueError, match="No packed row with an adapter"):
        model(**packed(rows), adapter_names=["a", "__base__"])


def test_the_bare_model_is_left_alone() -> None:
    base, batch = causal_lm(), packed([texts(*LENGTHS)])
    expected = base(**batch, use_cache=False).logits
    model = adapted(base, METHODS["iapt"](task_type="CAUSAL_LM"))
    model(**batch)
    with model.disable_adapter():
        assert torch.equal(model(**batch, use_cache=False).logits, expected)
