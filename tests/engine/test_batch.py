# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Mixed batches: each row with the adapter that it names gives what it gives alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from methods import KINDS, METHODS
from mixed_batches import GREEDY, NEW, several
from packaging import version
from peft import PeftModel
from tiny import PAIRS, adapted, assert_same, batch, causal_lm, encoder, pair, perturb, row_of, with_adapter

from peft_instance_prompt import generator as generators
from peft_instance_prompt.engine.layer import InstancePromptLayer


NAMES = ["a", "__base__", "b", "c", "a", "d"]
LENGTHS = (9, 12, 5, 7, 12, 8)
# The greedy text of some random models would be one token over and over. Not for decoders: padding counts as text there.
VARIED = {**GREEDY, "no_repeat_ngram_size": 1}
WAYS = [
    {},
    {"use_cache": False},
    {"num_beams": 3, "num_return_sequences": 2},
    {"cache_implementation": "static"},
]


# --------------------------------------------------------------------------------------------------- row by row


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        (k, f)
        for i, k in enumerate(KINDS)
        for f in ("llama", "gpt2", "gemma3", "mistral", "bloom", "mpt", "opt")
        if i == 0 or f in ("gemma3", "bloom")
    ],
)
def test_decoder(kind: str, family: str) -> None:
    model, inputs = several(causal_lm(family), kind, "CAUSAL_LM"), batch(*LENGTHS)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            own = with_adapter(model, name, model, **row_of(inputs, row)).logits[0]
            assert_same(mixed[row, -len(own) :], own)
        named = with_adapter(model, "b", model, **row_of(inputs, 0)).logits[0]
        assert (mixed[0, -len(named) :] - named).abs().max() > 1e-2, "all adapters give the same"
    # Bloom before transformers 5.23 cannot generate for an unpadded row with a static cache, without an adapter either.
    no_static = family == "bloom" and version.parse(tf.__version__) < version.parse("5.23")
    for how in WAYS[:-1] if no_static else WAYS:
        text = model.generate(**inputs, **GREEDY, **how, adapter_names=NAMES)
        copies = how.get("num_return_sequences", 1)
        for row, name in enumerate(NAMES):
            own = with_adapter(model, name, model.generate, **row_of(inputs, row), **GREEDY, **how)
            assert torch.equal(text[row * copies : (row + 1) * copies, -NEW:], own[:, -NEW:]), (how, row, name)


@pytest.mark.parametrize(
    ("kind", "family"), [(KINDS[0], f) for f in ("bert", "deberta-v2", "albert")] + [(k, "roberta") for k in KINDS]
)
@torch.no_grad()
def test_encoder(kind: str, family: str) -> None:
    model = several(encoder(family), kind, "FEATURE_EXTRACTION").double()  # ALBERT's shared layers amplify rounding
    inputs = batch(*LENGTHS, side="right")
    mixed = model(**inputs, adapter_names=NAMES, output_hidden_states=True)
    for row, name in enumerate(NAMES):
        own = with_adapter(model, name, model, **row_of(inputs, row), output_hidden_states=True)
        n = LENGTHS[row]
        assert_same(mixed.last_hidden_state[row, :n], own.last_hidden_state[0])
        for together, states in zip(mixed.hidden_states, own.hidden_states):
            assert_same(together[row, :n], states[0])
        if own.get("pooler_output") is not None:
            assert_same(mixed.pooler_output[row], own.pooler_output[0])


@torch.no_grad()
def test_classifier_with_heads_of_their_own(kind: str) -> None:
    """Each adapter has its own head in `modules_to_save`, and a row meets the head of its adapter."""
    base = encoder("bert", tf.AutoModelForSequenceClassification)
    model, inputs = several(base, kind, "SEQ_CLS").double(), batch(*LENGTHS, side="right")
    mixed = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        assert_same(mixed[row], with_adapter(model, name, model, **row_of(inputs, row)).logits[0])


@pytest.mark.parametrize(
    ("kind", "family", "side"),
    [(KINDS[0], f, "encoder") for f in PAIRS]
    + [(k, "bart", "encoder") for k in KINDS[1:]]
    + [(KINDS[0], "t5", "both")],
)
def test_pair(kind: str, family: str, side: str) -> None:
    target = None if side == "encoder" else ["encoder", "decoder"]
    model, inputs = several(pair(family), kind, "SEQ_2_SEQ_LM", target_modules=target), batch(*LENGTHS, side="right")
    decoder_ids = batch(*[4] * 6, seed=3)["input_ids"]
    with torch.no_grad():
        mixed = model(**inputs, decoder_input_ids=decoder_ids, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            own = {**row_of(inputs, row), "decoder_input_ids": decoder_ids[row : row + 1]}
            assert_same(mixed[row], with_adapter(model, name, model, **own).logits[0])
    for how in WAYS:
        text = model.generate(**inputs, **VARIED, **how, adapter_names=NAMES)
        copies = how.get("num_return_sequences", 1)
        for row, name in enumerate(NAMES):
            own = with_adapter(model, name, model.generate, **row_of(inputs, row), **VARIED, **how)
            assert torch.equal(text[row * copies : (row + 1) * copies], own), (how, row, name)


def test_sampling(kind: str) -> None:
    """With the same draws, a batch in which all rows name one adapter is a batch of that adapter."""
    model, inputs = several(causal_lm(), kind, "CAUSAL_LM"), batch(9, 6)
    how, texts = {**GREEDY, "do_sample": True, "num_return_sequences": 2}, []
    for names in (["b", "b"], None):
        model.set_adapter("a" if names else "b")
        torch.manual_seed(4)
        texts.append(model.generate(**inputs, **how, **({"adapter_names": names} if names else {})))
    assert torch.equal(*texts)


@torch.no_grad()
def test_whole_batch_of_one_name(kind: str) -> None:
    model, inputs = several(causal_lm(), kind, "CAUSAL_LM"), batch(9, 6)
    for name in ("a", "b", "d"):
        named = model(**inputs, adapter_names=[name, name]).logits
        real = inputs["attention_mask"].bool()
        assert_same(named[real], with_adapter(model, name, model, **inputs).logits[real])
    bare = causal_lm()(**inputs).logits
    assert torch.equal(model(**inputs, adapter_names=["__base__"] * 2).logits, bare)
    # Disabled is disabled, whatever the rows name.
    with model.disable_adapter():
        assert torch.equal(model(**inputs, adapter_names=["a", "b"]).logits, bare)
        text = model.generate(**inputs, **GREEDY, adapter_names=["a", "b"])
    assert torch.equal(text, causal_lm().generate(**inputs, **GREEDY))


# ------------------------------------------------------------------------------------------ run together, not in turns


@torch.no_grad()
@pytest.mark.slots
def test_adapters_of_one_signature_run_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"n{i}" for i in range(8)]
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"), name=names[0])
    for seed, name in enumerate(names[1:], start=1):
        model.add_adapter(name, METHODS[kind](task_type="CAUSAL_LM"))
        perturb(model, seed=seed, adapter=name)
    model.eval()
    inputs = batch(9, 6, 8, 5, 7, 9, 4, 6)
    expected = torch.cat(
        [
            alone_named(
                model, name, input_ids=inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
            )
            for row, name in enumerate(names)
        ]
    )
    calls, original = [], generators.PromptGenerator.forward

    def count(self, instances, depth, weights=None):
        calls.append((depth, len(instances.mask)))
        return original(self, instances, depth, weights)

    monkeypatch.setattr(generators.PromptGenerator, "forward", count)
    mixed = model(**inputs, adapter_names=names).logits[:, -1]
    (layer,) = (module for module in model.modules() if isinstance(module, InstancePromptLayer))
    assert calls == [(depth, 8) for depth in layer.generators[names[0]].depths]
    assert_same(mixed, expected)
    # One of another size is a call of its own, and a row of the base model is none.
    calls.clear()
    model.add_adapter("other", METHODS[kind](task_type="CAUSAL_LM", num_virtual_tokens=2))
    model(**inputs, adapter_names=[*names[:6], "other", "__base__"])
    depths = layer.generators[names[0]].depths
    assert sorted(calls) == sorted([(depth, n) for depth in depths for n in (6, 1)])


FREE = {  # what tells where the instruction is and where the adapter came from
    "missing_template": "all",
    "response_template": [90],
    "exclude_modules": ["vision"],
    "tokenizer_name_or_path": "some/tokenizer",
    "target_modules": ["layers"],
    "modules_to_save": ["lm_head"],
    "base_model_name_or_path": "some/model",
}
READ = {"num_virtual_tokens": 2, "prompt_position": "after_first", "init_weights": "paper", "condition": "constant"}


@pytest.mark.parametrize("field", [*FREE, *READ])
@torch.no_grad()
def test_which_fields_keep_adapters_from_running_together(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the vectors and their places depend on, and no others; each row is as it is alone either way."""
    make = METHODS["iapt"]
    model = adapted(causal_lm(), make(task_type="CAUSAL_LM", modules_to_save=["lm_head"]), name="a")
    value = FREE.get(field, READ.get(field))
    model.add_adapter("b", make(task_type="CAUSAL_LM", **{"modules_to_save": ["lm_head"], field: value}))
    perturb(model, seed=1, adapter="b")
    inputs = batch(9, 6)
    for row in range(2):  # where it is a template, each row has it
        inputs["input_ids"][row, 6] = 90
    names = ["a", "b"]
    expected = [alone_named(model.eval(), name, **row_of(inputs, row))[0] for row, name in enumerate(names)]
    calls, original = [], generators.PromptGenerator.forward

    def count(self, instances, depth, weights=None):
        calls.append(len(instances.mask))
        return original(self, instances, depth, weights)

    monkeypatch.setattr(generators.PromptGenerator, "forward", count)
    mixed = model(**inputs, adapter_names=names).logits[:, -1]
    assert set(calls) == ({2} if field in FREE else {1})
    assert_same(mixed, torch.stack(expected))


def alone_named(model: PeftModel, name: str, **inputs) -> torch.Tensor:
    model.set_adapter(name)
    return model(**inputs).logits[:, -1]  # (1, V)


# ------------------------------------------------------------------------------------------ scopes of their own


@torch.no_grad()
def test_templates_of_their_own(kind: str) -> None:
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", response_template=[90]), name="a")
    model.add_adapter("b", METHODS[kind](task_type="CAUSAL_LM", response_template=[91, 92]))
    model.add_adapter("c", METHODS[kind](task_type="CAUSAL_LM"))  # without one: the whole row
    perturb(model, seed=1, adapter="b")
    perturb(model, seed=2, adapter="c")
    model.eval()
    ids = torch.tensor([[5, 6, 90, 8, 9, 10], [5, 6, 7, 91, 92, 10], [5, 6, 90, 8, 91, 92]])
    mixed = model(ids, adapter_names=["a", "b", "c"]).logits
    for row, name in enumerate("abc"):
        assert_same(mixed[row], with_adapter(model, name, model, input_ids=ids[row : row + 1]).logits[0])
    # A response that changes leaves what stands before it alone.
    changed = ids.clone()
    changed[0, 3:], changed[1, 5:] = torch.tensor([40, 41, 42]), 43
    again = model(changed, adapter_names=["a", "b", "c"]).logits
    assert_same(again[0, :3], mixed[0, :3])
    assert_same(again[1, :5], mixed[1, :5])
    with pytest.raises(ValueError, match=r"`response_template` \[91, 92\] does not occur in row\(s\) \[0\]"):
        model(ids[:1], adapter_names=["b"])


@torch.no_grad()
def test_instruction_mask_by_row(kind: str) -> None:
    model, inputs = several(causal_lm(), kind, "CAUSAL_LM"), batch(*LENGTHS)
    mask = inputs["attention_mask"].clone()
    mask[:, -2:] = 0
    text = model.generate(**inputs, **GREEDY, num_beams=2, instruction_mask=mask, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        own = mask[row : row + 1, inputs["attention_mask"][row].bool()]
        how = {**row_of(inputs, row), **GREEDY, "num_beams": 2, "instruction_mask": own}
        assert torch.equal(text[row, -NEW:], with_adapter(model, name, model.generate, **how)[0, -NEW:])


# ------------------------------------------------------------------------------------------------ what neighbours do not do


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_of_the_base_model_keeps_its_positions(kind: str, family: str) -> None:
    """GPT-2 counts columns where it gets no position ids, padding on the left with them; a neighbour's adapter changes nothing."""
    bare, inputs = causal_lm(family), batch(9, 6)
    expected = bare(**inputs).logits
    model = several(causal_lm(family), kind, "CAUSAL_LM")
    found = model(**inputs, adapter_names=["a", "__base__"]).logits
    assert_same(found[1, 3:], expected[1, 3:])
    own = model(input_ids=inputs["input_ids"][:1], adapter_names=["a"]).logits
    assert_same(found[0], own[0])


@torch.no_grad()
def test_adapters_of_two_precisions_in_one_batch(kind: str) -> None:
    """They are not computed together: the one in half precision gets what it gets alone, to the bit."""
    model = several(causal_lm().to(torch.bfloat16), kind, "CAUSAL_LM")
    for name, parameter in model.named_parameters():
        if ".b." in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    inputs = batch(9, 9)
    dtypes = {p.dtype for name, p in model.named_parameters() if ".a." in name}
    assert dtypes == {torch.float32}
    mixed = model(**inputs, adapter_names=["a", "b"]).logits
    pairs = model(**inputs, adapter_names=["b", "b"]).logits
    assert torch.equal(mixed[1], pairs[1])
